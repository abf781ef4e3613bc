"""paretoq, tequila and sherry: learned scales, the bias of dead weights, 3:4 sparsity, residual.

Formulas are written out in float64, after the papers. Shapes: T tokens, D inputs, F outputs.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from torch import Tensor

from bitscale.config import Config, QuantConfig, quant_spec
from bitscale.config.presets import preset, with_bits
from bitscale.config.spec import CodeSpec, QuantSpec
from bitscale.convert.packed import refuse_unpackable
from bitscale.errors import CheckpointError, ConfigError
from bitscale.model.parallel import check_shared_spec
from bitscale.quant.learned import initial_scale
from bitscale.quant.quantizer import dequantize, quantize
from bitscale.quant.reference import (
    bit_linear,
    blend_weight,
    finished_bias,
    ternarize,
    ternary_linear,
)
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

NAMES = ("paretoq", "tequila", "sherry")
STRENGTHS = [TERNARY, Strength(0.4, 0.4), Strength(1.0, 1.0, 0.3), Strength(0.4, 0.0, 0.7)]
MakeConfig = Callable[..., Config]


def learned_scale(name: str, w: Tensor) -> Tensor | None:
    """α of a layer some steps after the transition: a part of the weights lies beyond it."""
    if name != "paretoq":
        return None
    return (initial_scale(w) * torch.linspace(0.5, 1.1, w.shape[0])).to(w.dtype)


def alpha64(name: str, w: Tensor) -> Tensor:
    alpha = learned_scale(name, w)
    return torch.ones(w.shape[0], 1).double() if alpha is None else alpha.double()[:, None]


def formula(name: str, w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """ŵ and codes [F, D], float64; `alpha` [F, 1]."""
    if name == "paretoq":
        codes = torch.round(torch.clamp(w / alpha, -0.99, 0.99) * 1.5)
        return alpha * codes / 1.5, codes
    groups = w.view(w.shape[0], -1, 128)
    if name == "tequila":
        s = groups.abs().mean(-1, keepdim=True)
        codes = groups.sign() * (groups.abs() >= s / 2)
    else:
        quads = w.abs().view(w.shape[0], -1, 4)
        smallest = F.one_hot(quads.argmin(-1), 4).bool().view_as(groups)
        codes = torch.where(groups >= 0, 1.0, -1.0).double().masked_fill(smallest, 0.0)
        s = (groups * codes).sum(-1, keepdim=True) / 96
    return (s * codes).view_as(w), codes.view_as(w)


def expected(
    name: str, x: Tensor, w: Tensor, bias: Tensor, alpha: Tensor, strength: Strength
) -> Tensor:
    """y in float64 from the formulas."""
    x, w, bias = x.double(), w.double(), bias.double()
    w_hat, codes = formula(name, w, alpha)
    y = x @ (w + strength.weight * (w_hat - w)).T + bias + strength.residual * (x @ w.T)
    if name == "tequila":
        y = y + strength.weight * 1e-3 * (w * (codes == 0)).sum(1)
    return y


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_formula(name: str, strength: Strength) -> None:
    x, w, bias = gaussian(7, 256), gaussian(24, 256, seed=1) * 0.05, gaussian(24, seed=2)
    alpha = learned_scale(name, w)
    y = bit_linear(x, w, bias, strength, preset(name), alpha_F=alpha)
    want = expected(name, x, w, bias, alpha64(name, w), strength)
    assert float((y - want).abs().max() / want.abs().max()) < 2e-6
    column_major = w.T.contiguous().T
    assert not column_major.is_contiguous()
    again = bit_linear(x, column_major, bias, strength, preset(name), alpha_F=alpha)
    torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)  # the sums' order may differ
    assert torch.equal(
        ternarize(column_major, preset(name), alpha_F=alpha).codes_FD,
        ternarize(w, preset(name), alpha_F=alpha).codes_FD,
    )


@pytest.mark.parametrize("name", NAMES)
def test_forward_in_bf16(name: str) -> None:
    """Codes are made in fp32 from the bf16 weight; only products are rounded."""
    x, w = gaussian(7, 256).bfloat16(), (gaussian(24, 256, seed=1) * 0.05).bfloat16()
    bias, alpha = gaussian(24, seed=2).bfloat16(), learned_scale(name, w)
    y = bit_linear(x, w, bias, TERNARY, preset(name), alpha_F=alpha)
    assert y.dtype == torch.bfloat16
    want = expected(name, x, w, bias, alpha64(name, w), TERNARY)
    codes = ternarize(w, preset(name), alpha_F=alpha).codes_FD
    assert torch.equal(codes.double(), formula(name, w.double(), alpha64(name, w))[1])
    assert float((y - want).abs().max() / want.abs().max()) < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_lambda_0_is_bitwise_the_16_bit_linear(name: str) -> None:
    """α takes part with a gradient of exactly 0, so that the optimizer never misses one."""
    x, bias = gaussian(7, 256), gaussian(24, seed=2)
    w = gaussian(24, 256, seed=1).requires_grad_()
    alpha = learned_scale(name, w.detach())
    if alpha is not None:
        alpha.requires_grad_()
    y = bit_linear(x, w, bias, SIXTEEN_BIT, preset(name), alpha_F=alpha)
    assert torch.equal(y, F.linear(x, w, bias))
    grad = gaussian(7, 24, seed=3)
    y.backward(grad)
    plain = w.detach().clone().requires_grad_()
    F.linear(x, plain, bias).backward(grad)
    assert torch.equal(w.grad, plain.grad)  # type: ignore[arg-type]
    if alpha is not None:
        assert alpha.grad is not None
        assert torch.equal(alpha.grad, torch.zeros(24))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_formulas(name: str, strength: Strength) -> None:
    x, w, bias = (gaussian(*s, seed=i) for i, s in enumerate([(7, 256), (24, 256), (24,)]))
    alpha = learned_scale(name, w)
    leaves = [t.clone().requires_grad_() for t in (x, w, bias, *([] if alpha is None else [alpha]))]
    grad = gaussian(7, 24, seed=3)
    bit_linear(
        *leaves[:3], strength, preset(name), alpha_F=leaves[3] if alpha is not None else None
    ).backward(grad)

    lam, eps = strength.weight, strength.residual
    a, g, x64, w64 = alpha64(name, w), grad.double(), x.double(), w.double()
    w_hat, codes = formula(name, w64, a)
    plain = g.T @ x64
    inside = (w64 / a).abs() <= 0.99 if name == "paretoq" else torch.ones_like(w64).bool()
    want = [
        g @ (w64 + lam * (w_hat - w64) + eps * w64),
        plain * inside + eps * plain,
        g.sum(0),
    ]
    if name == "tequila":
        want[1] = want[1] + lam * 1e-3 * g.sum(0)[:, None] * (codes == 0)
    if name == "paretoq":
        slope = codes / 1.5 - (w64 / a) * inside
        want.append(lam * (plain * slope).sum(1) / math.sqrt(w.numel()))
        assert 0.02 < float((~inside).double().mean()) < 0.3
    for leaf, target in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        assert float((leaf.grad - target).abs().max() / target.abs().max()) < 5e-6


# --- Finite differences, where it is smooth ---


def test_gradient_of_alpha_against_finite_differences() -> None:
    """LSQ treats the rounding error of w / α as a constant: with it frozen, ŵ is smooth in α."""
    x, w = gaussian(5, 128).double(), gaussian(6, 128, seed=1).double()
    alpha = learned_scale("paretoq", w.float())
    assert alpha is not None
    alpha.requires_grad_()
    grad = gaussian(5, 6, seed=3).double()
    bit_linear(x, w, None, TERNARY, preset("paretoq"), alpha_F=alpha).backward(grad)
    at = alpha.detach().double()[:, None]
    inside = (w / at).abs() <= 0.99
    codes = torch.round(torch.clamp(w / at, -0.99, 0.99) * 1.5)
    error = codes / 1.5 - w / at

    def loss(a: Tensor) -> Tensor:
        level = torch.where(inside, w / a + error, codes / 1.5)
        return ((x @ (a * level).T) * grad).sum(0)

    h = 1e-6
    difference = (loss(at + h) - loss(at - h)) / (2 * h) / math.sqrt(w.numel())
    assert alpha.grad is not None
    assert float((alpha.grad - difference).abs().max() / difference.abs().max()) < 1e-6


def test_gradient_of_the_dead_weights_bias_against_finite_differences() -> None:
    """With no input only the bias is left; moving a weight within its dead zone moves it."""
    spec, x = preset("tequila"), torch.zeros(1, 128)
    w = gaussian(3, 128, seed=1).requires_grad_()
    dead = ternarize(w, spec).codes_FD == 0
    bit_linear(x, w, None, TERNARY, spec).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.where(dead, torch.tensor(1e-3), torch.tensor(0.0)))
    row, column = torch.nonzero(dead)[5].tolist()
    h = 0.01
    moved = w.detach().clone()
    moved[row, column] += h
    assert torch.equal(ternarize(moved, spec).codes_FD == 0, dead)
    with torch.no_grad():
        change = bit_linear(x, moved, None, TERNARY, spec) - bit_linear(x, w, None, TERNARY, spec)
    assert float(change[0, row]) == pytest.approx(1e-3 * h, rel=1e-2)
    assert float(change.abs().sum()) == float(change[0, row].abs())


# --- Adversarial weights ---


@pytest.mark.parametrize("name", NAMES)
def test_zeros_give_zeros_and_finite_gradients(name: str) -> None:
    """A row of zeros, and a matrix of zeros."""
    for rows_of_zeros in (slice(3, 4), slice(None)):
        w = gaussian(8, 128, seed=1)
        w[rows_of_zeros] = 0.0
        w.requires_grad_()
        alpha = initial_scale(w).requires_grad_() if name == "paretoq" else None
        y = bit_linear(gaussian(5, 128), w, None, TERNARY, preset(name), alpha_F=alpha)
        assert torch.equal(y[:, rows_of_zeros], torch.zeros_like(y[:, rows_of_zeros]))
        y.square().sum().backward()
        for leaf in (w, *([] if alpha is None else [alpha])):
            assert leaf.grad is not None
            assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_surfaces(name: str, value: float) -> None:
    """In the row (paretoq) or the group of a row, not elsewhere."""
    w = gaussian(8, 256, seed=1)
    w[3, 7] = value
    alpha = initial_scale(w) if name == "paretoq" else None
    y = bit_linear(gaussian(5, 256), w, None, TERNARY, preset(name), alpha_F=alpha)
    finite = y.isfinite().all(0)
    assert finite.tolist() == [row != 3 for row in range(8)]
    if alpha is not None:
        alpha = initial_scale(gaussian(8, 256, seed=1))
        alpha[5] = math.nan
        y = bit_linear(
            gaussian(5, 256), gaussian(8, 256), None, TERNARY, preset(name), alpha_F=alpha
        )
        assert y.isfinite().all(0).tolist() == [row != 5 for row in range(8)]


def test_scale_below_eps_stays_at_eps_and_keeps_its_gradient() -> None:
    w, x = gaussian(2, 64, seed=1), gaussian(5, 64)
    alpha = torch.tensor([-0.5, 1e-9]).requires_grad_()
    y = bit_linear(x, w, None, TERNARY, preset("paretoq"), alpha_F=alpha)
    torch.testing.assert_close(y, x @ (w.sign() * 1e-5 / 1.5).T)
    y.sum().backward()
    assert alpha.grad is not None
    assert bool((alpha.grad != 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_fused_matrices_compute_what_three_layers_do(name: str) -> None:
    rows = (32, 8, 16)
    matrices = [gaussian(n, 128, seed=n) * n for n in rows]
    fused = torch.cat(matrices).requires_grad_()
    alpha = learned_scale(name, fused.detach())
    x, bias, grad = gaussian(5, 128), gaussian(56, seed=1), gaussian(5, 56, seed=2)
    strength = Strength(0.8, 0.8, 0.1)
    if alpha is not None:
        alpha.requires_grad_()
    y = bit_linear(x, fused, bias, strength, preset(name), rows, alpha_F=alpha)
    y.backward(grad)
    outputs, gradients, scale_gradients = [], [], []
    alphas = [None] * 3 if alpha is None else alpha.detach().split(rows)
    for w, b, a, g in zip(matrices, bias.split(rows), alphas, grad.split(rows, dim=1), strict=True):
        w = w.clone().requires_grad_()
        a = None if a is None else a.clone().requires_grad_()
        alone = bit_linear(x, w, b, strength, preset(name), alpha_F=a)
        alone.backward(g)
        outputs.append(alone.detach())
        gradients.append(w.grad)
        scale_gradients.append(None if a is None else a.grad)
    torch.testing.assert_close(y.detach(), torch.cat(outputs, dim=1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fused.grad, torch.cat(gradients), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    if alpha is not None:
        torch.testing.assert_close(alpha.grad, torch.cat(scale_gradients), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [None, (16, 8)])
@pytest.mark.parametrize("name", [*NAMES, "b158 with a bias of dead weights"])
def test_finished_weights_give_the_trained_forward_bitwise(
    name: str, rows: tuple[int, ...] | None
) -> None:
    integer = name.startswith("b158")
    spec = replace(preset("b158"), deadzone_bias=0.01) if integer else preset(name)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = gaussian(7, 128).to(dtype), gaussian(24, 128, seed=1).to(dtype)
        bias, alpha = gaussian(24, seed=2).to(dtype), learned_scale(name, w)
        trained = bit_linear(x, w, bias, TERNARY, spec, rows, alpha_F=alpha)
        codes = ternarize(w, spec, rows, alpha_F=alpha)
        finished = ternary_linear(x, codes, finished_bias(w, bias, spec, rows), spec)
        assert torch.equal(trained, finished)
    assert finished_bias(w, None, preset("b158")) is None
    made = finished_bias(w, None, preset("tequila"))
    assert made is not None
    assert bool((made != 0).all())


# --- Sherry's sparsity ---


def test_exactly_one_of_four_inputs_is_zero() -> None:
    part = preset("sherry").weight
    gauss = gaussian(16, 256)
    coarse = torch.randint(-2, 3, (16, 256), generator=torch.Generator().manual_seed(1)).float()
    with_zeros = gauss * (gaussian(16, 256, seed=2) > 0)
    for w in (gauss, coarse, with_zeros, torch.zeros(16, 256), torch.full((16, 256), -1.0)):
        codes = quantize(w, part).codes
        zeros = (codes == 0).view(16, -1, 4)
        assert bool((zeros.sum(-1) == 1).all())
        smallest = w.abs().view(16, -1, 4).amin(-1)
        assert torch.equal(w.abs().view(16, -1, 4)[zeros].view(16, -1), smallest)
    assert torch.equal(quantize(torch.full((1, 128), -1.0), part).codes[0, :4].abs(), FIRST_IS_ZERO)


FIRST_IS_ZERO = torch.tensor([0, 1, 1, 1], dtype=torch.int8)


def test_sherry_gaussian_oracle() -> None:
    """s from the distribution of the smallest of four |z|; then MSE = 1 − ¾ s²."""
    t = torch.linspace(0, 10, 200_001, dtype=torch.float64)
    mean_of_smallest = torch.trapezoid(torch.erfc(t / math.sqrt(2)) ** 4, t)
    s = (4 * math.sqrt(2 / math.pi) - float(mean_of_smallest)) / 3
    assert (s, 1 - 0.75 * s * s) == pytest.approx((0.9765, 0.2849), abs=1e-4)
    part = replace(preset("sherry").weight, granularity="row", group_size=None)
    w = gaussian(2000, 2000)
    codes = quantize(w, part)
    assert float(codes.scale.mean()) == pytest.approx(s, abs=2e-3)
    residual = (w - dequantize(codes, part)).double().square().mean()
    assert float(residual) == pytest.approx(1 - 0.75 * s * s, abs=1.5e-3)


def test_inputs_must_come_in_fours(make_config: MakeConfig) -> None:
    rowwise = replace(preset("sherry").weight, granularity="matrix", group_size=None)
    with pytest.raises(ConfigError, match=r"one of each 4 inputs, but 30 inputs of a \[8, 30\]"):
        quantize(gaussian(8, 30), rowwise)
    shards = replace(rowwise, granularity="column_shard", num_shards=2)
    with pytest.raises(ConfigError, match=r"but 18 inputs of a \[8, 36\] weight share a scale"):
        quantize(gaussian(8, 36), shards)
    with pytest.raises(ConfigError, match="group_size=6 would split blocks of 4 inputs"):
        replace(preset("sherry").weight, group_size=6)
    with pytest.raises(ConfigError, match=r"one of each 4 inputs, which does not divide .*=66"):
        make_config("quant={preset: sherry, granularity: row}", "model.d_ff=66")
    assert quantize(gaussian(8, 36), rowwise).codes.shape == (8, 36)


# --- Specifications and configurations that cannot be ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodeSpec(measure="learned"), "measure='learned' has one scale for each row"),
        (
            lambda: replace(preset("paretoq").weight, rounding="stochastic"),
            "needs granularity='row', rounding='half_even'",
        ),
        (
            lambda: replace(preset("paretoq"), gradient="identity"),
            "measure='learned' with gradient='identity': a learned scale needs gradient='lsq'",
        ),
        (
            lambda: replace(preset("b158"), gradient="lsq"),
            "measure='absmean' with gradient='lsq'",
        ),
        (
            lambda: replace(
                preset("paretoq"), product="integer", activation=preset("b158").activation
            ),
            "differentiates ŵ itself: it needs product='dequantized'",
        ),
        (lambda: replace(preset("paretoq"), hadamard=128), "and no Hadamard rotation"),
        (
            lambda: replace(preset("sherry").weight, rounding="half_up"),
            "ranks weights instead of rounding: it is ternary only",
        ),
        (lambda: replace(preset("sherry").weight, code_max=2), "ternary only"),
        (lambda: replace(preset("tequila"), deadzone_bias=-1.0), "deadzone_bias=-1.0 must be 0 or"),
        (lambda: replace(preset("sherry"), residual=math.nan), "residual=nan must be 0 or more"),
        (lambda: replace(preset("sdu"), deadzone_bias=0.1), "sums weights whose code is 0"),
        (lambda: replace(preset("quest"), deadzone_bias=0.1), "no Hadamard rotation, and product"),
        (lambda: with_bits(preset("sherry").weight, 2), "'sparse_absmean' is ternary"),
        (lambda: with_bits(preset("paretoq").weight, 2), "'learned' is ternary"),
    ],
)
def test_impossible_specification(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_learned_scales_are_neither_forgotten_nor_superfluous() -> None:
    w = gaussian(4, 8)
    with pytest.raises(ValueError, match="measure='learned' with no learned scales"):
        bit_linear(w, w, None, TERNARY, preset("paretoq"))
    with pytest.raises(ValueError, match="measure='absmean' with learned scales"):
        bit_linear(w, w, None, TERNARY, preset("b158"), alpha_F=initial_scale(w))
    alpha = initial_scale(w)
    assert torch.equal(blend_weight(w, 1.0, preset("paretoq"), alpha), blended(w, alpha))


def blended(w: Tensor, alpha: Tensor) -> Tensor:
    part = preset("paretoq").weight
    return dequantize(quantize(w, part, alpha_F=alpha), part)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quant.preset=paretoq", "quant.weight_scale=absmean"],
            "weight_scale='absmean' contradicts preset 'paretoq', which learns its scales",
        ),
        (["quant.preset=paretoq", "quant.weight_bits=2"], "'learned' is ternary"),
        (["quant.preset=paretoq", "quant.granularity=matrix"], "one scale for each row"),
        (["quant.preset=paretoq", "quant.gradient=clip"], "a learned scale needs gradient='lsq'"),
        (["quant.preset=sherry"], r"quant: 128 \(group\) does not divide model.d_model=32"),
        (["quant={preset: sdu, deadzone_bias: 0.1}"], "sums weights whose code is 0"),
    ],
)
def test_impossible_configuration(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


@pytest.mark.parametrize(
    "spec",
    [
        *(preset(name) for name in NAMES),
        replace(preset("weight_only"), deadzone_bias=0.1),
        replace(preset("trilm"), gradient="clip"),
    ],
)
def test_tensor_parallel_layers_refuse_what_they_do_not_compute(spec: QuantSpec) -> None:
    with pytest.raises(ConfigError, match="tensor parallelism knows the presets b158"):
        check_shared_spec(spec)
    for name in ("b158", "absmedian", "weight_only", "trilm"):
        check_shared_spec(preset(name))


def test_overrides() -> None:
    assert quant_spec(QuantConfig(deadzone_bias=0.5)) == replace(preset("b158"), deadzone_bias=0.5)
    assert quant_spec(QuantConfig(preset="tequila", deadzone_bias=0.0)).deadzone_bias == 0.0
    spec = quant_spec(QuantConfig(preset="paretoq", activation_bits=8))
    assert spec.activation is not None
    assert spec.product == "dequantized"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["quant.preset=paretoq"], "a scale per row, not one a matrix"),
        (["quant.preset=tequila", "quant.granularity=row"], "a scale per row, not one a matrix"),
    ],
)
def test_export_refuses_what_the_packed_form_cannot_hold(
    make_config: MakeConfig, overrides: list[str], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{reason}.*; keep the checkpoint, or train with"):
        refuse_unpackable(make_config(*overrides).quant)
    for name in ("sherry", "tequila"):
        refuse_unpackable(make_config(f"quant={{preset: {name}, granularity: matrix}}").quant)
