"""Which commit of bitscale runs, for provenance."""

import shutil
import subprocess
from pathlib import Path

_SECONDS = 20.0


def source_commit() -> str:
    """Of the checkout that is imported, 12 digits, "+" if a tracked file differs from it; empty for
    an installed package, whatever repository its environment lies in."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    head = _output(root, "rev-parse", "--short=12", "HEAD")
    changed = _output(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head


def _output(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
