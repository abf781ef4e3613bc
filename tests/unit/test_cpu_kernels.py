"""The CPU's kernels against their plain twins and against float64; building their library.

Shapes: T tokens, D inputs, F outputs.
"""

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    DTYPES,
    EPS,
    HARD_ROWS,
    HARD_WEIGHTS,
    INF,
    MEASURES,
    NAN,
    SHAPES,
    among_nans,
    assert_same,
    error,
    gaussian,
)
from torch import Tensor

from bitscale.errors import KernelUnavailable
from bitscale.quant import kernels
from bitscale.quant.kernels import cpu_library, get_kernels, plain, plain_backward
from bitscale.quant.kernels.linear import rms_norm_rows, ternary_linear
from bitscale.quant.kernels.table import GradientBits, Measure
from bitscale.quant.reference import Int8Rows, Ternary

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(
        not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here"
    ),
]

BITS = [8, 16, 24]


@pytest.fixture(scope="module")
def cpu() -> kernels.Kernels:
    return get_kernels("cpu", "cpu")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, and the largest value of an integer dtype."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- Weights ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", HARD_WEIGHTS)
def test_ternary_codes_and_scale(
    cpu: kernels.Kernels, name: str, measure: Measure, dtype: torch.dtype
) -> None:
    w = HARD_WEIGHTS[name].to(dtype)
    w = w if w.dim() == 2 else w.flatten(1)
    got, want = cpu.ternarize(w, measure, EPS), plain.ternarize(w, measure, EPS)
    assert_same(got.codes_FD, want.codes_FD)
    assert_same(got.scale, want.scale)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1 + 2e-8, 1e-30, 1.3e-38, 4e-42, 3e-45, 1e38])
def test_codes_beside_ties_need_no_division(cpu: kernels.Kernels, scale: float) -> None:
    """Weights a few ulp around ± scale / 2; eps is the scale, as all are smaller."""
    half = torch.tensor(scale) / 2
    near = (half.view(torch.int32) + torch.arange(-4, 5)).clamp(min=0).int().view(torch.float32)
    w_FD = torch.cat([near, -near, torch.zeros(100)])[None]
    got, want = cpu.ternarize(w_FD, "absmean", scale), plain.ternarize(w_FD, "absmean", scale)
    assert float(got.scale) == float(torch.tensor(scale))
    assert_same(got.codes_FD, want.codes_FD)
    assert {-1, 0, 1} == set(got.codes_FD.flatten().tolist())


@pytest.mark.parametrize("measure", MEASURES)
def test_large_weights(cpu: kernels.Kernels, threads: int, measure: Measure) -> None:
    """Several blocks, on one thread as on two; a scale that must not drift."""
    w_FD = gaussian(301, 400) * torch.linspace(0.01, 3, 400)
    w_FD[0, 0] = 3e4
    for w in (w_FD, w_FD.bfloat16(), torch.full_like(w_FD, 0.1), w_FD.T, w_FD[::3, 5:41]):
        got, want = cpu.ternarize(w, measure, EPS), plain.ternarize(w, measure, EPS)
        assert_same(got.codes_FD, want.codes_FD)
        assert_same(got.scale, want.scale)


# --- Activations ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD_ROWS)
def test_rows_of_hard_values(cpu: kernels.Kernels, name: str, dtype: torch.dtype) -> None:
    x_TD = HARD_ROWS[name].to(dtype)
    got, want = cpu.quantize_rows(x_TD, EPS), plain.quantize_rows(x_TD, EPS)
    assert_same(got.codes_TD, want.codes_TD)
    assert_same(got.scale_T1, want.scale_T1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 63, 64, 65, 511, 1000, 2048])
def test_rows_of_any_width_and_layout(cpu: kernels.Kernels, D: int, dtype: torch.dtype) -> None:
    x_TD = gaussian(9, D, seed=D, dtype=dtype)
    for x in (among_nans(x_TD), x_TD[::2], x_TD.view(3, 3, D), x_TD.T, x_TD[0]):
        got, want = cpu.quantize_rows(x, EPS), plain.quantize_rows(x, EPS)
        assert_same(got.codes_TD, want.codes_TD)
        assert_same(got.scale_T1, want.scale_T1)


def test_tiny_eps_lets_denormal_scales_through(cpu: kernels.Kernels) -> None:
    x_TD = torch.tensor([[1e-43, -2e-44, 0.0], [1e-45, 0.0, 0.0]])
    got, want = cpu.quantize_rows(x_TD, 1e-45), plain.quantize_rows(x_TD, 1e-45)
    assert_same(got.codes_TD, want.codes_TD)
    assert_same(got.scale_T1, want.scale_T1)


def test_every_fp16_and_bf16_number(cpu: kernels.Kernels) -> None:
    """Read by a blend of λ → 0 and written again: all 65,536 patterns of both."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x_TD = patterns.view(dtype).view(-1, 1)
        assert_same(cpu.blend_rows(x_TD, EPS, 1e-30), plain.blend_rows(x_TD, EPS, 1e-30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_half_to_even(cpu: kernels.Kernels, dtype: torch.dtype) -> None:
    """Products with steps between, on and beside what the dtype holds, up to infinity."""
    codes = torch.arange(-128, 128, dtype=torch.int8)[:, None]
    for exponent in range(-160, 130, 3):
        x = Int8Rows(codes, torch.linspace(1, 2, 256)[:, None] * 2.0 ** (exponent // 2))
        weight = Ternary(torch.ones(1, 1).to(torch.int8), torch.tensor(2.0 ** (exponent // 2)))
        got = cpu.integer_linear(x, weight, None, dtype)
        assert_same(got, plain.integer_linear(x, weight, None, dtype))


@pytest.mark.parametrize("weighted", [None, "same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [(9, 1), (9, 65), (300, 1000), (1, 40_000), (2, 33_000)])
def test_norm_and_codes(
    cpu: kernels.Kernels, T: int, D: int, dtype: torch.dtype, weighted: str | None
) -> None:
    x_TD = gaussian(T, D, seed=1, dtype=dtype) * 3
    weight_D = None
    if weighted:
        weight_D = 1 + 0.1 * gaussian(
            D, seed=2, dtype=dtype if weighted == "same" else torch.float32
        )
    for x in (among_nans(x_TD), x_TD.T.contiguous().T):
        got = cpu.rms_norm_quantize_rows(x, weight_D, 1e-6, EPS)
        want = plain.rms_norm_quantize_rows(x, weight_D, 1e-6, EPS)
        for ours, theirs in zip(got, want, strict=True):
            assert_same(ours, theirs)


def test_norm_of_several_chunks_and_leading_shape(cpu: kernels.Kernels, threads: int) -> None:
    x_TD = gaussian(5, 1001, 129, seed=1)
    got = cpu.rms_norm_quantize_rows(x_TD, None, 1e-6, EPS)
    for ours, theirs in zip(got, plain.rms_norm_quantize_rows(x_TD, None, 1e-6, EPS), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", HARD_ROWS)
def test_norm_of_hard_values(cpu: kernels.Kernels, name: str) -> None:
    got = cpu.rms_norm_quantize_rows(HARD_ROWS[name], None, 1e-5, EPS)
    want = plain.rms_norm_quantize_rows(HARD_ROWS[name], None, 1e-5, EPS)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D"), [(1, 1), (0, 8), (9, 65), (130, 1000)])
def test_gradient_of_the_norm(
    cpu: kernels.Kernels, T: int, D: int, dtype: torch.dtype, weighted: bool
) -> None:
    x_TD, grad_TD = gaussian(T, D, seed=1, dtype=dtype), gaussian(T, D, seed=3, dtype=dtype)
    weight_D = 1 + 0.1 * gaussian(D, seed=2, dtype=dtype) if weighted else None
    rstd_T1 = plain.rms_norm_quantize_rows(x_TD, weight_D, 1e-6, EPS).rstd_T1
    args = (among_nans(x_TD), rstd_T1, weight_D)
    got_x, got_weight = cpu.rms_norm_grad(among_nans(grad_TD), *args)
    want_x, want_weight = plain_backward.rms_norm_grad(grad_TD, *args)
    x, grad, rstd = x_TD.double(), grad_TD.double(), rstd_T1.double()
    g = grad if weight_D is None else grad * weight_D.double()
    exact_x = rstd * (g - x * rstd * (g * x * rstd).mean(dim=-1, keepdim=True))
    assert got_x.dtype == dtype and (got_weight is None) == (weight_D is None)
    assert error(got_x, exact_x) <= 1.1 * error(want_x, exact_x) + 1e-6
    if got_weight is not None and want_weight is not None:
        exact_weight = (grad * (x_TD.float() * rstd_T1).to(dtype).double()).sum(dim=0)
        assert got_weight.dtype == dtype
        assert error(got_weight, exact_weight) <= 1.1 * error(want_weight, exact_weight) + 1e-5


# --- Matrix products ---


def operands(T: int, D: int, F: int, dtype: torch.dtype) -> tuple[Int8Rows, Ternary, Tensor]:
    x = plain.quantize_rows(gaussian(T, D, seed=1, dtype=dtype), EPS)
    weight = plain.ternarize(gaussian(F, D, seed=2, dtype=dtype), "absmean", EPS)
    return x, weight, gaussian(T, F, seed=3, dtype=dtype) * 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), [*SHAPES, (1100, 40, 2000)])
def test_integer_product(
    cpu: kernels.Kernels, T: int, D: int, F: int, dtype: torch.dtype
) -> None:
    x, weight, bias_TF = operands(T, D, F, dtype)
    for bias_F in (None, bias_TF[0]):
        got = cpu.integer_linear(x, weight, bias_F, dtype)
        assert_same(got, plain.integer_linear(x, weight, bias_F, dtype))


def test_integer_product_of_extreme_codes_and_leading_shape(cpu: kernels.Kernels) -> None:
    x = Int8Rows(torch.full((2, 3, 500), -128, dtype=torch.int8), torch.full((2, 3, 1), 0.25))
    ones = torch.ones(4, 500, dtype=torch.int8)
    y = cpu.integer_linear(x, Ternary(ones, torch.tensor(0.5)), None, torch.float32)
    assert_same(y, torch.full((2, 3, 4), -128 * 500 / 8))


def test_non_finite_scales_surface_in_the_product(cpu: kernels.Kernels) -> None:
    x, weight, _ = operands(4, 20, 6, torch.float32)
    x.scale_T1[1], x.scale_T1[2] = NAN, INF
    y_TF = cpu.integer_linear(x, weight, None, torch.bfloat16)
    assert_same(y_TF, plain.integer_linear(x, weight, None, torch.bfloat16))
    assert y_TF[1].isnan().all() and not y_TF[2].isfinite().any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), [*SHAPES, (1100, 1500, 40), (40, 1500, 1100)])
def test_integer_gradients_equal_the_reference(
    cpu: kernels.Kernels, T: int, D: int, F: int, dtype: torch.dtype, bits: GradientBits
) -> None:
    x, weight, grad_TF = operands(T, D, F, dtype)
    grad_TF = among_nans(grad_TF * torch.logspace(-3, 3, T)[:, None].to(dtype))
    got, want = (table.input_grad(grad_TF, weight, bits) for table in (cpu, plain.KERNELS))
    assert_same(got, want)
    for out in (dtype, torch.float32):
        got, want = (
            table.weight_grad(grad_TF, x, out, None, bits) for table in (cpu, plain.KERNELS)
        )
        assert_same(got, want)
