"""Choice of kernels by name, and the Triton kernels' cases, run in Triton's interpreter.

The interpreter is chosen when triton is imported, so the cases (`triton_*_cases.py`) run in a
process of their own.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitscale.errors import KernelUnavailable
from bitscale.quant import kernels
from bitscale.quant.kernels import get_kernels, plain

pytestmark = pytest.mark.unit

CASES = sorted(Path(__file__).parent.glob("triton_*_cases.py"))
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux only")


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    """What an earlier test chose is forgotten, and what these choose too."""
    get_kernels.cache_clear()
    yield
    get_kernels.cache_clear()


@on_linux
def test_cases_pass_in_the_interpreter() -> None:
    env = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, "-m", "pytest", *map(str, CASES), "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d\d+ passed", done.stdout, re.MULTILINE), done.stdout[-2000:]


def test_reference_runs_anywhere() -> None:
    assert get_kernels("reference", "cpu") is plain.KERNELS
    assert get_kernels("reference", "cuda") is plain.KERNELS


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='cutlass' does not exist; use one of auto, reference, cpu, triton$",
    ):
        get_kernels("cutlass", "cuda")


@on_linux
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="then it does run on a CPU")
def test_triton_needs_a_gpu() -> None:
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='triton' needs an NVIDIA GPU and the tensors are on 'cpu'; use "
        r"'reference', or set TRITON_INTERPRET=1 to run the kernels slowly in Python$",
    ):
        get_kernels("triton", "cpu")


@on_linux
def test_auto_takes_triton_on_a_gpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, kernels.__name__):
        first, second = get_kernels("auto", "cuda"), get_kernels("auto", "cuda")
    assert first is second
    assert first.name == "triton"
    assert caplog.messages == ["quant.kernel='auto' on cuda: triton"]


def test_auto_on_another_device_takes_the_reference_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, kernels.__name__):
        assert get_kernels("auto", "mps") is plain.KERNELS
        get_kernels("auto", "mps")
    (message,) = caplog.messages
    assert message.startswith("quant.kernel='auto' on mps: reference (quant.kernel='triton' ")


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ImportError
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='triton' needs the package triton >= 3.7; run `pip install triton`, "
        r"or use 'reference'$",
    ):
        get_kernels("triton", "cuda")
    with caplog.at_level(logging.INFO, kernels.__name__):
        assert get_kernels("auto", "cuda") is plain.KERNELS
    assert "needs the package triton" in caplog.text
