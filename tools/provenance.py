"""Where a measurement comes from: hardware, versions, commit, command and date."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def provenance(device: str, packages: Iterable[str]) -> dict[str, Any]:
    """For the JSON of a benchmark; `commit` ends in + if tracked files differ from it.

    Args:
        device: the hardware, in words.
        packages: those whose versions matter.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": git(["git", "rev-parse", "HEAD"]).stdout.strip() + ("+" if changed else ""),
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
