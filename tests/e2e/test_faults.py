"""The faults that protect code, by the tool that injects them all: docs/results/faults.md."""

import subprocess
import sys
from pathlib import Path

import pytest

from runs import environment

pytestmark = pytest.mark.e2e

TOOL = Path(__file__).parents[2] / "tools" / "inject_faults.py"


def test_quick_faults() -> None:
    """SIGKILL at every point of a save in the background, signals and errors in it, damage,
    two runs, a jumping clock, links. A process of its own: sessions are forked from it."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--quick"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "22 faults, 0 not as they must be" in done.stdout, done.stdout
