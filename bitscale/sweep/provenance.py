"""With what a run was made: commit, versions, machine."""

import datetime
import os
import platform
from typing import Any

import bitscale
from bitscale.source_commit import source_commit


def provenance() -> dict[str, Any]:
    """Plain values for done.json, taken when the sweep is started."""
    import importlib.metadata

    names = ("torch", "deepspeed", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {
        "commit": source_commit() or f"v{bitscale.__version__}",
        "versions": f"bitscale {bitscale.__version__}, python {platform.python_version()}, "
        f"{versions}; {platform.machine()}, {os.cpu_count()} cores",
        "sweep_started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
