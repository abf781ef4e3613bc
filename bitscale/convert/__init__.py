"""Models in and out of other forms, one file a format."""

from pathlib import Path

from bitscale.checkpoint import resolve
from bitscale.convert.loaded import LoadedModel, load_checkpoint
from bitscale.convert.packed import export_packed, is_packed, load_packed


def load_model(path: Path) -> LoadedModel:
    """The model that `path` holds: a packed export, a checkpoint, or a run's latest one."""
    return load_packed(path) if is_packed(path) else load_checkpoint(resolve(path))


__all__ = ["LoadedModel", "export_packed", "load_checkpoint", "load_model", "load_packed"]
