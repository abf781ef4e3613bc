"""torch's distributed checkpoints (`torch.distributed.checkpoint`, Megatron's `torch_dist`).

    .metadata          a pickle: shape and dtype of every tensor, its chunks, and where they are
    __R_W.distcp       chunks one after the other, each as torch.save writes it

Chunks are read one at a time; no process group, no megatron-core.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitscale.errors import CheckpointError
from bitscale.sources.pickles import load_metadata, load_tensors

Shape = tuple[int, ...]


class TorchDist:
    """The tensors of a checkpoint directory, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = load_metadata(path / ".metadata")
        tensors = metadata.state_dict_metadata
        self._tensors = {key: t for key, t in tensors.items() if hasattr(t, "chunks")}
        self._places = {(i.fqn, tuple(i.offset or ())): p for i, p in metadata.storage_data.items()}
        self.shapes: dict[str, Shape] = {k: tuple(t.size) for k, t in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        found: torch.dtype = self._tensors[key].properties.dtype
        return found

    def read(self, key: str, row: int | None = None) -> Tensor:
        """The whole tensor, or row `row` of its first dimension, put together from its chunks."""
        shape = self.shapes[key]
        out = torch.empty(shape if row is None else (1, *shape[1:]), dtype=self.dtype(key))
        filled = 0
        for chunk in self._tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if row is not None and not offsets[0] <= row < offsets[0] + sizes[0]:
                continue
            values = self._chunk(key, offsets, sizes)
            if row is not None:
                values, offsets = values[row - offsets[0]][None], (0, *offsets[1:])
            place = out
            for dim, (offset, size) in enumerate(zip(offsets, values.shape, strict=True)):
                place = place.narrow(dim, offset, size)
            place.copy_(values)
            filled += values.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.path}: {key} has {filled} of {out.numel()} elements; the checkpoint is "
                "incomplete: use another"
            )
        return out if row is None else out[0]

    def _chunk(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        place = self._places.get((key, offsets)) or self._places.get((key, ()))
        if place is None:
            raise CheckpointError(
                f"{self.path}/.metadata: does not say where {key} is; use another checkpoint"
            )
        file = self._file(place)
        with file.open("rb") as stream:
            stream.seek(place.offset)
            data = io.BytesIO(stream.read(place.length))
        values = load_tensors(data, file)
        if not isinstance(values, Tensor) or tuple(values.shape) != sizes:
            raise CheckpointError(
                f"{file}: the chunk of {key} at {list(offsets)} is not a tensor of shape "
                f"{list(sizes)}; damaged: use another checkpoint"
            )
        return values

    def _file(self, place: Any) -> Path:
        name = str(place.relative_path)
        if Path(name).name != name:
            raise CheckpointError(f"{self.path}/.metadata: names {name!r}, outside the checkpoint")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.path}/{name}: compressed ({place.transform_descriptors}); save without "
                "extensions of torch.distributed.checkpoint"
            )
        file = self.path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; use a complete checkpoint")
        if file.stat().st_size < place.offset + place.length:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, too few for what .metadata says is in it; "
                "truncated: use another checkpoint"
            )
        return file
