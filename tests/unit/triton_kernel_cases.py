"""Every Triton kernel against its plain twin and against float64.

Run by `test_triton_kernels.py` in Triton's interpreter; on a machine with a GPU also directly:
`python -m pytest tests/unit/triton_kernel_cases.py`.

Shapes: T tokens, D inputs, F outputs.
"""

import pytest
import torch
from kernel_cases import (
    HARD_ROWS,
    HARD_WEIGHTS,
    MEASURES,
    SHAPES,
    assert_at_most_twice_naive_bf16,
)
from torch import Tensor

from bitscale.errors import KernelUnavailable
from bitscale.quant.kernels import Kernels, plain, tiles, triton_gemm
from bitscale.quant.kernels.linear import ternary_linear
from bitscale.quant.kernels.table import Measure
from bitscale.quant.kernels.tiles import Rule, Tile
from bitscale.quant.reference import MAX_EXACT_INPUTS, Int8Rows, Ternary
from triton_inputs import (
    DEVICE,
    DTYPES,
    EPS,
    INF,
    NAN,
    REFERENCE,
    TRITON,
    among_nans,
    assert_same,
    error,
    gaussian,
    operands,
    poisoned_outputs,  # noqa: F401 - a fixture of every case
)

pytestmark = [
    pytest.mark.unit,
    # NumPy, on which the interpreter runs, warns of every NaN and infinity.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


# --- Weights ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", HARD_WEIGHTS)
def test_ternary_codes_and_scale(name: str, measure: Measure, dtype: torch.dtype) -> None:
    w = HARD_WEIGHTS[name].to(DEVICE, dtype)
    if w.dim() != 2:
        w = w.flatten(1)
    got, want = TRITON.ternarize(w, measure, EPS), REFERENCE.ternarize(w, measure, EPS)
    assert_same(got.codes_FD, want.codes_FD)
    assert_same(got.scale, want.scale)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1 + 2e-8, 1e-30, 1.3e-38, 4e-42, 3e-45, 1e38])
def test_codes_beside_ties_need_no_division(scale: float) -> None:
    """Weights a few ulp around ± scale / 2; eps is the scale, as all are smaller."""
    half = torch.tensor(scale, device=DEVICE) / 2
    steps = torch.arange(-4, 5, device=DEVICE, dtype=torch.int32)
    near = (half.view(torch.int32) + steps).clamp(min=0).view(torch.float32)
    w_FD = torch.cat([near, -near, torch.zeros(100, device=DEVICE)])[None]
    got, want = (
        TRITON.ternarize(w_FD, "absmean", scale),
        REFERENCE.ternarize(w_FD, "absmean", scale),
    )
    assert float(got.scale) == float(torch.tensor(scale))
    assert_same(got.codes_FD, want.codes_FD)
    assert {-1, 0, 1} == set(got.codes_FD.flatten().tolist())


def test_codes_at_random_scales() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scale = float(torch.rand((), generator=generator) + 0.5)
        offsets = torch.randint(-3, 4, (400,), generator=generator, dtype=torch.int32)
        bits = (torch.tensor(scale) / 2).view(torch.int32) + offsets
        w_FD = bits.view(torch.float32).to(DEVICE).view(20, 20)
        want = REFERENCE.ternarize(w_FD, "absmean", scale)
        assert_same(TRITON.ternarize(w_FD, "absmean", scale).codes_FD, want.codes_FD)


def test_sums_are_of_multiples_of_the_grid() -> None:
    """As everywhere (`exact_sum`): numbers below 2^-31 count as 0."""
    w_FD = torch.full((40, 50), 3e-10, device=DEVICE)
    assert float(TRITON.ternarize(w_FD, "absmean", 1e-12).scale) == float(torch.tensor(1e-12))


def test_scale_of_many_values_does_not_drift() -> None:
    w_FD = torch.full((300, 400), 0.1, device=DEVICE)
    w_FD[0, 0] = 3e4
    assert float(TRITON.ternarize(w_FD, "absmean", EPS).scale) == float(
        w_FD.double().mean().float()
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_weights_of_any_strides(measure: Measure) -> None:
    whole = gaussian(60, 70)
    for w_FD in (whole.T, whole[::3, 5:41], among_nans(whole)):
        got, want = TRITON.ternarize(w_FD, measure, EPS), REFERENCE.ternarize(w_FD, measure, EPS)
        assert_same(got.codes_FD, want.codes_FD)
        assert_same(got.scale, want.scale)


# --- Activations ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD_ROWS)
def test_rows_of_hard_values(name: str, dtype: torch.dtype) -> None:
    x_TD = HARD_ROWS[name].to(DEVICE, dtype)
    got, want = TRITON.quantize_rows(x_TD, EPS), REFERENCE.quantize_rows(x_TD, EPS)
    assert_same(got.codes_TD, want.codes_TD)
    assert_same(got.scale_T1, want.scale_T1)


def test_non_finite_activations_surface() -> None:
    _, scale_T1 = TRITON.quantize_rows(HARD_ROWS["nan"].to(DEVICE), EPS)
    assert scale_T1.isnan().flatten().tolist() == [True, True, False]
    _, scale_T1 = TRITON.quantize_rows(HARD_ROWS["inf"].to(DEVICE), EPS)
    assert scale_T1.isinf().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [2, 63, 64, 65, 511, 1000, 2048])
def test_rows_of_any_width(D: int, dtype: torch.dtype) -> None:
    x_TD = gaussian(5, D, seed=D, dtype=dtype)
    for view in (x_TD, among_nans(x_TD)):
        got, want = TRITON.quantize_rows(view, EPS), REFERENCE.quantize_rows(view, EPS)
        assert_same(got.codes_TD, want.codes_TD)
        assert_same(got.scale_T1, want.scale_T1)


def test_rows_of_any_strides_and_leading_shape() -> None:
    x_BTD = gaussian(4, 6, 30)
    for view in (
        x_BTD,
        x_BTD.transpose(0, 1),
        x_BTD.transpose(1, 2),
        x_BTD[::2, 1:, ::3],
        x_BTD[0, 0],
    ):
        got, want = TRITON.quantize_rows(view, EPS), REFERENCE.quantize_rows(view, EPS)
        assert_same(got.codes_TD, want.codes_TD)
        assert_same(got.scale_T1, want.scale_T1)


def test_tiny_eps_lets_denormal_scales_through() -> None:
    x_TD = torch.tensor([[1e-43, -2e-44, 0.0], [1e-45, 0.0, 0.0]], device=DEVICE)
    got, want = TRITON.quantize_rows(x_TD, 1e-45), REFERENCE.quantize_rows(x_TD, 1e-45)
    assert_same(got.codes_TD, want.codes_TD)
    assert_same(got.scale_T1, want.scale_T1)


def test_too_long_a_row_says_what_to_do() -> None:
    with pytest.raises(
        KernelUnavailable,
        match=r"^quant.kernel='triton' quantizes rows of at most 32768 inputs and a layer has "
        r"32769; split the matrix, or use 'reference'$",
    ):
        TRITON.quantize_rows(torch.zeros(1, 32769, device=DEVICE), EPS)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 65, 1000])
def test_norm_and_codes(D: int, dtype: torch.dtype, weighted: bool) -> None:
    """rstd to fp32's precision; given rstd, the codes are those of the unfused norm."""
    x_TD = among_nans(gaussian(9, D, seed=1, dtype=dtype) * 3)
    weight_D = 1 + 0.1 * gaussian(D, seed=2, dtype=dtype) if weighted else None
    got = TRITON.rms_norm_quantize_rows(x_TD, weight_D, 1e-6, EPS)
    exact_T1 = (x_TD.double().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(got.rstd_T1.double(), exact_T1, rtol=4e-7, atol=0)
    h_TD = plain.apply_rms_norm(x_TD, got.rstd_T1, weight_D)
    want = REFERENCE.quantize_rows(h_TD, EPS)
    assert_same(got.codes_TD, want.codes_TD)
    assert_same(got.scale_T1, want.scale_T1)
    whole = REFERENCE.rms_norm_quantize_rows(x_TD, weight_D, 1e-6, EPS)
    assert int((whole.codes_TD.int() - got.codes_TD.int()).abs().max()) <= 1
    assert float((whole.codes_TD == got.codes_TD).double().mean()) > 0.99


def test_norm_with_an_fp32_weight_promotes() -> None:
    x_TD, weight_D = gaussian(4, 50, dtype=torch.bfloat16), 1 + 0.1 * gaussian(50, seed=3)
    got = TRITON.rms_norm_quantize_rows(x_TD, weight_D, 1e-5, EPS)
    h_TD = plain.apply_rms_norm(x_TD, got.rstd_T1, weight_D)
    assert h_TD.dtype == torch.float32
    assert_same(got.codes_TD, REFERENCE.quantize_rows(h_TD, EPS).codes_TD)


def test_non_finite_values_surface_through_the_norm() -> None:
    x_TD = HARD_ROWS["nan"].to(DEVICE)
    got = TRITON.rms_norm_quantize_rows(x_TD, None, 1e-5, EPS)
    want = REFERENCE.rms_norm_quantize_rows(x_TD, None, 1e-5, EPS)
    assert_same(got.codes_TD, want.codes_TD)
    assert got.scale_T1.isnan().flatten().tolist() == [True, True, False]
    assert got.rstd_T1.isnan().flatten().tolist() == [True, True, False]


# --- Matrix products ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), SHAPES)
def test_integer_product(T: int, D: int, F: int, dtype: torch.dtype) -> None:
    x, weight, bias_TF = operands(T, D, F, dtype)
    for bias_F in (None, bias_TF[0]):
        got = TRITON.integer_linear(x, weight, bias_F, dtype)
        assert_same(got, REFERENCE.integer_linear(x, weight, bias_F, dtype))


@pytest.mark.parametrize(
    "tile", [rule.tile for rule in (*tiles.FORWARD, *tiles.UNALIGNED)], ids=str
)
def test_every_forward_tile(tile: Tile) -> None:
    x, weight, _ = operands(200, 144, 300, torch.float32)
    got = triton_gemm.integer_linear(x, weight, None, torch.float32, tile)
    assert_same(got, REFERENCE.integer_linear(x, weight, None, torch.float32))


def test_choice_of_tiles() -> None:
    aligned, odd = (4096, 4096), (4096, 1000)
    assert tiles.forward_tile(8192, 4096, aligned) == tiles.FORWARD[0].tile
    assert tiles.forward_tile(8192, 512, aligned) == tiles.FORWARD[1].tile
    assert tiles.forward_tile(64, 4096, aligned) == tiles.FORWARD[2].tile
    assert tiles.forward_tile(8192, 4096, odd) == tiles.UNALIGNED[0].tile
    assert tiles.backward_tile(1024, 1024, aligned, is_fp32=False) == tiles.BACKWARD[0].tile
    assert tiles.backward_tile(1024, 1023, aligned, is_fp32=False) == tiles.BACKWARD[1].tile
    assert tiles.backward_tile(1, 1, odd, is_fp32=False) == tiles.UNALIGNED[0].tile
    assert tiles.backward_tile(1, 1, odd, is_fp32=True) == tiles.BACKWARD_FP32[0].tile
    assert tiles.gradient_bytes_tile(8192, 4096, 1) == tiles.FORWARD[0].tile
    assert tiles.gradient_bytes_tile(8192, 1, 2) == tiles.GRADIENT_BYTES[2][0].tile
    assert tiles.gradient_bytes_tile(64, 4096, 3) == tiles.GRADIENT_BYTES[3][1].tile


def test_integer_product_of_extreme_codes_and_leading_shape() -> None:
    codes = torch.full((2, 3, 500), -128, dtype=torch.int8, device=DEVICE)
    x = Int8Rows(codes, torch.full((2, 3, 1), 0.25, device=DEVICE))
    ones = torch.ones(4, 500, dtype=torch.int8, device=DEVICE)
    y = TRITON.integer_linear(
        x, Ternary(ones, torch.tensor(0.5, device=DEVICE)), None, torch.float32
    )
    assert_same(y, torch.full((2, 3, 4), -128 * 500 / 8, device=DEVICE))


def test_non_finite_scales_surface_in_the_product() -> None:
    x, weight, _ = operands(4, 20, 6, torch.float32)
    x.scale_T1[1], x.scale_T1[2] = NAN, INF
    y_TF = TRITON.integer_linear(x, weight, None, torch.bfloat16)
    assert_same(y_TF, REFERENCE.integer_linear(x, weight, None, torch.bfloat16))
    assert y_TF[1].isnan().all()
    assert not y_TF[2].isfinite().any()


def naive_tolerance(grad: Tensor, other: Tensor, exact: Tensor) -> float:
    """Twice the error of the same product by a plain matmul in the gradient's dtype."""
    return 2 * error(grad @ other.to(grad.dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), SHAPES)
def test_gradient_of_the_input(T: int, D: int, F: int, dtype: torch.dtype) -> None:
    _, weight, grad_TF = operands(T, D, F, dtype)
    w_FD = weight.codes_FD.double() * weight.scale.double()
    exact_TD = grad_TF.double() @ w_FD
    got = TRITON.input_grad(among_nans(grad_TF), weight, None)
    assert (got.dtype, got.shape) == (dtype, (T, D))
    assert error(got, exact_TD) <= naive_tolerance(grad_TF, w_FD, exact_TD)
    want = REFERENCE.input_grad(grad_TF, weight, None)
    assert error(got, want.double()) <= 1e-2 * float(want.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "F"), SHAPES)
def test_gradient_of_the_weight(T: int, D: int, F: int, dtype: torch.dtype) -> None:
    x, _, grad_TF = operands(T, D, F, dtype)
    x_hat_TD = x.codes_TD.double() * x.scale_T1.double()
    exact_FD = grad_TF.double().T @ x_hat_TD
    tolerance = naive_tolerance(grad_TF.T, x_hat_TD, exact_FD)
    for out in (dtype, torch.float32):
        got = TRITON.weight_grad(among_nans(grad_TF), x, out, None, None)
        assert (got.dtype, got.shape) == (out, (F, D))
        assert error(got, exact_FD) <= tolerance + 1e-12
    want = REFERENCE.weight_grad(grad_TF, x, torch.float32, None, None)
    assert error(got, want.double()) <= 1e-2 * float(want.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_weight_accumulates_in_fp32(dtype: torch.dtype) -> None:
    x, _, grad_TF = operands(70, 96, 130, dtype)
    buffer = gaussian(3, 130, 96, seed=5)
    before = buffer.clone()
    main_grad_FD = buffer[1]
    got = TRITON.weight_grad(grad_TF, x, dtype, main_grad_FD, None)
    assert got is main_grad_FD
    alone = TRITON.weight_grad(grad_TF, x, torch.float32, None, None)
    assert_same(got, before[1] + alone)
    assert_same(buffer[::2], before[::2])


@pytest.mark.parametrize(
    ("rules", "dtype"),
    [
        (tiles.BACKWARD, torch.float16),
        (tiles.UNALIGNED, torch.float16),
        (tiles.BACKWARD_FP32, torch.float32),
    ],
    ids=["aligned", "unaligned", "fp32"],
)
def test_every_backward_tile(rules: tuple[Rule, ...], dtype: torch.dtype) -> None:
    x, weight, grad_TF = operands(70, 144, 260, dtype)
    exact_TD = grad_TF.double() @ (weight.codes_FD.double() * weight.scale.double())
    exact_FD = grad_TF.double().T @ (x.codes_TD.double() * x.scale_T1.double())
    for tile in (rule.tile for rule in rules):
        got_TD = triton_gemm.input_grad(grad_TF, weight, tile)
        assert error(got_TD, exact_TD) < 1e-3 * float(exact_TD.norm())
        for main_grad_FD in (None, torch.zeros(260, 144, device=DEVICE)):
            got_FD = triton_gemm.weight_grad(grad_TF, x, torch.float32, main_grad_FD, tile)
            assert error(got_FD, exact_FD) < 1e-3 * float(exact_FD.norm())


def test_empty_batch() -> None:
    x, weight, grad_TF = operands(0, 30, 20, torch.float32)
    assert TRITON.integer_linear(x, weight, None, torch.bfloat16).shape == (0, 20)
    assert TRITON.input_grad(grad_TF, weight, None).shape == (0, 30)
    assert_same(
        TRITON.weight_grad(grad_TF, x, torch.float32, None, None),
        torch.zeros(20, 30, device=DEVICE),
    )


# --- Blend ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9, 1.0])
def test_blends(strength: float, dtype: torch.dtype) -> None:
    t = gaussian(37, 65, seed=4, dtype=dtype)
    weight, rows = REFERENCE.ternarize(t, "absmean", EPS), REFERENCE.quantize_rows(t, EPS)
    for got, want, codes, scale in (
        (
            TRITON.blend_weight(t, "absmean", EPS, strength),
            REFERENCE.blend_weight(t, "absmean", EPS, strength),
            *weight,
        ),
        (
            TRITON.blend_rows(among_nans(t), EPS, strength),
            REFERENCE.blend_rows(t, EPS, strength),
            *rows,
        ),
    ):
        assert (got.dtype, got.shape) == (dtype, t.shape)
        if strength == 1.0:
            assert_same(got, want)
        quantized = codes.double() * scale.double()
        exact = t.double() + strength * (quantized - t.double())
        naive = t + strength * (quantized.to(dtype) - t)
        assert error(got, exact) <= 2 * error(naive, exact) + 1e-12
        assert error(got, want.double()) <= 1e-3 * error(torch.zeros_like(t), exact)


@pytest.mark.parametrize("D", [1, 4096, 9001])
def test_blend_of_rows_longer_than_a_block(D: int) -> None:
    x_TD = gaussian(2, D, seed=6)
    got = TRITON.blend_rows(x_TD, EPS, 1.0)
    assert_same(got, REFERENCE.blend_rows(x_TD, EPS, 1.0))


def test_blends_of_non_finite_values() -> None:
    for x_TD in (HARD_ROWS["nan"].to(DEVICE), HARD_ROWS["inf"].to(DEVICE)):
        assert_same(TRITON.blend_rows(x_TD, EPS, 0.3), REFERENCE.blend_rows(x_TD, EPS, 0.3))
    for w_FD in (HARD_WEIGHTS["nan"].to(DEVICE), HARD_WEIGHTS["inf"].to(DEVICE)):
        got = TRITON.blend_weight(w_FD, "absmean", EPS, 0.3)
        assert_same(got, REFERENCE.blend_weight(w_FD, "absmean", EPS, 0.3))
    assert TRITON.blend_rows(torch.zeros(0, 3, device=DEVICE), EPS, 0.3).shape == (0, 3)


# --- The layer ---


def layer_gradients(kernels: Kernels, dtype: torch.dtype) -> dict[str, Tensor]:
    x_TD = gaussian(2, 9, 48, seed=7, dtype=dtype).requires_grad_()
    w_FD = gaussian(33, 48, seed=8, dtype=dtype).requires_grad_()
    bias_F = gaussian(33, seed=9, dtype=dtype).requires_grad_()
    x, weight = kernels.quantize_rows(x_TD, EPS), kernels.ternarize(w_FD, "absmean", EPS)
    y_TF = ternary_linear(x_TD, w_FD, bias_F, x, weight, kernels)
    y_TF.backward(gaussian(2, 9, 33, seed=10, dtype=dtype))
    grads = {"x": x_TD.grad, "w": w_FD.grad, "bias": bias_F.grad}
    assert all(grad is not None and grad.dtype == dtype for grad in grads.values())
    return {"y": y_TF.detach(), **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_equals_the_reference(dtype: torch.dtype) -> None:
    got, want = layer_gradients(TRITON, dtype), layer_gradients(REFERENCE, dtype)
    assert_same(got["y"], want["y"])
    assert_same(got["bias"], want["bias"])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for name in ("x", "w"):
        assert error(got[name], want[name].double()) < tolerance * float(want[name].norm())


def test_bf16_layer_is_at_most_twice_as_far_off_as_naive_bf16() -> None:
    assert_at_most_twice_naive_bf16(TRITON, DEVICE)


def test_layer_adds_to_main_grad_over_micro_batches() -> None:
    w_FD = gaussian(33, 48, seed=8).requires_grad_()
    weight = TRITON.ternarize(w_FD, "absmean", EPS)
    main_grad_FD = torch.zeros(33, 48, device=DEVICE)
    want = torch.zeros_like(main_grad_FD)
    for seed in range(2):
        x_TD, grad_TF = gaussian(9, 48, seed=seed), gaussian(9, 33, seed=seed + 5)
        x = TRITON.quantize_rows(x_TD, EPS)
        y_TF = ternary_linear(x_TD, w_FD, None, x, weight, TRITON, main_grad_FD=main_grad_FD)
        y_TF.backward(grad_TF)
        want = want + REFERENCE.weight_grad(grad_TF, x, torch.float32, None, None)
    assert w_FD.grad is None
    torch.testing.assert_close(main_grad_FD, want, rtol=1e-5, atol=1e-5)


def test_layer_saves_codes_only() -> None:
    x_TD = gaussian(9, 48, dtype=torch.bfloat16).requires_grad_()
    w_FD = gaussian(33, 48, dtype=torch.bfloat16).requires_grad_()
    x, weight = TRITON.quantize_rows(x_TD, EPS), TRITON.ternarize(w_FD, "absmean", EPS)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ternary_linear(x_TD, w_FD, None, x, weight, TRITON)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (*x, *weight)}
    assert sum(t.nbytes for t in x) == 9 * (48 + 4)


def test_layer_refuses_more_inputs_than_fp32_sums_exactly() -> None:
    wide = MAX_EXACT_INPUTS + 1
    x_TD, w_FD = torch.zeros(1, wide), torch.zeros(1, wide)
    x = Int8Rows(x_TD.to(torch.int8), torch.ones(1, 1))
    weight = Ternary(w_FD.to(torch.int8), torch.ones(()))
    with pytest.raises(ValueError, match=r"^131073 inputs exceed 131072, .*; split the matrix$"):
        ternary_linear(x_TD, w_FD, None, x, weight, TRITON)
