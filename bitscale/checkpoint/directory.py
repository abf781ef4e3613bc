"""A run's `checkpoints/`: which one is in force, publication by rename, retention."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from bitscale.checkpoint.format import META_NAME, SUMS_NAME, Meta, sums_text, unreadable
from bitscale.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of that name counts; `superseded-...` and copies by hand do not."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    named = [path for path in root.glob("step-*") if is_checkpoint_name(path.name)]
    return sorted((path for path in named if (path / META_NAME).is_file()), key=_step_of)


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint in force, or None if there is none yet.

    A crash between the rename and the move of `latest` leaves `latest` one behind; both are
    whole, and the older one is then in force.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        whole = list_checkpoints(root)
        return whole[-1] if whole else None
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError as error:
        raise unreadable(pointer, error) from error
    remedy = (
        f"write the name of one of {[p.name for p in list_checkpoints(root)]} into it, or delete it"
    )
    if not _NAME.fullmatch(name):
        raise CheckpointError(
            f"{pointer} holds {name[:40]!a}, which is not a checkpoint's name; {remedy}"
        )
    if not (root / name / META_NAME).is_file():
        raise CheckpointError(f"{pointer} names {name!r}, which is missing or incomplete; {remedy}")
    return root / name


def resolve(path: Path) -> Path:
    """The checkpoint directory that a user means: a checkpoint, a run, or its checkpoints/."""
    if (path / META_NAME).is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = latest_checkpoint(root) if root.is_dir() else None
        if found is not None:
            return found
    raise CheckpointError(
        f"{path}: no checkpoint here; name a run directory, or a step-... directory with a "
        "meta.json in it"
    )


def prune(root: Path, keep_last: int, keep_every: int, keep_at: Collection[int] = ()) -> None:
    """Delete checkpoints beyond the last `keep_last`, but never multiples of `keep_every`, nor
    those of the steps `keep_at`."""
    for path in list_checkpoints(root)[:-keep_last]:
        step = _step_of(path)
        if not (keep_every and step % keep_every == 0) and step not in keep_at:
            # Renamed first: a kill in the middle leaves nothing that looks whole.
            doomed = root / f".{path.name}.deleted"
            path.rename(doomed)
            _remove(doomed)
    for kind in ("deleted", "partial"):  # what a kill during prune or save has left
        for leftover in root.glob(f".step-*.{kind}"):
            _remove(leftover)


def _remove(path: Path) -> None:
    """A checkpoint that was moved to another disk, and linked to, loses only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def rewind(root: Path, checkpoint: Path) -> list[Path]:
    """Make `checkpoint`, one of `root`'s, the one in force before a run continues from it.

    Later ones are of a history that is being rewritten: they are kept as `superseded-step-...`.
    Returns them. If `checkpoint` is another run's, which this one forked from, that is all of them.
    """
    checkpoints = list_checkpoints(root)
    if checkpoint.parent.resolve() == root.resolve():
        later = [path for path in checkpoints if _step_of(path) > _step_of(checkpoint)]
        _point_latest(root / checkpoint.name)
    else:
        later = checkpoints
        (root / "latest").unlink(missing_ok=True)
    for path in reversed(later):  # a kill on the way leaves the older ones, and the same way to go
        _supersede(path)
    return later


def make_empty(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def publish(staging: Path, final: Path, meta: Meta) -> None:
    """Make the durable shards in `staging` the checkpoint in force, `final`."""
    write_meta(staging, meta)
    fsync(staging)
    if final.exists():  # left by a crash between the rename and the move of `latest`
        _supersede(final)
    staging.rename(final)
    fsync(final.parent)
    fsync(final.parent.parent)  # which may not know of the first checkpoint's parent yet
    _point_latest(final)


def write_meta(directory: Path, meta: Meta) -> None:
    """Write meta.json, whose `files` are complete, and the checksums of all of them, durably."""
    content = json.dumps(asdict(meta), indent=1) + "\n"
    digests = {name: file["sha256"] for name, file in meta.files.items()}
    digests[META_NAME] = hashlib.sha256(content.encode()).hexdigest()
    for name, text in ((SUMS_NAME, sums_text(digests)), (META_NAME, content)):
        (directory / name).write_text(text, encoding="utf-8")
        fsync(directory / name)


def _point_latest(checkpoint: Path) -> None:
    pointer = checkpoint.parent / ".latest.partial"
    pointer.write_text(checkpoint.name + "\n")
    fsync(pointer)
    pointer.replace(checkpoint.parent / "latest")
    fsync(checkpoint.parent)


def _supersede(checkpoint: Path) -> None:
    """Keep `checkpoint` under a name that is never resumed from."""
    aside = checkpoint.with_name(f"superseded-{checkpoint.name}")
    if aside.is_dir():
        _remove(aside)
    checkpoint.rename(aside)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
