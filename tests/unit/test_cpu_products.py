"""The CPU's matrix products, and the layer made of them, against their plain twins and float64.

Shapes: T tokens, D inputs, F outputs.
"""

import pytest
import torch
from gaussian import gaussian
from kernel_cases import (
    DTYPES,
    EPS,
    INF,
    NAN,
    NEEDS_CPU_KERNELS,
    SHAPES,
    among_nans,
    assert_at_most_twice_naive_bf16,
    assert_same,
    error,
)
from torch import Tensor

from bitscale.quant import kernels
from bitscale.quant.kernels import (
    cpu_gemm,
    cpu_library,
    get_kernels,
    plain,
    plain_backward,
)
from bitscale.quant.kernels.linear import rms_norm_rows, ternary_linear
from bitscale.quant.kernels.table import GradientBits
from bitscale.quant.reference import Int8Rows, Ternary

pytestmark = [
    pytest.mark.unit,
    NEEDS_CPU_KERNELS,
    pytest.mark.usefixtures("poisoned_outputs"),
]

BITS = [8, 16, 24]


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
