"""Building the CPU's kernels and choosing them, and the errors of both."""

import logging
import re
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import EPS, NEEDS_CPU_KERNELS

from bitscale.errors import KernelUnavailable
from bitscale.quant import kernels
from bitscale.quant.kernels import cpu_library, get_kernels, plain

pytestmark = [pytest.mark.unit, NEEDS_CPU_KERNELS]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was loaded is forgotten before and after."""
    for function in (get_kernels, cpu_library.load):
        function.cache_clear()
    yield
    for function in (get_kernels, cpu_library.load):
        function.cache_clear()


@pytest.fixture
def fresh(forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "bitscale"


def fake_compiler(directory: Path, body: str) -> Path:
    path = directory / "fakecc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_library_is_compiled_by_ranks_that_start_together(fresh: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cpu_library._build(), range(2))
    assert first == second
    assert list(fresh.iterdir()) == [first]  # no temporary file
    assert re.fullmatch(r"cpu-[0-9a-f]{16}\.so", first.name)
    before = first.stat().st_mtime_ns
    assert get_kernels("cpu", "cpu").name == "cpu"
    assert first.stat().st_mtime_ns == before


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    reason = "quant.kernel='cpu' needs a C compiler; install gcc or clang, or use 'reference'"
    with pytest.raises(KernelUnavailable, match=f"^{re.escape(reason)}$"):
        get_kernels("cpu", "cpu")
    with caplog.at_level(logging.INFO, kernels.__name__):
        assert get_kernels("auto", "cpu") is plain.KERNELS
        get_kernels("auto", "cpu")
    assert caplog.messages == [f"quant.kernel='auto' on cpu: reference ({reason})"]
    monkeypatch.setenv("CC", "nowhere-cc -m64")
    with pytest.raises(KernelUnavailable, match=r"needs \$CC='nowhere-cc', which is not there; "):
        get_kernels("cpu", "cpu")


def test_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = fake_compiler(
        tmp_path, "echo 'note: so' >&2; echo 'x.c:1:1: error: no memory' >&2; exit 1"
    )
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='cpu': .*/fakecc could not compile its C files \(x.c:1:1: error: no "
        r"memory\); set CC to another compiler, or use 'reference'$",
    ):
        get_kernels("cpu", "cpu")
    assert list(fresh.iterdir()) == []


def test_cache_that_cannot_be_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='cpu' cannot write its library to .*/file/bitscale \(Not a directory"
        r"\); set XDG_CACHE_HOME to a directory that can be written, or use 'reference'$",
    ):
        get_kernels("cpu", "cpu")


def test_tensors_elsewhere_and_of_other_dtypes(cpu: kernels.Kernels) -> None:
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='cpu' runs on a CPU and the tensors are on 'cuda'; use 'auto', "
        r"'triton' or 'reference'$",
    ):
        get_kernels("cpu", "cuda")
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='cpu' reads float32, bfloat16 and float16 and a tensor is "
        r"torch.float64; convert it, or use 'reference'$",
    ):
        cpu.quantize_rows(torch.zeros(2, 3, dtype=torch.float64), EPS)


def test_processor_whose_int8_products_saturate(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b).clamp(max=2**15 - 1))
    with pytest.raises(KernelUnavailable, match=r"this processor's saturate .*; use 'reference'$"):
        get_kernels("cpu", "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_are_those_of_torch(cpu: kernels.Kernels) -> None:
    """The library names no OpenMP runtime of its own, and calls the one beside torch."""
    assert not re.search(rb"lib[gi]?omp|GOMP", cpu_library._build().read_bytes())
    address = cpu_library._parallel()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < end:
            assert Path(line.split()[-1]).parent == Path(torch.__file__).with_name("lib")
            return
    pytest.fail(f"no library holds the address {address:#x}")


def test_auto_takes_the_compiled_kernels_and_says_so_once(
    forgotten: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, kernels.__name__):
        first, second = get_kernels("auto", "cpu"), get_kernels("auto", "cpu")
    assert first is second
    assert first.name == "cpu"
    assert caplog.messages == ["quant.kernel='auto' on cpu: cpu"]


def test_a_tensor_of_another_device_is_not_read() -> None:
    """A model that was moved to a GPU with kernels of the CPU: its addresses would be followed."""
    with pytest.raises(KernelUnavailable, match=r"a tensor is on 'meta'; .*set_kernels\)$"):
        cpu_library.matrix(torch.empty(2, 3, device="meta"))
