"""With what a run was made: commit, versions, machine."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import bitscale


def provenance() -> dict[str, Any]:
    """Plain values for done.json, taken when the sweep is started."""
    import importlib.metadata

    names = ("torch", "deepspeed", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {
        "commit": commit(),
        "versions": f"bitscale {bitscale.__version__}, python {platform.python_version()}, "
        f"{versions}; {platform.machine()}, {os.cpu_count()} cores",
        "sweep_started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Of the source tree that is imported ("-dirty" if changed), or the version of a wheel."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(bitscale.__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError:
        return f"v{bitscale.__version__}"
    return done.stdout.strip() or f"v{bitscale.__version__}"
