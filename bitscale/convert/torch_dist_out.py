"""torch's distributed checkpoints (Megatron's `torch_dist`), written a chunk at a time.

    .metadata          a pickle of torch's own index classes: shapes, chunks, where they are
    __0_0.distcp       the chunks one after the other, each as torch.save writes it

Written by torch.distributed.checkpoint with a planner that makes a chunk when its turn comes: no
process group, no megatron-core, and in memory one chunk of every key at the most.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from bitscale.data.progress import ByteProgress

Shape = tuple[int, ...]


class Chunk(NamedTuple):
    """A part of the tensor `key`, and how to make it when its turn comes."""

    key: str
    shape: Shape  # of the whole tensor
    offsets: Shape  # of this part in it
    sizes: Shape  # of this part
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize


def write_torch_dist(
    directory: Path,
    chunks: Sequence[Chunk],
    objects: Mapping[str, bytes],
    progress: ByteProgress,
) -> None:
    """Write `chunks` and `objects`, what torch.save made of small things, into `directory`."""
    writer = FileSystemWriter(directory, sync_files=False)  # whoever renames it syncs it
    planner = _Planner(chunks, objects, progress)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.reset(directory)
    writer.set_up_storage_writer(True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


class _Planner(DefaultSavePlanner):
    """What is to be written, known before any of it is there."""

    def __init__(
        self, chunks: Sequence[Chunk], objects: Mapping[str, bytes], progress: ByteProgress
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {(chunk.key, chunk.offsets): chunk for chunk in chunks}
        self._objects, self._progress = objects, progress

    def create_local_plan(self) -> SavePlan:
        shards = [_shard(chunk) for chunk in self._chunks.values()]
        others = [_object(key, content) for key, content in self._objects.items()]
        self.plan = SavePlan([*shards, *others])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        assert write_item.index.offset is not None
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        value = chunk.make().to(chunk.dtype).contiguous()
        assert value.numel() == prod(chunk.sizes), (chunk, value.shape)
        self._progress.add(chunk.num_bytes)
        return value.view(chunk.sizes)


def _shard(chunk: Chunk) -> WriteItem:
    place = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
    properties = TensorProperties(dtype=chunk.dtype)
    return WriteItem(
        index=MetadataIndex(chunk.key, torch.Size(chunk.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(place, properties, torch.Size(chunk.shape)),
    )


def _object(key: str, content: bytes) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key),
        type=WriteItemType.BYTE_IO,
        bytes_io_data=BytesIOWriteData(len(content)),
    )
