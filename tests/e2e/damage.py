"""What is done to the newest checkpoint of a half run: the `damage` of `faults.refused_until`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import SHARD, Bench, half_checkpoint

from bitscale.checkpoint import Reader
from bitscale.checkpoint.write import write_safetensors


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0b100
    path.write_bytes(content)


def truncate(_: Bench, run_dir: Path) -> None:
    path = half_checkpoint(run_dir) / SHARD
    path.write_bytes(path.read_bytes()[:-4096])


def flip_value(_: Bench, run_dir: Path) -> None:
    _flip(half_checkpoint(run_dir) / SHARD, -20_000)


def flip_header(_: Bench, run_dir: Path) -> None:
    _flip(half_checkpoint(run_dir) / SHARD, 40)


def flip_meta(_: Bench, run_dir: Path) -> None:
    """A digit: 20 steps become 24, in JSON that still parses."""
    path = half_checkpoint(run_dir) / "meta.json"
    _flip(path, path.read_bytes().index(b'"step": 20') + len(b'"step": 2'))


def flip_sums(_: Bench, run_dir: Path) -> None:
    _flip(half_checkpoint(run_dir) / "SHA256SUMS", -30)


def remove(name: str) -> Callable[[Bench, Path], None]:
    return lambda _, run_dir: (half_checkpoint(run_dir) / name).unlink()


def halve_meta(_: Bench, run_dir: Path) -> None:
    path = half_checkpoint(run_dir) / "meta.json"
    path.write_bytes(path.read_bytes()[:700])


def foreign_shard(bench: Bench, run_dir: Path) -> None:
    """Of the same run's other step: same size, same keys, sound in itself."""
    shutil.copy(bench.half / "checkpoints/step-00000015" / SHARD, half_checkpoint(run_dir) / SHARD)


def newer_format(_: Bench, run_dir: Path) -> None:
    rewrite(half_checkpoint(run_dir), format="bitscale-checkpoint-9")


def latest(content: bytes) -> Callable[[Bench, Path], None]:
    return lambda _, run_dir: _discard((run_dir / "checkpoints" / "latest").write_bytes(content))


def _discard(_: object) -> None:
    return None


def nan_master(_: Bench, run_dir: Path) -> None:
    """In force, sound by every checksum, and useless."""
    path = half_checkpoint(run_dir)
    reader = Reader(path)
    handle = reader._handles[SHARD]
    tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    next(t for key, t in tensors.items() if "|master|" in key).view(-1)[3] = torch.nan
    num_bytes, digest = write_safetensors(path / SHARD, tensors)
    rewrite(path, files={SHARD: {"bytes": num_bytes, "sha256": digest}})


def rewrite(path: Path, **changes: Any) -> None:
    """As if it had been saved so: with the right checksums."""
    content = json.dumps(json.loads((path / "meta.json").read_text()) | changes)
    (path / "meta.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    (path / "SHA256SUMS").write_text(f"{digest}  meta.json\n")
