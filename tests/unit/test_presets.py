"""Every preset against its formula, written out in float64.

Shapes: T tokens, D inputs, F outputs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from torch import Tensor

from bitscale.config import Config
from bitscale.config.presets import INT8_ROWS, PRESETS, preset
from bitscale.config.spec import QuantSpec, max_exact_inputs
from bitscale.errors import ConfigError
from bitscale.quant.quantizer import dequantize, quantize
from bitscale.quant.reference import bit_linear, ternarize, ternary_linear
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]

# The latter three are in test_literature_presets.py: they add terms and parameters of their own.
DETERMINISTIC = sorted(set(PRESETS) - {"stochastic", "paretoq", "tequila", "sherry"})
STRAIGHT_THROUGH = sorted(set(DETERMINISTIC) - {"quest"})
# Presets whose layer normalizes its input: gradients then go through the norm.
WITH_NORM = {"sdu"}


def density() -> tuple[Tensor, Tensor]:
    """Grid over ±8σ and the standard normal density times its width."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    return z, torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * float(z[1] - z[0])


def formula(name: str, w: Tensor) -> Tensor:
    """ŵ [F, D] in float64, from the papers' formulas."""
    magnitude = w.abs()
    median = magnitude.flatten().sort().values[(w.numel() - 1) // 2]
    match name:
        case "b158" | "hf" | "torchao" | "weight_only" | "trilm":
            s = magnitude.mean() + (1e-5 if name == "trilm" else 0.0)
            return s * torch.clamp(torch.round(w / s), -1, 1)
        case "onebit":
            s = magnitude.mean()
            return s * torch.clamp(torch.floor(w / s + 0.5), -1, 1)
        case "sdu" | "absmedian":
            return median * torch.clamp(torch.round(w / median), -1, 1)
        case "twn":
            survives = magnitude > 0.75 * magnitude.mean()
            return magnitude[survives].mean() * w.sign() * survives
        case "group64" | "group128" | "group256":
            size = int(name.removeprefix("group"))
            groups = w.view(w.shape[0], -1, size)
            s = groups.abs().mean(-1, keepdim=True)
            return (s * torch.clamp(torch.round(groups / s), -1, 1)).view_as(w)
        case "int2" | "int3" | "int4":
            bits = int(name[-1])
            factor = {2: 1.3139, 3: 0.7543, 4: 0.4244}[bits]
            s = factor * magnitude.mean(-1, keepdim=True)
            return s * torch.clamp(torch.round(w / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        case "quest":
            return trusted_levels(w @ walsh(w.shape[1])) @ walsh(w.shape[1]).T
    raise AssertionError(name)


def walsh(width: int) -> Tensor:
    """Block-diagonal orthonormal Hadamard matrix, float64: (−1)^(number of common one bits)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]
    block = torch.tensor(signs, dtype=torch.float64) / math.sqrt(128)
    return torch.block_diag(*[block] * (width // 128))


def trusted_levels(t: Tensor) -> Tensor:
    """QuEST's 16 levels, as its paper states them: centred steps up to 2.51393 rms."""
    largest = 2.51393 * t.square().mean(-1, keepdim=True).sqrt()
    step = 2 * largest / 15
    return torch.round(t.clamp(-largest, largest) / step + 0.5) * step - step / 2


def activation_formula(spec: QuantSpec, x: Tensor) -> Tensor:
    """x̂ [T, D] in float64."""
    if spec.norm == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    if spec.activation is None:
        return x
    if spec.hadamard is not None:
        return trusted_levels(x @ walsh(x.shape[1])) @ walsh(x.shape[1]).T
    r = x.abs().amax(-1, keepdim=True) / spec.activation.numerator
    scaled = x / r
    half_up = spec.activation.rounding == "half_up"
    codes = torch.floor(scaled + 0.5) if half_up else torch.round(scaled)
    return r * codes.clamp(-128, 127)


def expected(name: str, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, x̂ and ŵ in float64."""
    spec = preset(name)
    x_hat, w_hat = activation_formula(spec, x.double()), formula(name, w.double())
    bias = bias.double()
    y = x_hat @ w_hat.T
    if spec.bias == "after":
        return y + bias, x_hat, w_hat
    normed = activation_formula(replace(spec, activation=None), x.double())
    r = normed.abs().amax(-1, keepdim=True) / 128
    return y + bias * r * w_hat.abs().max(), x_hat, w_hat


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_forward_is_the_formula(name: str) -> None:
    x, w, bias = gaussian(7, 256), gaussian(24, 256, seed=1) * 0.05, gaussian(24, seed=2)
    y = bit_linear(x, w, bias, TERNARY, preset(name))
    want, _, w_hat = expected(name, x, w, bias)
    assert float((y - want).abs().max() / want.abs().max()) < 2e-6
    spec = preset(name).weight
    if name == "quest":
        return  # its codes are those of the rotated weight
    torch.testing.assert_close(
        dequantize(quantize(w, spec), spec).double(), w_hat, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_lambda_0_is_the_16_bit_linear(name: str) -> None:
    """Bitwise; a preset with a norm applies that at every λ, as its peer does."""
    x, w, bias = gaussian(7, 256), gaussian(24, 256, seed=1), gaussian(24, seed=2)
    normed = F.layer_norm(x, (256,)) if name in WITH_NORM else x
    y = bit_linear(x, w, bias, SIXTEEN_BIT, preset(name))
    assert torch.equal(y, F.linear(normed, w, bias))


@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
@pytest.mark.parametrize("strength", [TERNARY, Strength(0.4, 0.4), Strength(0.4, 0.0)])
def test_gradients_are_straight_through(name: str, strength: Strength) -> None:
    """dx = g w_λ (through the norm, if any), dw = gᵀ x_λ, db = Σ g or Σ g r s."""
    spec = preset(name)
    x, w, bias = (gaussian(*s, seed=i) for i, s in enumerate([(7, 256), (24, 256), (24,)]))
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    grad = gaussian(7, 24, seed=3)
    bit_linear(*leaves, strength, spec).backward(grad)

    plain = replace(spec, activation=None) if spec.norm == "layernorm" else None
    x64 = x.double().requires_grad_()
    base = x64 if plain is None else F.layer_norm(x64, (256,))
    x_hat, w_hat = activation_formula(spec, x.double()), formula(name, w.double())
    strength_x = strength.activation if spec.activation is not None else 0.0
    x_blend = base.detach() + strength_x * (x_hat - base.detach())
    w_blend = w.double() + strength.weight * (w_hat - w.double())
    g = grad.double()
    base.backward(g @ w_blend) if plain is not None else None
    want_x = x64.grad if plain is not None else g @ w_blend
    want_bias = g.sum(0)
    if spec.bias == "before":
        r = base.detach().abs().amax(-1, keepdim=True) / 128 if strength_x else 1.0
        want_bias = (g * r * w_hat.abs().max()).sum(0)
    for leaf, want in zip(leaves, (want_x, g.T @ x_blend, want_bias), strict=True):
        assert leaf.grad is not None
        assert want is not None
        assert float((leaf.grad - want).abs().max() / want.abs().max()) < 5e-6


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradient_of_inputs_against_finite_differences(name: str) -> None:
    """Where nothing is rounded (λ of activations 0) the layer is smooth in x and in the bias."""
    w = gaussian(6, 256, seed=1).double()
    x = gaussian(2, 256).double().requires_grad_()
    bias = gaussian(6, seed=2).double().requires_grad_()

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return bit_linear(x, w, bias, Strength(0.7, 0.0), preset(name))

    assert torch.autograd.gradcheck(layer, (x, bias), eps=1e-6, atol=1e-6, fast_mode=True)


def test_quest_trusts_where_the_quantized_value_is_near() -> None:
    """dx = (mask_x · (g ŵ_H)) Hᵀ, dw = (mask_w · (gᵀ x̂_H)) Hᵀ; the codes are odd integers."""
    x, w = gaussian(7, 256).requires_grad_(), gaussian(24, 256, seed=1).requires_grad_()
    grad = gaussian(7, 24, seed=3)
    H, g = walsh(256), grad.double()
    x_rotated, w_rotated = x.detach().double() @ H, w.detach().double() @ H
    x_hat, w_hat = trusted_levels(x_rotated), trusted_levels(w_rotated)

    def trusted(t: Tensor, t_hat: Tensor) -> Tensor:
        std = t.square().mean(-1, keepdim=True).sqrt()
        return (t_hat - t).abs() <= 2.51393 / 15 * std

    for strength, x_used, w_used in (
        (TERNARY, x_hat, w_hat),
        (Strength(0.4, 0.4), x_rotated.lerp(x_hat, 0.4), w_rotated.lerp(w_hat, 0.4)),
    ):
        x.grad = w.grad = None
        bit_linear(x, w, None, strength, preset("quest")).backward(grad)
        want_x = (trusted(x_rotated, x_hat) * (g @ w_used)) @ H.T
        want_w = (trusted(w_rotated, w_hat) * (g.T @ x_used)) @ H.T
        for leaf, want in ((x, want_x), (w, want_w)):
            assert leaf.grad is not None
            assert float((leaf.grad - want).abs().max() / want.abs().max()) < 5e-6
    share = float(trusted(w_rotated, w_hat).double().mean())
    assert 0.97 < share < 0.998  # Gaussian tails beyond the outermost level and a half step
    codes = ternarize(w, preset("quest")).codes_FD
    assert codes.unique().tolist() == list(range(-15, 16, 2))


def test_quest_levels_are_those_of_least_error() -> None:
    z, p = density()

    def mse(largest: float) -> float:
        step = 2 * largest / 15
        z_hat = torch.round(z.clamp(-largest, largest) / step + 0.5) * step - step / 2
        z_hat = z_hat.clamp(-largest, largest)
        return float((p * (z - z_hat).square()).sum())

    # Within the published constant's rounding and that of the grid.
    assert mse(2.51393) < min(mse(2.51393 * 0.98), mse(2.51393 * 1.02))


def test_rotation_needs_whole_blocks(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="hadamard=128 does not divide 100 inputs; use another"):
        bit_linear(gaussian(2, 100), gaussian(4, 100), None, TERNARY, preset("quest"))
    with pytest.raises(ConfigError, match=r"quant: 128 \(hadamard\) does not divide model.d_model"):
        make_config("quant.preset=quest")
    with pytest.raises(ConfigError, match="hadamard=96 is not a power of two; use one"):
        replace(preset("quest"), hadamard=96)
    with pytest.raises(ConfigError, match="hadamard=128; use product='dequantized'"):
        replace(preset("sdu"), hadamard=128)


@pytest.mark.parametrize("name", ["b158", "hf", "sdu", "int4", "group64"])
def test_clipped_gradient_stops_beyond_the_outermost_code(name: str) -> None:
    spec = replace(preset(name), gradient="clip", norm="none")
    w = gaussian(24, 128, seed=1).requires_grad_()
    free = w.detach().clone().requires_grad_()
    x, grad = gaussian(7, 128), gaussian(7, 24, seed=3)
    bit_linear(x, w, None, TERNARY, spec).backward(grad)
    bit_linear(x, free, None, TERNARY, replace(spec, gradient="identity")).backward(grad)
    codes = quantize(w, spec.weight)
    s = dequantize(codes._replace(codes=torch.ones_like(codes.codes)), spec.weight)
    scaled = w.detach() / s
    inside = (scaled >= spec.weight.code_min) & (scaled <= spec.weight.code_max)
    assert 0.001 < float((~inside).float().mean()) < 0.6
    assert w.grad is not None
    assert free.grad is not None
    assert torch.equal(w.grad, free.grad * inside)


@pytest.mark.parametrize(
    ("name", "scale", "zeros", "error"),
    [
        ("b158", 0.7979, 0.310, 0.263),
        ("hf", 0.7979, 0.310, 0.263),
        ("absmedian", 0.6745, 0.264, 0.318),
        ("sdu", 0.6745, 0.264, 0.318),
        ("twn", 1.214, 0.450, 0.190),
    ],
)
def test_gaussian_oracle(name: str, scale: float, zeros: float, error: float) -> None:
    """Integrals over the standard normal density against 4 million samples."""
    z, p = density()
    part = preset(name).weight
    threshold = 0.75 * math.sqrt(2 / math.pi) if name == "twn" else scale / 2
    z_hat = scale * z.sign() * (z.abs() > threshold)
    assert float((p * (z_hat == 0)).sum()) == pytest.approx(zeros, abs=1.5e-3)
    assert float((p * (z - z_hat).square()).sum()) == pytest.approx(error, abs=1e-3)
    w = gaussian(2000, 2000)
    ternary = ternarize(w, preset(name))
    assert float(ternary.scale) == pytest.approx(scale, abs=2e-3)
    assert float((ternary.codes_FD == 0).double().mean()) == pytest.approx(zeros, abs=1.7e-3)
    residual = (w - dequantize(quantize(w, part), part)).double().square().mean()
    assert float(residual) == pytest.approx(error, abs=1.5e-3)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1494), (3, 0.0406), (4, 0.0119)])
def test_multi_bit_steps_are_those_of_least_error(bits: int, error: float) -> None:
    z, p = density()
    part = preset(f"int{bits}").weight
    step = math.sqrt(2 / math.pi) / part.numerator

    def mse(s: float) -> float:
        z_hat = s * torch.clamp(torch.round(z / s), part.code_min, part.code_max)
        return float((p * (z - z_hat).square()).sum())

    assert mse(step) == pytest.approx(error, abs=1e-4)
    steps = [0.02 * i for i in range(5, 100)]
    assert mse(step) <= min(map(mse, steps))
    assert mse(step) < min(mse(step * 0.99), mse(step * 1.01))
    w = gaussian(1000, 1000)
    codes = quantize(w, part)
    assert sorted(codes.codes.unique().tolist()) == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    residual = (w - dequantize(codes, part)).square().mean()
    assert float(residual) == pytest.approx(error, rel=0.02)


def test_more_levels_err_less() -> None:
    w = gaussian(500, 500)
    errors = []
    for name in ("b158", "twn", "int2", "int3", "int4"):
        part = preset(name).weight
        errors.append(float((w - dequantize(quantize(w, part), part)).square().mean()))
    assert errors == sorted(errors, reverse=True)


# --- Granularity ---


def test_every_granularity_is_a_loop_over_its_tiles() -> None:
    w = gaussian(12, 64) * torch.logspace(-2, 1, 12)[:, None]
    w = w * torch.logspace(-1, 1, 64)
    part = preset("b158").weight
    tiles = {
        "row": w.split(1),
        "row_shard": w.split(4),
        "column_shard": w.split(16, dim=1),
        "group": [g for row in w.split(1) for g in row.split(16, dim=1)],
    }
    extra = {
        "row_shard": {"num_shards": 3},
        "column_shard": {"num_shards": 4},
        "group": {"group_size": 16},
    }
    for granularity, parts in tiles.items():
        spec = replace(part, granularity=granularity, **extra.get(granularity, {}))
        codes = quantize(w, spec)
        alone = [quantize(t.contiguous(), part) for t in parts]
        assert torch.equal(codes.scale.flatten(), torch.stack([a.scale for a in alone]))
        whole = dequantize(codes, spec)
        pieces = [dequantize(a, part) for a in alone]
        match granularity:
            case "column_shard":
                rebuilt = torch.cat(pieces, dim=1)
            case "group":
                rebuilt = torch.cat(pieces, dim=1).view(12, 64)
            case _:
                rebuilt = torch.cat(pieces)
        assert torch.equal(whole, rebuilt), granularity


@pytest.mark.parametrize("name", ["b158", "hf", "sdu", "group64", "int3", "twn"])
def test_fused_matrices_have_their_own_scales(name: str) -> None:
    """q, k and v stacked by rows compute what three layers do: outputs and gradients."""
    spec = replace(preset(name), norm="none")
    rows = (32, 8, 16)
    matrices = [gaussian(n, 128, seed=n) * n for n in rows]
    fused = torch.cat(matrices).requires_grad_()
    x, bias, grad = gaussian(5, 128), gaussian(56, seed=1), gaussian(5, 56, seed=2)
    y = bit_linear(x, fused, bias, TERNARY, spec, rows)
    y.backward(grad)
    outputs, gradients = [], []
    for w, b, g in zip(matrices, bias.split(rows), grad.split(rows, dim=1), strict=True):
        w = w.clone().requires_grad_()
        alone = bit_linear(x, w, b, TERNARY, spec)
        alone.backward(g)
        outputs.append(alone.detach())
        gradients.append(w.grad)
    torch.testing.assert_close(y.detach(), torch.cat(outputs, dim=1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(fused.grad, torch.cat(gradients), rtol=1e-5, atol=1e-5)
    one_scale = bit_linear(x, fused, bias, TERNARY, spec)
    if spec.weight.granularity == "matrix":
        assert float((one_scale - y).detach().abs().max()) > 1.0
    else:
        torch.testing.assert_close(one_scale, y)


@pytest.mark.parametrize("rows", [None, (16, 8)])
@pytest.mark.parametrize(
    "name", ["b158", "hf", "torchao", "twn", "group64", "int4", "trilm", "quest"]
)
def test_finished_weights_give_the_trained_forward_bitwise(
    name: str, rows: tuple[int, ...] | None
) -> None:
    spec = preset(name)
    for dtype in (torch.float32, torch.bfloat16):
        x, w, bias = gaussian(7, 128).to(dtype), gaussian(24, 128, seed=1).to(dtype), None
        trained = bit_linear(x, w, bias, TERNARY, spec, rows)
        finished = ternary_linear(x, ternarize(w, spec, rows), bias, spec)
        if spec.weight.scale_form == "multiply" and not spec.weight.is_ternary:
            continue
        assert torch.equal(trained, finished)


def test_finished_weights_refuse_a_division_by_q() -> None:
    spec = preset("sdu")
    w = gaussian(24, 128)
    with pytest.raises(ValueError, match="divides by q"):
        ternary_linear(gaussian(7, 128), ternarize(w, spec), None, spec)


def test_integer_sums_hold_for_wider_codes() -> None:
    assert max_exact_inputs(preset("b158")) == 2**24 // 128
    assert max_exact_inputs(preset("int4")) == 2**24 // (128 * 8)
    d_in = max_exact_inputs(preset("int4")) + 1
    with pytest.raises(ValueError, match="16385 inputs exceed 16384"):
        bit_linear(torch.ones(1, d_in), torch.ones(1, d_in), None, TERNARY, preset("int4"))
    x, w = gaussian(5, 512), gaussian(8, 512, seed=1)
    spec = preset("int4")
    codes, scale = ternarize(w, spec)
    rows = quantize(x, INT8_ROWS)
    sums = (rows.codes.long() @ codes.long().T).float()
    want = sums * rows.scale * scale.flatten()
    assert torch.equal(bit_linear(x, w, None, TERNARY, spec), want)
