"""Kernels of the b158 quantizer, chosen by name: nothing falls back silently."""

import importlib
import logging
from functools import cache

from bitscale.errors import KernelUnavailable
from bitscale.quant.kernels import plain
from bitscale.quant.kernels.table import Kernels, Measure, NormedRows

__all__ = ["KERNEL_NAMES", "Kernels", "Measure", "NormedRows", "get_kernels", "log_specification"]

KERNEL_NAMES = ("auto", "reference", "cpu", "triton")

_log = logging.getLogger(__name__)


@cache
def get_kernels(name: str, device_type: str) -> Kernels:
    """The table `name` for tensors on `device_type` ("cpu", "cuda"); `auto` logs what it took.

    Raises:
        KernelUnavailable: the name is unknown, or its kernels do not run on that device.
    """
    if name == "reference":
        return plain.KERNELS
    if name == "cpu":
        return _cpu_table(device_type)
    if name == "triton":
        reason = _why_no_triton(device_type)
        if reason is not None:
            raise KernelUnavailable(reason)
        return _triton_table()
    if name == "auto":
        return _choose(device_type)
    raise KernelUnavailable(
        f"quant.kernel={name!r} does not exist; use one of {', '.join(KERNEL_NAMES)}"
    )


@cache
def log_specification(what: str) -> None:
    """Tell, once, that `auto` leaves layers with `what` to plain PyTorch."""
    _log.info(
        "quant.kernel='auto': plain PyTorch computes layers with %s; kernels know b158 and "
        "absmedian with one matrix a weight",
        what,
    )


def _choose(device_type: str) -> Kernels:
    if device_type == "cpu":
        name, reason = "cpu", _why_no_cpu(device_type)
    else:
        name, reason = "triton", _why_no_triton(device_type)
    if reason is None:
        _log.info("quant.kernel='auto' on %s: %s", device_type, name)
        return get_kernels(name, device_type)
    _log.info("quant.kernel='auto' on %s: reference (%s)", device_type, reason)
    return plain.KERNELS


def _why_no_cpu(device_type: str) -> str | None:
    """Reason and remedy, or None if the CPU's kernels run here (they are compiled for it)."""
    try:
        _cpu_table(device_type)
    except KernelUnavailable as error:
        return str(error)
    return None


def _cpu_table(device_type: str) -> Kernels:
    if device_type != "cpu":
        raise KernelUnavailable(
            f"quant.kernel='cpu' runs on a CPU and the tensors are on {device_type!r}; use 'auto', "
            "'triton' or 'reference'"
        )
    from bitscale.quant.kernels import cpu_library
    from bitscale.quant.kernels.cpu_table import KERNELS

    cpu_library.load()
    return KERNELS


def _why_no_triton(device_type: str) -> str | None:
    """Reason and remedy, or None if Triton's kernels run on this device."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return (
            "quant.kernel='triton' needs the package triton >= 3.7; run `pip install triton`, or "
            "use 'reference'"
        )
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return (
            f"quant.kernel='triton' needs an NVIDIA GPU and the tensors are on {device_type!r}; "
            "use 'reference', or set TRITON_INTERPRET=1 to run the kernels slowly in Python"
        )
    return None


def _triton_table() -> Kernels:
    from bitscale.quant.kernels.triton_table import KERNELS

    return KERNELS
