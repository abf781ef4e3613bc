"""What the cases of the Triton kernels share: device, inputs, comparison."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, EPS, INF, NAN, among_nans, assert_same, error
from torch import Tensor

from bitscale.quant.kernels import Kernels, get_kernels, plain
from bitscale.quant.reference import Int8Rows, Ternary

__all__ = [
    "DEVICE",
    "DTYPES",
    "EPS",
    "FLOAT32_MAX",
    "INF",
    "NAN",
    "TRITON",
    "among_nans",
    "assert_same",
    "error",
    "gaussian",
    "operands",
    "poisoned_outputs",
]

FLOAT32_MAX = torch.finfo(torch.float32).max
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TRITON = get_kernels("triton", DEVICE)


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on the CPU, of and to tensors on DEVICE.

    The specification runs there also where the kernels run on a GPU: there PyTorch divides by a
    number by multiplying with its reciprocal.
    """

    def moved(value: Any, device: str) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device, copy=True)
        if isinstance(value, tuple):
            parts = [moved(part, device) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    return lambda *args: moved(function(*(moved(arg, "cpu") for arg in args)), DEVICE)


def _weight_grad(*args: Any) -> Tensor:
    grad_FD, main_grad_FD = on_cpu(plain.KERNELS.weight_grad)(*args), args[3]
    return grad_FD if main_grad_FD is None else main_grad_FD.copy_(grad_FD)


REFERENCE = plain.KERNELS._replace(
    **{name: on_cpu(getattr(plain.KERNELS, name)) for name in Kernels._fields if name != "name"}
)._replace(weight_grad=_weight_grad)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, and the largest value of an integer dtype."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(3, device=DEVICE).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def operands(T: int, D: int, F: int, dtype: torch.dtype) -> tuple[Int8Rows, Ternary, Tensor]:
    x = plain.quantize_rows(gaussian(T, D, seed=1, dtype=dtype), EPS)
    weight = plain.ternarize(gaussian(F, D, seed=2, dtype=dtype), "absmean", EPS)
    return x, weight, gaussian(T, F, seed=3, dtype=dtype) * 0.1
