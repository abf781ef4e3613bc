"""Kernels of the b158 quantizer, chosen by name: nothing falls back silently."""

import importlib
import logging
from functools import cache

from bitscale.errors import KernelUnavailable
from bitscale.quant.kernels import plain
from bitscale.quant.kernels.table import Kernels, Measure, NormedRows

__all__ = ["KERNEL_NAMES", "Kernels", "Measure", "NormedRows", "get_kernels"]

KERNEL_NAMES = ("auto", "reference", "triton")

_log = logging.getLogger(__name__)


@cache
def get_kernels(name: str, device_type: str) -> Kernels:
    """The table `name` for tensors on `device_type` ("cpu", "cuda"); `auto` logs what it took.

    Raises:
        KernelUnavailable: the name is unknown, or its kernels do not run on that device.
    """
    if name == "reference":
        return plain.KERNELS
    if name == "triton":
        reason = _why_no_triton(device_type)
        if reason is not None:
            raise KernelUnavailable(f"quant.kernel='triton' {reason}")
        return _triton_table()
    if name == "auto":
        return _choose(device_type)
    raise KernelUnavailable(
        f"quant.kernel={name!r} does not exist; use one of {', '.join(KERNEL_NAMES)}"
    )


def _choose(device_type: str) -> Kernels:
    reason = _why_no_triton(device_type)
    if reason is None:
        _log.info("quant.kernel='auto' on %s: triton", device_type)
        return _triton_table()
    _log.info("quant.kernel='auto' on %s: reference ('triton' %s)", device_type, reason)
    return plain.KERNELS


def _why_no_triton(device_type: str) -> str | None:
    """Reason and remedy, or None if Triton's kernels run on this device."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "needs the package triton >= 3.7; run `pip install triton`, or use 'reference'"
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        return (
            f"needs an NVIDIA GPU and the tensors are on {device_type!r}; use 'reference', or "
            "set TRITON_INTERPRET=1 to run the kernels slowly in Python"
        )
    return None


def _triton_table() -> Kernels:
    from bitscale.quant.kernels.triton_table import KERNELS

    return KERNELS
