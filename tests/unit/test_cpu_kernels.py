"""The CPU's kernels of weights and rows against their plain twins and against float64.

Shapes: T tokens, D inputs, F outputs.
"""

import pytest
import torch
from gaussian import gaussian
from kernel_cases import (
    DTYPES,
    EPS,
    HARD_ROWS,
    HARD_WEIGHTS,
    MEASURES,
    NEEDS_CPU_KERNELS,
    among_nans,
    assert_same,
    error,
)

from bitscale.quant import kernels
from bitscale.quant.kernels import (
    cpu_rows,
    plain,
    plain_backward,
)
from bitscale.quant.kernels.table import Measure
from bitscale.quant.reference import Int8Rows, Ternary

pytestmark = [
    pytest.mark.unit,
    NEEDS_CPU_KERNELS,
    pytest.mark.usefixtures("poisoned_outputs"),
]


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


def test_sums_are_of_multiples_of_the_grid(cpu: kernels.Kernels) -> None:
    """As everywhere (`exact_sum`): numbers below 2^-31 count as 0."""
    w_FD = torch.full((40, 50), 3e-10)
    got, want = cpu.ternarize(w_FD, "absmean", 1e-12), plain.ternarize(w_FD, "absmean", 1e-12)
    assert_same(got.scale, want.scale)
    assert float(got.scale) == float(torch.tensor(1e-12))


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


def test_norm_where_torch_sums_in_another_order(
    cpu: kernels.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then rstd is torch's own; where it sums as cpu_rows.c does, a row is read once."""
    monkeypatch.setattr(cpu_rows, "_sums_as_torch", lambda: False)
    x_TD, weight_D = gaussian(2, 40, 129, seed=1, dtype=torch.bfloat16), gaussian(129, seed=2)
    got = cpu.rms_norm_quantize_rows(x_TD, weight_D, 1e-6, EPS)
    want = plain.rms_norm_quantize_rows(x_TD, weight_D, 1e-6, EPS)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("D", [*range(1, 70), 127, 511, 512, 2049, 16_384, 32_767])
def test_norm_sums_squares_in_torch_order(cpu: kernels.Kernels, D: int) -> None:
    x_TD = gaussian(30, D, seed=D) * torch.logspace(-3, 3, D)
    got = cpu.rms_norm_quantize_rows(x_TD, None, 1e-6, EPS).rstd_T1
    assert_same(got, plain.rms_norm_quantize_rows(x_TD, None, 1e-6, EPS).rstd_T1)
    is_usual = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert cpu_rows._sums_as_torch() or not is_usual, "every norm takes torch's passes"


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


# --- Blend ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9, 1.0])
def test_blends(cpu: kernels.Kernels, strength: float, dtype: torch.dtype) -> None:
    """Bit for bit at λ = 1; between, torch may or may not fuse a multiplication and an addition."""
    t = gaussian(37, 900, seed=4, dtype=dtype)
    tolerance = {torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]
    pairs = [
        (
            cpu.blend_weight(t, measure, EPS, strength),
            plain.blend_weight(t, measure, EPS, strength),
        )
        for measure in MEASURES
    ]
    pairs.append((cpu.blend_rows(among_nans(t), EPS, strength), plain.blend_rows(t, EPS, strength)))
    for got, want in pairs:
        if strength == 1.0:
            assert_same(got, want)
        assert got.dtype == dtype and not torch.equal(got, t)
        assert error(got, want.double()) <= tolerance * float(want.double().norm())


def test_blends_of_non_finite_values(cpu: kernels.Kernels) -> None:
    for name in ("nan", "inf"):
        x_TD, w_FD = HARD_ROWS[name], HARD_WEIGHTS[name]
        assert_same(cpu.blend_rows(x_TD, EPS, 0.3), plain.blend_rows(x_TD, EPS, 0.3))
        got = cpu.blend_weight(w_FD, "absmean", EPS, 0.3)
        assert_same(got, plain.blend_weight(w_FD, "absmean", EPS, 0.3))
    assert cpu.blend_rows(torch.zeros(0, 3), EPS, 0.3).shape == (0, 3)
