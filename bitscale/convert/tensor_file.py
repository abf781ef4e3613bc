"""safetensors files written one tensor at a time: memory is one tensor's, whatever the model's.

The format (https://github.com/huggingface/safetensors): 8 bytes length of the header, little
endian; the header, JSON of name -> dtype, shape, offsets; the tensors' bytes, without gaps.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.data.progress import ByteProgress

INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # as transformers
_ZEROS = bytes(2**20)
_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
}


class TensorSpec(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    progress: ByteProgress,
    metadata: Mapping[str, str] | None = None,
    seen: Callable[[bytes | memoryview], object] | None = None,
) -> None:
    """Write `path` with `tensors`, which come in the order of `specs` and fit them.

    Args:
        seen: called with every part of the file, in order; a checksum's `update`.

    Of a tensor that is one 0, expanded, nothing is written: it is a hole in the file, which takes
    no room on the disk and reads as zeros.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    specs, end = list(specs), 0
    for spec in specs:
        offsets = [end, end + spec.num_bytes]
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
        end += spec.num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        parts = _Parts(file, seen)
        parts.add(len(encoded).to_bytes(8, "little") + encoded)
        for spec in specs:
            name, tensor = next(tensors)
            assert (name, tensor.dtype, tuple(tensor.shape)) == spec, (name, tensor, spec)
            if _is_one_zero(tensor):
                parts.add_hole(spec.num_bytes)
            else:
                parts.add(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress.add(spec.num_bytes)
        file.truncate()  # to here, where the last tensor may be a hole


class _Parts:
    """A file that grows, and whoever wants to see its bytes."""

    def __init__(
        self, file: BufferedWriter, seen: Callable[[bytes | memoryview], object] | None
    ) -> None:
        self._file, self._seen = file, seen

    def add(self, part: bytes | memoryview) -> None:
        self._file.write(part)
        if self._seen is not None:
            self._seen(part)

    def add_hole(self, num_bytes: int) -> None:
        self._file.seek(num_bytes, os.SEEK_CUR)
        if self._seen is not None:
            for start in range(0, num_bytes, len(_ZEROS)):
                self._seen(_ZEROS[: num_bytes - start])


def _is_one_zero(tensor: Tensor) -> bool:
    if tensor.numel() < 2 or any(tensor.stride()):
        return False
    one = tensor[(0,) * tensor.dim()].reshape(1)
    return not one.view(torch.uint8).any()


def write_sharded(
    directory: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write model.safetensors, or several files and their index as transformers names them.

    Returns the names of the files. Progress goes to stderr.
    """
    shards = _shards(specs, max_shard_bytes)
    total = sum(spec.num_bytes for shard in shards for spec in shard)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with ByteProgress(directory.name, total) as progress:
        for name, shard in zip(names, shards, strict=True):
            write_tensors(directory / name, shard, tensors, progress)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, s in zip(names, shards, strict=True) for spec in s}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return names


def _shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards
