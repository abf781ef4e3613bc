"""What the cases of the Triton kernels share: device, inputs, comparison."""

import os
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DTYPES, EPS, INF, NAN, among_nans, assert_same, error
from torch import Tensor

from bitscale.quant.kernels import get_kernels, plain
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
