"""A run's `checkpoints/`: which one is in force, publication by rename, retention."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from bitscale.checkpoint.format import Meta
from bitscale.errors import CheckpointError


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if (path / "meta.json").is_file())


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint in force, or None if there is none yet.

    A crash between the rename and the move of `latest` leaves `latest` one behind; both are
    whole, and the older one is then in force.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        whole = list_checkpoints(root)
        return whole[-1] if whole else None
    path = root / pointer.read_text().strip()
    if not (path / "meta.json").is_file():
        raise CheckpointError(
            f"{pointer} names {path.name!r}, which is missing or incomplete; write the name of "
            f"one of {[p.name for p in list_checkpoints(root)]} into it, or delete it"
        )
    return path


def resolve(path: Path) -> Path:
    """The checkpoint directory that a user means: a checkpoint, a run, or its checkpoints/."""
    if (path / "meta.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = latest_checkpoint(root) if root.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; name a run directory, or a step-... directory with a "
        "meta.json in it"
    )


def prune(root: Path, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints beyond the last `keep_last`, but never multiples of `keep_every`."""
    for path in list_checkpoints(root)[:-keep_last]:
        if not (keep_every and _step_of(path) % keep_every == 0):
            # Renamed first: a kill in the middle leaves nothing that looks whole.
            doomed = root / f".{path.name}.deleted"
            path.rename(doomed)
            shutil.rmtree(doomed)
    for kind in ("deleted", "partial"):  # what a kill during prune or save has left
        for leftover in root.glob(f".step-*.{kind}"):
            shutil.rmtree(leftover)


def rewind(root: Path, checkpoint: Path) -> list[Path]:
    """Make `checkpoint`, one of `root`'s, the one in force before a run continues from it.

    Later ones are of a history that is being rewritten: they are kept as `superseded-step-...`.
    Returns them.
    """
    later = [path for path in list_checkpoints(root) if path.name > checkpoint.name]
    _point_latest(checkpoint)
    for path in later:
        _supersede(path)
    return later


def make_empty(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def publish(staging: Path, final: Path, meta: Meta) -> None:
    meta_file = staging / "meta.json"
    meta_file.write_text(json.dumps(asdict(meta), indent=1) + "\n")
    fsync(meta_file)
    fsync(staging)
    if final.exists():  # left by a crash between the rename and the move of `latest`
        _supersede(final)
    staging.rename(final)
    fsync(final.parent)
    _point_latest(final)


def _point_latest(checkpoint: Path) -> None:
    pointer = checkpoint.parent / ".latest.partial"
    pointer.write_text(checkpoint.name + "\n")
    fsync(pointer)
    pointer.replace(checkpoint.parent / "latest")
    fsync(checkpoint.parent)


def _supersede(checkpoint: Path) -> None:
    """Keep `checkpoint` under a name that is never resumed from."""
    aside = checkpoint.with_name(f"superseded-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
