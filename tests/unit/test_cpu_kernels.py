"""The CPU's kernels against their plain twins and against float64.

Shapes: T tokens, D inputs, F outputs.
"""

from collections.abc import Iterator

import pytest
import torch
from gaussian import gaussian
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
    assert_at_most_twice_naive_bf16,
    assert_same,
    error,
    why_no_cpu_kernels,
)
from torch import Tensor

from bitscale.quant import kernels
from bitscale.quant.kernels import (
    cpu_gemm,
    cpu_library,
    cpu_rows,
    get_kernels,
    plain,
    plain_backward,
)
from bitscale.quant.kernels.linear import rms_norm_rows, ternary_linear
from bitscale.quant.kernels.table import GradientBits, Measure
from bitscale.quant.reference import Int8Rows, Ternary

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(why_no_cpu_kernels() is not None, reason=why_no_cpu_kernels() or ""),
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


# --- Matrix products ---


def operands(T: int, D: int, F: int, dtype: torch.dtype) -> tuple[Int8Rows, Ternary, Tensor]:
    x = plain.quantize_rows(gaussian(T, D, seed=1, dtype=dtype), EPS)
    weight = plain.ternarize(gaussian(F, D, seed=2, dtype=dtype), "absmean", EPS)
    return x, weight, gaussian(T, F, seed=3, dtype=dtype) * 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), [*SHAPES, (1100, 40, 2000)])
def test_integer_product(cpu: kernels.Kernels, T: int, D: int, F: int, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("bits", BITS)
def test_integer_gradients_of_more_tokens_than_int32_sums(
    cpu: kernels.Kernels, bits: GradientBits
) -> None:
    tokens = plain_backward.CHUNK_TOKENS + 77
    x, weight, grad_TF = operands(tokens, 5, 3, torch.float32)
    x.codes_TD.fill_(-128)
    grad_TF[:, 0] = 1.0  # the largest code in every token: sums of 2^30
    main_grad_FD, want_FD = torch.ones(3, 5), torch.ones(3, 5)
    cpu.weight_grad(grad_TF, x, torch.float32, main_grad_FD, bits)
    plain_backward.weight_grad(grad_TF, x, torch.float32, want_FD, bits)
    assert_same(main_grad_FD, want_FD)
    got = cpu.weight_grad(grad_TF, x, torch.bfloat16, None, bits)
    assert_same(got, plain_backward.weight_grad(grad_TF, x, torch.bfloat16, None, bits))
    assert_same(
        cpu.input_grad(grad_TF, weight, bits), plain_backward.input_grad(grad_TF, weight, bits)
    )


@pytest.mark.parametrize("bits", BITS)
def test_non_finite_and_tiny_gradients_surface(cpu: kernels.Kernels, bits: GradientBits) -> None:
    x, weight, grad_TF = operands(7, 20, 70, torch.float32)
    grad_TF[1, 3], grad_TF[2, 4], grad_TF[3] = NAN, INF, -0.0
    grad_TF[4] *= 1e-35
    got, want = (table.input_grad(grad_TF, weight, bits) for table in (cpu, plain.KERNELS))
    assert_same(got, want)
    assert got[1].isnan().all() and not got[2].isfinite().any() and got[3:].isfinite().all()
    got, want = (
        table.weight_grad(grad_TF, x, torch.float32, None, bits) for table in (cpu, plain.KERNELS)
    )
    assert_same(got, want)
    assert got[3].isnan().all() and not got[4].isfinite().any() and got[5:].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_many_blocks(
    cpu: kernels.Kernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: GradientBits
) -> None:
    monkeypatch.setattr(cpu_gemm, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(cpu_gemm, "_MIN_BLOCK_ROWS", 72)
    x, weight, grad_TF = operands(200, 50, 230, dtype)
    main_grads = [torch.ones(230, 50), torch.ones(230, 50)]
    got, want = (
        [
            table.integer_linear(x, weight, None, dtype),
            table.input_grad(grad_TF, weight, bits),
            table.weight_grad(grad_TF, x, dtype, None, bits),
            table.weight_grad(grad_TF, x, dtype, main_grad_FD, bits),
        ]
        for table, main_grad_FD in zip((cpu, plain.KERNELS), main_grads, strict=True)
    )
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)


def test_integer_gradients_do_not_depend_on_threads(cpu: kernels.Kernels, threads: int) -> None:
    x, weight, grad_TF = operands(530, 300, 260, torch.float32)
    assert_same(cpu.input_grad(grad_TF, weight, 8), plain_backward.input_grad(grad_TF, weight, 8))
    got = cpu.weight_grad(grad_TF, x, torch.float32, None, 8)
    assert_same(got, plain_backward.weight_grad(grad_TF, x, torch.float32, None, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), SHAPES)
def test_floating_gradients(
    cpu: kernels.Kernels, T: int, D: int, F: int, dtype: torch.dtype
) -> None:
    """bits None: at most twice the error of fake quantization's products in the same dtype."""
    x, weight, grad_TF = operands(T, D, F, dtype)
    w_FD, x_hat_TD = (codes.double() * scale.double() for codes, scale in (weight, x))
    exact_TD, exact_FD = grad_TF.double() @ w_FD, grad_TF.double().T @ x_hat_TD
    got_TD = cpu.input_grad(among_nans(grad_TF), weight, None)
    assert got_TD.dtype == dtype
    assert error(got_TD, exact_TD) <= 2 * error(grad_TF @ w_FD.to(dtype), exact_TD) + 1e-12
    for out in (dtype, torch.float32):
        got_FD = cpu.weight_grad(among_nans(grad_TF), x, out, None, None)
        naive_FD = (grad_TF.to(out).T @ x_hat_TD.to(out)).to(out)
        assert got_FD.dtype == out
        assert error(got_FD, exact_FD) <= 2 * error(naive_FD, exact_FD) + 1e-12


@pytest.fixture(params=["torch", "cpu_gemm.c"])
def fp32_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two products, whichever this processor would take."""
    if request.param == "cpu_gemm.c" and not cpu_library.load().multiplies_fp32():
        pytest.skip("cpu_gemm.c multiplies fp32 with AVX-512 only")
    monkeypatch.setattr(cpu_gemm, "multiplies_fp32", lambda: request.param == "cpu_gemm.c")


@pytest.mark.usefixtures("fp32_product")
@pytest.mark.parametrize(
    ("T", "D", "F"), [*SHAPES, (1, 40, 1), (13, 33, 1025), (1100, 97, 250), (97, 500, 513)]
)
def test_fp32_products_of_integers_are_exact(
    cpu: kernels.Kernels, threads: int, T: int, D: int, F: int
) -> None:
    """Sums below 2^24 hide nothing: a lost or doubled row, column or term shows."""
    x, weight, grad_TF = operands(T, D, F, torch.float32)
    grad_TF = (30 * grad_TF).round()
    x, weight = Int8Rows(x.codes_TD, torch.ones(T, 1)), Ternary(weight.codes_FD, torch.tensor(0.5))
    got = cpu.input_grad(among_nans(grad_TF), weight, None)
    assert_same(got, ((grad_TF.double() @ weight.codes_FD.double()) / 2).float())
    got = cpu.weight_grad(among_nans(grad_TF), x, torch.float32, None, None)
    assert_same(got, (grad_TF.double().T @ x.codes_TD.double()).float())


@pytest.mark.usefixtures("fp32_product")
def test_fp32_products_are_as_exact_as_torch(cpu: kernels.Kernels) -> None:
    x, weight, grad_TF = operands(1000, 200, 1100, torch.float32)
    w_FD, x_hat_TD = (codes.float() * scale for codes, scale in (weight, x))
    exact_TD, exact_FD = grad_TF.double() @ w_FD.double(), grad_TF.double().T @ x_hat_TD.double()
    got_TD = cpu.input_grad(grad_TF, weight, None)
    assert error(got_TD, exact_TD) <= 1.05 * error(grad_TF @ w_FD, exact_TD)
    got_FD = cpu.weight_grad(grad_TF, x, torch.float32, None, None)
    assert error(got_FD, exact_FD) <= 1.05 * error(grad_TF.T @ x_hat_TD, exact_FD)


@pytest.mark.usefixtures("fp32_product")
def test_non_finite_values_surface_in_fp32_products(cpu: kernels.Kernels) -> None:
    x, weight, grad_TF = operands(50, 40, 70, torch.float32)
    grad_TF[1, 3], grad_TF[2, 4], x.scale_T1[5] = NAN, INF, INF
    for got, want in (
        (table.input_grad(grad_TF, weight, None) for table in (cpu, plain.KERNELS)),
        (
            table.weight_grad(grad_TF, x, torch.float32, None, None)
            for table in (cpu, plain.KERNELS)
        ),
    ):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        assert got.isnan().any()


def test_24_bits_are_as_exact_as_fp32(cpu: kernels.Kernels) -> None:
    """For Gaussian gradients and sums of this length; short sums of outliers are not."""
    x, weight, grad_TF = operands(1000, 200, 1000, torch.float32)
    w_FD, x_hat_TD = (codes.double() * scale.double() for codes, scale in (weight, x))
    exact_TD, exact_FD = grad_TF.double() @ w_FD, grad_TF.double().T @ x_hat_TD
    got_TD, in_fp32 = (cpu.input_grad(grad_TF, weight, bits) for bits in (24, None))
    assert error(got_TD, exact_TD) <= error(in_fp32, exact_TD)
    got_FD, in_fp32 = (
        cpu.weight_grad(grad_TF, x, torch.float32, None, bits) for bits in (24, None)
    )
    assert error(got_FD, exact_FD) <= error(in_fp32, exact_FD)


@pytest.mark.parametrize("bits", [*BITS, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_weight_accumulates_in_fp32(
    cpu: kernels.Kernels, dtype: torch.dtype, bits: GradientBits
) -> None:
    x, _, grad_TF = operands(70, 96, 130, dtype)
    buffer = gaussian(3, 130, 96, seed=5)
    before = buffer.clone()
    main_grad_FD = buffer[1]
    got = cpu.weight_grad(grad_TF, x, dtype, main_grad_FD, bits)
    assert got is main_grad_FD
    alone = cpu.weight_grad(grad_TF, x, torch.float32, None, bits)
    assert_same(got, before[1] + alone)
    assert_same(buffer[::2], before[::2])


@pytest.mark.parametrize("bits", [*BITS, None])
def test_empty_batch(cpu: kernels.Kernels, bits: GradientBits) -> None:
    x, weight, grad_TF = operands(0, 30, 20, torch.float32)
    assert cpu.integer_linear(x, weight, None, torch.bfloat16).shape == (0, 20)
    assert cpu.input_grad(grad_TF, weight, bits).shape == (0, 30)
    got = cpu.weight_grad(grad_TF, x, torch.float32, None, bits)
    assert_same(got, torch.zeros(20, 30))


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


# --- The layer ---


def layer_gradients(name: str, dtype: torch.dtype, bits: GradientBits) -> dict[str, Tensor]:
    table = get_kernels(name, "cpu")
    x_TD = gaussian(2, 9, 48, seed=7, dtype=dtype).requires_grad_()
    norm_D = (1 + 0.1 * gaussian(48, seed=6, dtype=dtype)).requires_grad_()
    w_FD = gaussian(33, 48, seed=8, dtype=dtype).requires_grad_()
    bias_F = gaussian(33, seed=9, dtype=dtype).requires_grad_()
    normed = rms_norm_rows(x_TD, norm_D, 1e-6, EPS, table)
    weight = table.ternarize(w_FD, "absmean", EPS)
    y_TF = ternary_linear(normed.carrier_TD, w_FD, bias_F, normed.rows, weight, table, bits=bits)
    y_TF.backward(gaussian(2, 9, 33, seed=10, dtype=dtype))
    leaves = {"x": x_TD, "norm": norm_D, "w": w_FD, "bias": bias_F}
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y_TF.detach(), **gradients}


@pytest.mark.parametrize("bits", [8, 16, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_the_reference(dtype: torch.dtype, bits: GradientBits) -> None:
    got, want = (layer_gradients(name, dtype, bits) for name in ("cpu", "reference"))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for name in ("y", "bias", "x", "norm", "w"):
        exact = name in ("y", "bias") or (name == "w" and bits is not None)
        allowed = 0.0 if exact else tolerance * float(want[name].norm())
        assert got[name].dtype == dtype
        assert error(got[name], want[name].double()) <= allowed, name


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_bf16_layer_is_at_most_twice_as_far_off_as_naive_bf16(name: str) -> None:
    assert_at_most_twice_naive_bf16(get_kernels(name, "cpu"))


@pytest.mark.parametrize("into_main_grad", [False, True])
def test_compiled_layer_has_no_graph_break(cpu: kernels.Kernels, into_main_grad: bool) -> None:
    def layer(
        x_TD: Tensor,
        norm_D: Tensor,
        w_FD: Tensor,
        bias_F: Tensor,
        table: kernels.Kernels,
        main_grad_FD: Tensor | None,
    ) -> Tensor:
        normed = rms_norm_rows(x_TD, norm_D, 1e-6, EPS, table)
        weight = table.ternarize(w_FD, "absmean", EPS)
        return ternary_linear(
            normed.carrier_TD, w_FD, bias_F, normed.rows, weight, table, bits=16,
            main_grad_FD=main_grad_FD,
        )  # fmt: skip

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [
            gaussian(*shape, seed=3).requires_grad_() for shape in ((9, 48), (48,), (33, 48), (33,))
        ]
        main_grad_FD = torch.ones(33, 48) if into_main_grad else None
        y_TF = function(*leaves, cpu, main_grad_FD)
        y_TF.square().sum().backward()
        weight_grad = main_grad_FD if into_main_grad else leaves[2].grad
        results.append([y_TF.detach(), weight_grad, *(leaves[i].grad for i in (0, 1, 3))])
    for got, want in zip(*results, strict=True):
        assert got is not None and want is not None
        assert_same(got, want)
