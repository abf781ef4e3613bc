"""Reading a checkpoint: any flat range of any parameter, whoever wrote it."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitscale.checkpoint.format import read_meta, unreadable
from bitscale.checkpoint.source import StateSource
from bitscale.errors import CheckpointError
from bitscale.model.collectives import ParameterShard

_Part = tuple[int, int, int]  # dimension, start and end of a tensor-parallel part


class _Piece(NamedTuple):
    """A flat range of a parameter, or of a part of it, and where it is."""

    start: int
    numel: int
    file: str
    key: str
    part: _Part | None


class Reader(StateSource):
    """Reads flat ranges of any parameter's master or moments out of a checkpoint.

    Every file is verified against its checksum before its first byte is used, by this process or,
    `verify` (rank, ranks) being given, by one of the ranks that open the same checkpoint together.
    """

    def __init__(self, path: Path, *, verify: tuple[int, int] = (0, 1)) -> None:
        rank, num_ranks = verify
        self.path = path
        self.meta = read_meta(path)
        self._handles: dict[str, Any] = {}
        self._index: dict[tuple[str, str], list[_Piece]] = {}  # by parameter and kind
        self._whole: tuple[tuple[str, str], Tensor] | None = None  # the last one put together
        for index, name in enumerate(self.meta.files):
            self._open(name, verify=index % num_ranks == rank)

    def read(
        self, name: str, kind: str, start: int, numel: int, shard: ParameterShard | None = None
    ) -> Tensor:
        """fp32 [numel]: elements [start, start + numel) of parameter `name`, or of its `shard`.

        `kind` is "master", "exp_avg" or "exp_avg_sq".
        """
        wanted = None if shard is None else (shard.dim, shard.start, shard.end)
        pieces = self._index.get((name, kind), [])
        if not pieces or any(piece.part == wanted for piece in pieces):
            return self._read_flat(name, kind, wanted, start, numel)
        # Written by another number of tensor-parallel ranks.
        if self._whole is None or self._whole[0] != (name, kind):
            self._whole = ((name, kind), self._put_together(name, kind))
        whole = self._whole[1]
        return (whole if shard is None else shard.of(whole)).reshape(-1)[start : start + numel]

    def _put_together(self, name: str, kind: str) -> Tensor:
        shape = self.meta.shapes[name]
        whole = torch.empty(shape)
        num_rows = 0
        for part in sorted({piece.part for piece in self._index[name, kind]}, key=str):
            if part is None:
                return self._read_flat(name, kind, None, 0, whole.numel()).view(shape)
            dim, start, end = part
            place = whole.narrow(dim, start, end - start)
            flat = self._read_flat(name, kind, part, 0, place.numel())
            place.copy_(flat.view(place.shape))
            num_rows += end - start
            if num_rows == shape[dim]:
                return whole
        raise CheckpointError(
            f"{self.path}: {name} ({kind}) is not all there: parts of tensor-parallel ranks are "
            "missing; the checkpoint is incomplete: use another"
        )

    def _read_flat(
        self, name: str, kind: str, part: _Part | None, start: int, numel: int
    ) -> Tensor:
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for piece in self._index.get((name, kind), []):
            low = max(start, piece.start)
            high = min(start + numel, piece.start + piece.numel)
            if piece.part == part and low < high:
                values = self._handles[piece.file].get_slice(piece.key)
                out[low - start : high - start] = values[low - piece.start : high - piece.start]
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self.path}: {name} ({kind}) has {filled} of the {numel} elements wanted; "
                "the checkpoint is of another model or incomplete"
            )
        return out

    def rng_state(self, rank: int) -> Tensor | None:
        """The CPU generator state that `rank` saved; None if there was no such rank."""
        name = f"state-{rank:05d}-of-{self.meta.world_size:05d}.safetensors"
        return self._handles[name].get_tensor("rng_state") if name in self._handles else None

    def _open(self, name: str, *, verify: bool) -> None:
        path, expected = self.path / name, self.meta.files[name]
        try:
            _check_file(path, expected["bytes"], expected["sha256"] if verify else None)
            handle = safe_open(path, framework="pt")
        except OSError as error:
            raise unreadable(path, error) from error
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a safetensors file ({error}); use another checkpoint"
            ) from error
        self._handles[name] = handle
        for key in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
            if "|" in key:
                parameter, kind, start, *rest = key.split("|")
                numel = handle.get_slice(key).get_shape()[0]  # type: ignore[no-untyped-call]
                part = cast(_Part, tuple(map(int, rest[0].split(":")))) if rest else None
                piece = _Piece(int(start), numel, name, key, part)
                self._index.setdefault((parameter, kind), []).append(piece)


def _check_file(path: Path, num_bytes: int, sha256: str | None) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though meta.json lists it; use another checkpoint")
    if path.stat().st_size != num_bytes:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes instead of {num_bytes}; truncated or foreign: "
            "use another checkpoint"
        )
    if sha256 is None:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise CheckpointError(
                f"{path}: checksum differs from meta.json; damaged or foreign: use another "
                "checkpoint"
            )
