"""No kernel touches what lies past the end of a tensor: guarded_memory.py, in its own processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import why_no_cpu_kernels

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(sys.platform != "linux", reason="mprotect by its Linux constants"),
]
PROGRAM = Path(__file__).with_name("guarded_memory.py")


def run(name: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", str(PROGRAM), name]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_kernels_stay_within_their_tensors(name: str) -> None:
    if name == "cpu" and (reason := why_no_cpu_kernels()):
        pytest.skip(reason)
    done = run(name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{name}: nothing past the end of a tensor\n"


def test_the_guard_notices_one_byte() -> None:
    done = run("overrun")
    assert done.stdout.startswith("still there: ")
    assert done.returncode == -signal.SIGSEGV
