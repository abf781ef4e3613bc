"""Outputs that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bitscale.errors import CheckpointError


@contextmanager
def new_path(out: Path) -> Iterator[Path]:
    """A name beside `out` to write a file or directory at, which is renamed to `out` at the end.

    Raises CheckpointError if `out` exists or cannot be written; whatever is raised inside, nothing
    of either name is left.
    """
    refuse_existing(out)
    staging = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        yield staging
        _sync(staging)
        staging.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: not written: {error}") from error
    finally:
        if staging.exists():
            _remove(staging)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """`new_path`, made as a directory."""
    with new_path(out) as staging:
        staging.mkdir()
        yield staging


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError if there is something at `out` already."""
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} already exists; choose another name or remove it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make `path`, and what is in it, durable before it gets its name."""
    for item in [*(path.rglob("*") if path.is_dir() else ()), path]:
        descriptor = os.open(item, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
