"""Compiles cpu_*.c when they are first needed, loads them, and launches their kernels.

The library lies in $XDG_CACHE_HOME/bitscale (~/.cache/bitscale), under a name made from all that
it depends on: source, flags, compiler, processor.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitscale.errors import KernelUnavailable

_HEADER, *_SOURCES = (
    Path(__file__).with_name(name) for name in ("cpu.h", "cpu_rows.c", "cpu_gemm.c", "cpu_pack.c")
)
# No -ffast-math and no contraction to fused multiply-add: cpu.h says why.
_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-shared",
)  # fmt: skip
_COMPILERS = ("cc", "gcc", "clang")
_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Mirrors the C files.
WEIGHTS_PER_BLOCK, TILE, STRIPE, BINS = 16384, 2048, 64, 65536
_TILE_ROWS, TILE_COLUMNS, _DEPTH, BLOCK_ROWS = 12, 32, 512, 96
MULTIPLY_SCRATCH = _TILE_ROWS * TILE_COLUMNS + BLOCK_ROWS * _DEPTH
_HUGE_PAGE = 2 * 2**20
_ADVISED_BYTES = 2 * _HUGE_PAGE
_BLOCKS_PER_THREAD = 8  # so that a thread that started late does not hold up the others


class Matrix(ctypes.Structure):
    """Mirrors `Matrix` of cpu.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class Launch(ctypes.Structure):
    """Mirrors `Launch` of cpu.h, field by field."""

    _fields_ = (
        *((name, Matrix) for name in ("in", "other", "out")),
        *((name, ctypes.c_void_p) for name in ("vector", "codes")),
        *((name, ctypes.c_int64) for name in ("codes_stride", "plane_stride")),
        *((name, ctypes.c_void_p) for name in ("sums", "row_scale", "scale", "rstd", "partial")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "first", "width", "planes")),
        *((name, ctypes.c_int64) for name in ("normed_dtype", "flag")),
        *((name, ctypes.c_float) for name in ("eps", "norm_eps", "strength")),
    )


def matrix(t: Tensor) -> Matrix:
    """A matrix (or vector, as one row) whose rows are contiguous; fp32, bf16 or fp16."""
    if t.device.type != "cpu":  # its address means nothing here
        raise KernelUnavailable(
            f"quant.kernel='cpu' runs on a CPU and a tensor is on {t.device.type!r}; give the "
            "model kernels of that device (bitscale.model.bitlinear.set_kernels)"
        )
    assert t.stride(-1) == 1 or t.shape[-1] <= 1
    return Matrix(t.data_ptr(), t.stride(0) if t.dim() > 1 else 0, dtype_number(t.dtype))


def dtype_number(dtype: torch.dtype) -> int:
    """cpu.h's name of a dtype. Raises KernelUnavailable if it has none."""
    number = _DTYPE.get(dtype)
    if number is None:
        raise KernelUnavailable(
            f"quant.kernel='cpu' reads float32, bfloat16 and float16 and a tensor is {dtype}; "
            "convert it, or use 'reference'"
        )
    return number


def rows_of(x_TD: Tensor) -> Tensor:
    """[T, D] with leading dimensions flattened and stride 1 within a row; copies if it must."""
    x_TD = x_TD.detach()
    x_TD = x_TD[None] if x_TD.dim() == 1 else x_TD.flatten(0, -2)
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized result, in huge pages where the system has them.

    A large allocation is fresh memory each time: handing it out in pages of 4 KiB takes longer
    than the product that fills it.
    """
    t = torch.empty(shape, dtype=dtype)
    if t.nbytes >= _ADVISED_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-t.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (t.data_ptr() + t.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # It is advice: the kernel may decline.
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)
    return t


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def launch(
    kernel: str, blocks: int, scratch: int, **fields: Tensor | Matrix | int | float | None
) -> None:
    """Runs a kernel of the C files for each of `blocks`, with `scratch` floats for each thread.

    `fields` fill the launch; a tensor gives its address. Waits for the end.
    """
    if not blocks:
        return
    library = load()
    # `fields` keeps every tensor alive until the call returns.
    filled = Launch()
    for name, value in fields.items():
        setattr(filled, name, value.data_ptr() if isinstance(value, Tensor) else value)
    threads = torch.get_num_threads()
    grain = max(1, blocks // (threads * _BLOCKS_PER_THREAD))
    failed = library.launch(
        getattr(library, kernel), ctypes.byref(filled), blocks, grain, scratch, _parallel(), threads
    )
    if failed:
        raise MemoryError(f"{4 * scratch} bytes a thread for the kernel {kernel}")


@cache
def load() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        KernelUnavailable: no compiler, or it failed; no directory to write to; torch without
            GNU's OpenMP interface; a processor or torch whose int8 products are not exact.
    """
    library = ctypes.CDLL(str(_build()))
    library.size_of_launch.restype = ctypes.c_int64
    assert library.size_of_launch() == ctypes.sizeof(Launch), "cpu.h and Launch differ"
    library.launch.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_int,
    )  # fmt: skip
    library.launch.restype = ctypes.c_int
    _parallel()
    _check_integer_product()
    return library


@cache
def multiplies_fp32() -> bool:
    """Whether fp32 is multiplied by cpu_gemm.c and not by torch's library.

    Torch's is MKL, which runs its AVX2 kernels where the processor is not Intel's.
    """
    return bool(load().multiplies_fp32()) and "GenuineIntel" not in _processor()


def _build() -> Path:
    """The path of the library, compiled unless an earlier process did."""
    compiler = _find_compiler()
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitscale"
    path = directory / f"cpu-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A name of its own, then a rename: ranks that start together do not disturb one another.
        handle, name = tempfile.mkstemp(dir=directory, suffix=".tmp")
    except OSError as error:
        raise KernelUnavailable(
            f"quant.kernel='cpu' cannot write its library to {directory} ({error.strerror}); set "
            "XDG_CACHE_HOME to a directory that can be written, or use 'reference'"
        ) from error
    os.close(handle)
    try:
        _compile(compiler, Path(name))
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _find_compiler() -> list[str]:
    """$CC (which may have options), else the first of cc, gcc and clang."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        program = shutil.which(command[0])
        if program:
            return [program, *command[1:]]
    missing = f"$CC={chosen[0]!r}, which is not there" if chosen else "a C compiler"
    raise KernelUnavailable(
        f"quant.kernel='cpu' needs {missing}; install gcc or clang, or use 'reference'"
    )


def _compile(compiler: Sequence[str], path: Path) -> None:
    command = [*compiler, *_FLAGS, "-o", str(path), *map(str, _SOURCES), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        reason = (lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
        raise KernelUnavailable(
            f"quant.kernel='cpu': {compiler[0]} could not compile its C files ({reason.strip()}); "
            "set CC to another compiler, or use 'reference'"
        )


def _fingerprint(compiler: Sequence[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    sources = [path.read_text() for path in (_HEADER, *_SOURCES)]
    parts = (*sources, *_FLAGS, *compiler, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


@cache
def _parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself runs on.

    GNU's runtime and LLVM's and Intel's all offer it. A second runtime would start threads of its
    own, which would fight with torch's for the cores.
    """
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    try:
        # Looked up in the library and all that it is linked with.
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value or 0
    except AttributeError as error:
        raise KernelUnavailable(
            "quant.kernel='cpu' finds no OpenMP runtime with GOMP_parallel in this torch; install "
            "a build with OpenMP, or use 'reference'"
        ) from error


def _check_integer_product() -> None:
    """Without VNNI, oneDNN adds pairs of products in 16 bits, which saturates."""
    extremes = torch.tensor([[-128, -128], [127, 127], [-128, 127]], dtype=torch.int8)
    extremes = extremes.repeat(32, 64)
    sums = torch._int_mm(extremes, extremes.T)
    if not torch.equal(sums.long(), extremes.long() @ extremes.long().T):
        raise KernelUnavailable(
            "quant.kernel='cpu' needs exact int8 products and this processor's saturate (it has "
            "no VNNI); use 'reference'"
        )
