"""The file of `--json FILE`: refused before the work, which may take hours, and not after it."""

import json
import os
from pathlib import Path

from bitscale.errors import ConfigError


def refuse_unwritable(path: Path | None) -> None:
    """Raise ConfigError if no file can be written at `path`; None is no file."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--json {path} is a directory; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} must not be written by you; name another place")


def write_json(path: Path, tree: object) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
