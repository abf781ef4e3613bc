"""The reference quantizer, against float64 and integer oracles and explicit gradients.

Shapes: T tokens, D inputs, F outputs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import HARD_WEIGHTS, MEASURES, assert_same
from torch import Tensor

from bitscale.config import QuantConfig
from bitscale.config.spec import CodeSpec
from bitscale.quant import reference
from bitscale.quant.kernels.table import Measure
from bitscale.quant.quantizer import exact_sum, quantize
from bitscale.quant.reference import (
    MAX_EXACT_INPUTS,
    Ternary,
    bit_linear,
    int8_linear,
    quantize_rows,
    ternarize,
    ternary_linear,
    weight_scale,
)
from bitscale.quant.scales import Shard, group_scales
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

ABSMEAN = QuantConfig()
ABSMEDIAN = QuantConfig(weight_scale="absmedian")
WEIGHT_ONLY = QuantConfig(activation_bits=16)
DTYPES = [torch.float32, torch.bfloat16]


def integer_sums(x_TD: Tensor, w_FD: Tensor) -> Tensor:
    """int64 [T, F]: what λ = 1 must sum."""
    codes_TD = quantize_rows(x_TD, ABSMEAN.eps).codes_TD.long()
    return codes_TD @ ternarize(w_FD, ABSMEAN).codes_FD.long().T


# --- Weights ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_absmean_against_float64(dtype: torch.dtype) -> None:
    w_FD = gaussian(300, 500, dtype=dtype) * 0.02
    exact = w_FD.double()
    codes_FD, scale = ternarize(w_FD, ABSMEAN)
    assert (codes_FD.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, ())
    assert float(scale) == float(exact.abs().mean().float())  # correctly rounded
    want = torch.round(w_FD.float() / scale).clamp(-1, 1)
    assert torch.equal(codes_FD.float(), want)
    near_a_tie = ((exact / exact.abs().mean()).abs() - 0.5).abs() < 1e-6
    exact_codes = torch.round(exact / exact.abs().mean()).clamp(-1, 1)
    assert torch.equal(codes_FD.double()[~near_a_tie], exact_codes[~near_a_tie])
    assert int(near_a_tie.sum()) < 10


def test_mean_of_many_small_values_does_not_drift() -> None:
    """A running fp32 sum would be off by orders of magnitude more than one ulp."""
    w_FD = torch.full((4096, 4096), 0.1)
    w_FD[0, 0] = 3e4
    want = w_FD.double().abs().mean().float()
    assert float(weight_scale(w_FD, ABSMEAN)) == float(want)


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([4.0, -1.0, 3.0, -2.0], 2.0),  # even: the lower of 2 and 3, not 2.5
        ([5.0, -1.0, 3.0], 3.0),
        ([-7.0], 7.0),
        ([0.0, 0.0, 9.0, 9.0, 9.0, 0.0], 1e-5),  # eps
    ],
)
def test_absmedian_is_the_lower_median(values: list[float], median: float) -> None:
    scale = weight_scale(torch.tensor([values]), ABSMEDIAN)
    assert float(scale) == pytest.approx(median, rel=1e-7)


def test_ties_round_to_even() -> None:
    """Scale exactly 2: 1 and -1 lie at ±.5 and become 0; 3 and -3 at ±1.5 are clipped from ±2."""
    w_FD = torch.tensor([[1.0, -1.0, 3.0, -3.0], [2.0, -2.0, 1.0000001, 2.9999999]])
    codes_FD, scale = ternarize(w_FD, ABSMEAN)
    assert float(scale) == 2.0
    assert codes_FD.tolist() == [[0, 0, 1, -1], [1, -1, 1, 1]]


@pytest.mark.parametrize(
    ("rounding", "codes"),
    [
        ("half_even", [-4, -2, -2, 0, 0, 2, 2, 4]),
        ("half_up", [-3, -2, -1, 0, 1, 2, 3, 4]),
        ("half_away", [-4, -3, -2, -1, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("arithmetic", ["fp32", "native"])
def test_every_rounding_of_ties(rounding: Any, codes: list[int], arithmetic: Any) -> None:
    """By a scale of 1: the largest of a row is its code."""
    part = CodeSpec(
        "absmax", 7.0, -8, 7, granularity="row", rounding=rounding, arithmetic=arithmetic
    )

    def codes_of(values: Tensor) -> list[int]:
        return quantize(torch.cat([values, torch.tensor([7.0])])[None], part).codes[0, :8].tolist()

    halves = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert codes_of(halves) == codes
    if rounding == "half_up":
        return  # the peer adds ½ in fp32, which makes ties of some neighbours
    above, below = (halves.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    assert codes_of(above) == (halves + 0.5).int().tolist()
    assert codes_of(below) == (halves - 0.5).int().tolist()


def test_the_mean_is_the_same_in_any_order() -> None:
    """Shards, blocks and permutations of one matrix: bit for bit one sum, near the true one."""
    magnitude = (gaussian(512, 384) * 0.02).abs()
    whole = exact_sum(magnitude.flatten())
    assert abs(float(whole) / float(magnitude.double().sum()) - 1) < 1e-9
    permutation = torch.randperm(magnitude.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(exact_sum(magnitude.flatten()[permutation]), whole)
    for dim in (0, 1):
        for parts in (2, 3, 4):
            shards = [exact_sum(shard.flatten()) for shard in magnitude.chunk(parts, dim)]
            assert torch.equal(sum(shards), whole)
    orders = (magnitude.flatten(), magnitude.flatten()[permutation])
    assert len({float(m.double().cumsum(0)[-1]) for m in orders}) == 2  # else the order shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", MEASURES)
def test_scales_by_sums_and_histograms_are_the_quantizers(
    measure: Measure, dtype: torch.dtype
) -> None:
    """What ranks add up (scales.py), of one matrix and of several in one weight, on one rank."""
    weights = [w.to(dtype).flatten(1) for w in HARD_WEIGHTS.values()]
    quant = QuantConfig(weight_scale=measure)
    got = group_scales([Shard(w) for w in weights], measure, quant.eps, None)
    for scales_M, w in zip(got, weights, strict=True):
        assert_same(scales_M, weight_scale(w, quant)[None])
    parts = [gaussian(rows, 33, seed=rows, dtype=dtype) * rows for rows in (4, 7, 2)]
    matrix_F = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([4, 7, 2]))
    (scales_M,) = group_scales([Shard(torch.cat(parts), matrix_F, 3)], measure, quant.eps, None)
    assert_same(scales_M, torch.stack([weight_scale(part, quant) for part in parts]))


def test_eps_is_the_smallest_scale() -> None:
    assert float(weight_scale(torch.full((2, 2), 1e-6), ABSMEAN)) == pytest.approx(1e-5)
    small = 2.0**-20  # on the grid of exact_sum
    assert float(weight_scale(torch.full((2, 2), small), QuantConfig(eps=1e-9))) == small


@pytest.mark.parametrize("quant", [ABSMEAN, ABSMEDIAN])
def test_zero_matrix_is_finite_and_gives_the_bias(quant: QuantConfig) -> None:
    codes_FD, scale = ternarize(torch.zeros(3, 4), quant)
    assert not codes_FD.any()
    assert float(scale) == pytest.approx(1e-5)
    bias_F = torch.tensor([1.0, 2.0, 3.0])
    y_TF = bit_linear(gaussian(5, 4), torch.zeros(3, 4), bias_F, TERNARY, quant)
    assert torch.equal(y_TF, bias_F.expand(5, 3))
    y_TF = bit_linear(torch.zeros(5, 4), gaussian(3, 4), bias_F, TERNARY, quant)
    assert torch.equal(y_TF, bias_F.expand(5, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("strength", [TERNARY, Strength(0.5, 0.5)])
def test_what_is_not_finite_surfaces(bad: float, strength: Strength) -> None:
    w_FD, x_TD = gaussian(3, 4), gaussian(5, 4)
    w_FD[1, 2] = bad
    assert not bit_linear(x_TD, w_FD, None, strength, ABSMEAN).isfinite().any()
    x_TD[2, 0] = bad
    y_TF = bit_linear(x_TD, gaussian(3, 4), None, strength, ABSMEAN)
    assert y_TF.isfinite().all(dim=-1).tolist() == [True, True, False, True, True]


def test_nan_surfaces_through_the_median() -> None:
    w_FD = gaussian(3, 4)
    w_FD[0, 0] = float("nan")
    assert weight_scale(w_FD, ABSMEDIAN).isnan()


@pytest.mark.parametrize(
    ("quant", "scale", "zeros", "error"),
    [(ABSMEAN, 0.7979, 0.310, 0.263), (ABSMEDIAN, 0.6745, 0.264, 0.318)],
)
def test_gaussian_oracle(quant: QuantConfig, scale: float, zeros: float, error: float) -> None:
    """Integrals over the standard normal density; 4 million samples, 5 standard deviations."""
    w_FD = gaussian(2000, 2000)
    ternary = ternarize(w_FD, quant)
    assert float(ternary.scale) == pytest.approx(scale, abs=2e-3)
    assert float((ternary.codes_FD == 0).double().mean()) == pytest.approx(zeros, abs=1.7e-3)
    residual = (w_FD - ternary.codes_FD * ternary.scale).double().square().mean()
    assert float(residual) == pytest.approx(error, abs=1.5e-3)


def test_absmean_is_not_idempotent() -> None:
    """Quantizing ŵ again keeps the codes and shrinks the scale to the share of non-zeros."""
    first = ternarize(gaussian(500, 500), ABSMEAN)
    again = ternarize(first.codes_FD * first.scale, ABSMEAN)
    assert torch.equal(again.codes_FD, first.codes_FD)
    assert float(again.scale / first.scale) == pytest.approx(0.69, abs=5e-3)


# --- Activations ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_against_float64(dtype: torch.dtype) -> None:
    x_TD = (gaussian(200, 333) * torch.logspace(-4, 4, 200)[:, None]).to(dtype)
    codes_TD, scale_T1 = quantize_rows(x_TD, 1e-5)
    exact = x_TD.double()
    want_scale = exact.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(scale_T1.double(), want_scale, rtol=1e-7, atol=0)
    assert scale_T1.dtype == torch.float32
    assert codes_TD.dtype == torch.int8
    assert codes_TD.abs().amax(dim=1).tolist() == [127] * 200  # the largest of every row
    assert (codes_TD.double() * scale_T1 - exact).abs().le(0.50001 * want_scale).all()
    assert torch.equal(codes_TD, torch.round(x_TD.float() / scale_T1).to(torch.int8))


def test_row_ties_round_to_even_and_rows_are_independent() -> None:
    x_TD = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5], [-254.0, 1.0, 3.0, 5.0, -7.0]])
    codes_TD, scale_T1 = quantize_rows(x_TD, 1e-5)
    assert scale_T1.flatten().tolist() == [1.0, 2.0]
    assert codes_TD.tolist() == [[127, 0, 2, -2, 0], [-127, 0, 2, 2, -4]]
    for row in range(2):
        assert torch.equal(quantize_rows(x_TD[row : row + 1], 1e-5).codes_TD[0], codes_TD[row])


def test_rows_below_eps_use_eps() -> None:
    codes_TD, scale_T1 = quantize_rows(torch.tensor([[5e-6, -1e-5, 0.0]]), 1e-5)
    assert float(scale_T1) == pytest.approx(1e-5 / 127)
    assert codes_TD.tolist() == [[64, -127, 0]]  # 63.5 is a tie


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.integers(-120, 120),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8),
)
def test_codes_stay_within_int8(exponent: int, values: list[float]) -> None:
    """No input wraps around: the sign of every code is that of its input."""
    x_TD = torch.tensor([values]) * 2.0**exponent
    codes_TD, _ = quantize_rows(x_TD, 1e-5)
    assert codes_TD.min() >= -128
    assert (codes_TD.sign() * x_TD.sign() >= 0).all()


# --- λ = 0 ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_lambda_0_is_the_16_bit_linear_bitwise(dtype: torch.dtype, with_bias: bool) -> None:
    x_TD, w_FD = gaussian(2, 7, 64, dtype=dtype), gaussian(48, 64, seed=1, dtype=dtype)
    bias_F = gaussian(48, seed=2, dtype=dtype) if with_bias else None
    y_TF = bit_linear(x_TD, w_FD, bias_F, SIXTEEN_BIT, ABSMEAN)
    assert y_TF.dtype == dtype
    assert torch.equal(y_TF, F.linear(x_TD, w_FD, bias_F))
    assert torch.equal(int8_linear(x_TD, w_FD, SIXTEEN_BIT, ABSMEAN), F.linear(x_TD, w_FD))


def test_blend_starts_continuously() -> None:
    x_TD, w_FD = gaussian(5, 64), gaussian(48, 64, seed=1)
    almost = bit_linear(x_TD, w_FD, None, Strength(1e-6, 1e-6), ABSMEAN)
    torch.testing.assert_close(almost, F.linear(x_TD, w_FD), rtol=1e-4, atol=1e-4)


# --- λ = 1 ---


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 64, 48), (8, 4096, 16)])
def test_lambda_1_sums_integers_exactly(shape: tuple[int, int, int]) -> None:
    num_tokens, d_in, d_out = shape
    x_TD, w_FD = gaussian(num_tokens, d_in), gaussian(d_out, d_in, seed=1)
    x, w = quantize_rows(x_TD, ABSMEAN.eps), ternarize(w_FD, ABSMEAN)
    want = integer_sums(x_TD, w_FD).float() * x.scale_T1 * w.scale
    assert torch.equal(bit_linear(x_TD, w_FD, None, TERNARY, ABSMEAN), want)
    bias_F = gaussian(d_out, seed=2)
    assert torch.equal(bit_linear(x_TD, w_FD, bias_F, TERNARY, ABSMEAN), want + bias_F)


def test_lambda_1_does_not_depend_on_the_sharding_of_inputs() -> None:
    """Partial integer sums of K shards, added, dequantized once: the same bits."""
    x_TD, w_FD = gaussian(16, 96), gaussian(32, 96, seed=1)
    x, w = quantize_rows(x_TD, ABSMEAN.eps), ternarize(w_FD, ABSMEAN)
    whole = bit_linear(x_TD, w_FD, None, TERNARY, ABSMEAN)
    for num_shards in (2, 3, 8):
        shards = zip(
            x.codes_TD.float().chunk(num_shards, dim=1),
            w.codes_FD.float().chunk(num_shards, dim=1),
            strict=True,
        )
        sums_TF = sum(x_shard @ w_shard.T for x_shard, w_shard in shards)
        assert torch.equal(sums_TF * x.scale_T1 * w.scale, whole)


def test_lambda_1_does_not_depend_on_the_batch() -> None:
    x_TD, w_FD = gaussian(64, 512), gaussian(32, 512, seed=1)
    whole = bit_linear(x_TD, w_FD, None, TERNARY, ABSMEAN)
    rows = [bit_linear(row[None], w_FD, None, TERNARY, ABSMEAN) for row in x_TD]
    assert torch.equal(torch.cat(rows), whole)
    assert torch.equal(
        bit_linear(x_TD.view(4, 16, 512), w_FD, None, TERNARY, ABSMEAN), whole.view(4, 16, 32)
    )


def test_lambda_1_in_bf16_keeps_the_dtype_and_rounds_once() -> None:
    x_TD, w_FD = gaussian(8, 64, dtype=torch.bfloat16), gaussian(4, 64, dtype=torch.bfloat16)
    bias_F = gaussian(4, seed=2, dtype=torch.bfloat16)
    exact = bit_linear(x_TD.float(), w_FD.float(), bias_F.float(), TERNARY, ABSMEAN)
    assert torch.equal(bit_linear(x_TD, w_FD, bias_F, TERNARY, ABSMEAN), exact.bfloat16())


def test_most_inputs_that_are_exact() -> None:
    assert MAX_EXACT_INPUTS == 131_072
    w_FD = torch.ones(1, MAX_EXACT_INPUTS)
    y_TF = bit_linear(torch.ones(1, MAX_EXACT_INPUTS), w_FD, None, TERNARY, ABSMEAN)
    assert float(y_TF) == pytest.approx(MAX_EXACT_INPUTS, rel=1e-6)
    with pytest.raises(ValueError, match=r"131073 inputs exceed 131072.*split the matrix"):
        bit_linear(
            torch.ones(1, MAX_EXACT_INPUTS + 1),
            torch.ones(1, MAX_EXACT_INPUTS + 1),
            None,
            TERNARY,
            ABSMEAN,
        )


@pytest.mark.parametrize("quant", [ABSMEAN, ABSMEDIAN, WEIGHT_ONLY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finished_weights_give_the_trained_forward_bitwise(
    quant: QuantConfig, dtype: torch.dtype
) -> None:
    x_TD, w_FD = gaussian(2, 5, 64, dtype=dtype), gaussian(48, 64, seed=1, dtype=dtype)
    for bias_F in (None, gaussian(48, seed=2, dtype=dtype)):
        trained = bit_linear(x_TD, w_FD, bias_F, TERNARY, quant)
        assert torch.equal(ternary_linear(x_TD, ternarize(w_FD, quant), bias_F, quant), trained)


def test_weight_only_quantization_leaves_activations_alone() -> None:
    x_TD, w_FD = gaussian(5, 64), gaussian(48, 64, seed=1)
    codes_FD, scale = ternarize(w_FD, ABSMEAN)
    want = F.linear(x_TD, codes_FD.float() * scale)
    assert torch.equal(bit_linear(x_TD, w_FD, None, TERNARY, WEIGHT_ONLY), want)
    assert torch.equal(bit_linear(x_TD, w_FD, None, Strength(0.0, 1.0), WEIGHT_ONLY), x_TD @ w_FD.T)


# --- Gradients ---


def quantized64(x_TD: Tensor, w_FD: Tensor, quant: QuantConfig) -> tuple[Tensor, Tensor]:
    """x̂ and ŵ as float64."""
    x, w = quantize_rows(x_TD, quant.eps), ternarize(w_FD, quant)
    return x.codes_TD.double() * x.scale_T1, w.codes_FD.double() * w.scale


@pytest.mark.parametrize("quant", [ABSMEAN, ABSMEDIAN])
@pytest.mark.parametrize(
    "strength", [Strength(a, b) for a in (0.0, 0.3, 1.0) for b in (0.0, 0.3, 1.0)]
)
def test_gradients_pass_straight_through(strength: Strength, quant: QuantConfig) -> None:
    """dx = g w_λ, dw = gᵀ x_λ, db = Σ g: as if rounding were the identity."""
    x_TD = gaussian(3, 5, 24).requires_grad_()
    w_FD = gaussian(16, 24, seed=1).requires_grad_()
    bias_F = gaussian(16, seed=2).requires_grad_()
    grad_TF = gaussian(3, 5, 16, seed=3)
    x_hat, w_hat = quantized64(x_TD.detach(), w_FD.detach(), quant)
    x_blend = x_TD.detach() + strength.activation * (x_hat - x_TD.detach())
    w_blend = w_FD.detach() + strength.weight * (w_hat - w_FD.detach())

    y_TF = bit_linear(x_TD, w_FD, bias_F, strength, quant)
    y_TF.backward(grad_TF)
    g = grad_TF.double()
    close = {"rtol": 2e-6, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(y_TF, F.linear(x_blend, w_blend, bias_F.double()), **close)
    torch.testing.assert_close(x_TD.grad, g @ w_blend, **close)
    torch.testing.assert_close(w_FD.grad, g.flatten(0, 1).T @ x_blend.flatten(0, 1), **close)
    torch.testing.assert_close(bias_F.grad, g.sum(dim=(0, 1)), **close)


def test_weight_only_gradients() -> None:
    x_TD, w_FD = gaussian(5, 24).requires_grad_(), gaussian(16, 24, seed=1).requires_grad_()
    bit_linear(x_TD, w_FD, None, TERNARY, WEIGHT_ONLY).sum().backward()
    _, w_hat = quantized64(x_TD.detach(), w_FD.detach(), WEIGHT_ONLY)
    ones = torch.ones(5, 16, dtype=torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(x_TD.grad, ones @ w_hat, **close)
    torch.testing.assert_close(w_FD.grad, ones.T @ x_TD.detach().double(), **close)


@pytest.mark.parametrize("strength", [SIXTEEN_BIT, Strength(0.3, 0.6), TERNARY])
def test_gradients_have_the_dtype_of_their_tensors(strength: Strength) -> None:
    tensors = [gaussian(*shape, dtype=torch.bfloat16) for shape in ((5, 24), (16, 24), (16,))]
    for tensor in tensors:
        tensor.requires_grad_()
    bit_linear(*tensors, strength, ABSMEAN).sum().backward()
    assert [tensor.grad.dtype for tensor in tensors if tensor.grad is not None] == [
        torch.bfloat16
    ] * 3


def test_a_frozen_input_gets_no_gradient() -> None:
    x_TD, w_FD = gaussian(5, 24), gaussian(16, 24, seed=1).requires_grad_()
    bit_linear(x_TD, w_FD, None, TERNARY, ABSMEAN).sum().backward()
    assert x_TD.grad is None
    assert w_FD.grad is not None


def saved_tensors(run: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return saved


def test_backward_saves_codes_and_no_floating_copy() -> None:
    x_TD = gaussian(32, 64).requires_grad_()
    w_FD = gaussian(48, 64, seed=1).requires_grad_()
    saved = saved_tensors(lambda: bit_linear(x_TD, w_FD, None, TERNARY, ABSMEAN))
    floating = [tensor for tensor in saved if tensor.is_floating_point()]
    assert max(tensor.numel() for tensor in floating) == 32  # one scale a token
    codes = sorted(tensor.numel() for tensor in saved if tensor.dtype == torch.int8)
    assert codes == [32 * 64, 48 * 64]
    probe = saved_tensors(lambda: F.linear(x_TD, w_FD))
    assert max(tensor.numel() for tensor in probe) == 48 * 64  # the hook sees what there is


# --- The 8-bit head ---


def test_int8_linear_quantizes_rows_of_both() -> None:
    x_TD, w_FD = gaussian(7, 64), gaussian(30, 64, seed=1)
    x, w = quantize_rows(x_TD, ABSMEAN.eps), quantize_rows(w_FD, ABSMEAN.eps)
    want = (x.codes_TD.long() @ w.codes_TD.long().T).double() * x.scale_T1 * w.scale_T1.T
    got = int8_linear(x_TD, w_FD, TERNARY, ABSMEAN)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    half = int8_linear(x_TD, w_FD, Strength(0.5, 0.0), ABSMEAN)
    w_half = (w_FD.double() + w.codes_TD * w.scale_T1.double()) / 2
    torch.testing.assert_close(half.double(), x_TD.double() @ w_half.T, rtol=1e-5, atol=1e-5)


def test_quantizing_never_changes_its_input() -> None:
    x_TD, w_FD = gaussian(4, 8), gaussian(6, 8, seed=1)
    before = x_TD.clone(), w_FD.clone()
    for strength in (SIXTEEN_BIT, Strength(0.3, 0.3), TERNARY):
        bit_linear(x_TD, w_FD, None, strength, ABSMEAN)
        bit_linear(x_TD, w_FD, None, strength, ABSMEDIAN)
    assert torch.equal(x_TD, before[0])
    assert torch.equal(w_FD, before[1])


def test_ternary_is_what_the_contract_names() -> None:
    assert Ternary._fields == ("codes_FD", "scale")
    assert reference.ACTIVATION_MAX == 127.0
