"""One rank's part of a save: its state copied to host memory, then written, hashed and synced."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.checkpoint.format import key_of, views
from bitscale.engine.fragments import Fragment

_CHUNK_BYTES = 1 << 24
_DTYPE_NAMES = {torch.float32: "F32", torch.uint8: "U8"}  # safetensors'; widest first


class Snapshot(NamedTuple):
    """One rank's state at one step, in host memory that training does not touch."""

    tensors: dict[str, Tensor]  # by key, see `key_of`; contiguous, on the CPU
    adam_steps: dict[str, int]  # by parameter


@dataclass(frozen=True)
class Shard:
    """What one rank wrote, or the error that kept it (so that no rank waits for ever)."""

    name: str
    bytes: int = 0
    sha256: str = ""
    adam_steps: dict[str, int] = field(default_factory=dict)
    error: str = ""


def take_snapshot(fragments: Iterable[Fragment], rng_state: Tensor) -> Snapshot:
    """Copy what this rank saves: 12 bytes for each of its elements."""
    tensors = {"rng_state": rng_state.clone()}
    adam_steps = {}
    for fragment in fragments:
        adam_steps[fragment.name] = int(fragment.step)
        if fragment.saved_here:
            for kind, view in views(fragment).items():
                tensors[key_of(fragment, kind)] = view.detach().to("cpu", copy=True)
    return Snapshot(tensors, adam_steps)


def write_shard(path: Path, snapshot: Snapshot) -> Shard:
    """Write `snapshot` to `path`; it is durable when this returns a Shard without error."""
    try:
        num_bytes, digest = write_safetensors(path, snapshot.tensors)
    except OSError as error:
        return Shard(path.name, error=f"{path.name}: {error}")
    return Shard(path.name, num_bytes, digest, snapshot.adam_steps)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write fp32 and uint8 CPU tensors durably; returns (bytes, SHA-256 in hex).

    The same bytes as `safetensors.torch.save_file`, which cannot hash what it writes (the file
    would have to be read again) and creates files that only their owner can read.
    """
    widest_first = list(_DTYPE_NAMES)
    names = sorted(tensors, key=lambda name: (widest_first.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for part in itertools.chain([head], (_bytes(tensors[name]) for name in names)):
            for low in range(0, len(part), _CHUNK_BYTES):
                digest.update(part[low : low + _CHUNK_BYTES])
                file.write(part[low : low + _CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end, digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def give_ordinary_mode(path: Path) -> None:
    """safetensors creates files for their owner only; a team reads each other's checkpoints."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
