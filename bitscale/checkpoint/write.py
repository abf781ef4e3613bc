"""Writing a checkpoint: every rank its shard, then one rename."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitscale.checkpoint.directory import fsync, make_empty, publish
from bitscale.checkpoint.format import Meta, key_of, views
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh


def save(
    root: Path,
    meta: Meta,
    fragments: Iterable[Fragment],
    mesh: Mesh,
    *,
    rng_state: Tensor,
) -> Path:
    """Write `root/step-N` from every rank (a collective) and move `latest` to it.

    Returns its path. Raises CheckpointError on every rank if one rank could not write.
    """
    final = root / f"step-{meta.step:08d}"
    staging = root / f".{final.name}.partial"
    _on_main(mesh, final, lambda: make_empty(staging))
    name = f"state-{mesh.rank:05d}-of-{mesh.world_size:05d}.safetensors"
    shards = mesh.gather_objects(_write_shard(staging / name, fragments, rng_state))
    _refuse(final, [shard.error for shard in shards])
    adam_steps = {name: step for shard in shards for name, step in shard.adam_steps.items()}
    files = {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in shards}
    whole = replace(meta, adam_steps=adam_steps, files=files)
    _on_main(mesh, final, lambda: publish(staging, final, whole))
    return final


def _on_main(mesh: Mesh, final: Path, action: Callable[[], None]) -> None:
    """Rank 0 acts, all wait; what the file system refuses it is an error on every rank, since
    the others would wait for ever for a rank that has gone."""
    error = ""
    if mesh.is_main:
        try:
            action()
        except OSError as refusal:
            error = str(refusal)
    _refuse(final, mesh.gather_objects(error))


def _refuse(final: Path, errors: list[str]) -> None:
    for error in filter(None, errors):
        raise CheckpointError(
            f"{final}: not saved, {error}; the previous checkpoint remains in force: make room, "
            "or make the directory writable, and resume from it"
        )


@dataclass(frozen=True)
class _Shard:
    """What one rank wrote, or the error that kept it (so that no rank waits for ever)."""

    name: str
    bytes: int = 0
    sha256: str = ""
    adam_steps: dict[str, int] = field(default_factory=dict)
    error: str = ""


def _write_shard(path: Path, fragments: Iterable[Fragment], rng_state: Tensor) -> _Shard:
    tensors = {"rng_state": rng_state}
    adam_steps = {}
    for fragment in fragments:
        adam_steps[fragment.name] = int(fragment.step)
        if fragment.saved_here:
            for kind, view in views(fragment).items():
                # A copy: safetensors refuses views that share a storage.
                tensors[key_of(fragment, kind)] = view.detach().cpu().clone()
    try:
        save_file(tensors, path)
        give_ordinary_mode(path)
        fsync(path)
        return _Shard(path.name, path.stat().st_size, sha256(path), adam_steps)
    except (OSError, SafetensorError) as error:
        return _Shard(path.name, error=f"{path.name}: {error}")


def give_ordinary_mode(path: Path) -> None:
    """safetensors creates files for their owner only; a team reads each other's checkpoints."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
