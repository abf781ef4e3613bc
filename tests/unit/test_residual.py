"""The annealed residual (Sherry): its schedule, its derivatives, and layers on kernels.

ε x wᵀ is added to a layer's output. Shapes: T tokens, D inputs, F outputs.
"""

import math
from collections.abc import Callable

import pytest
import torch
from gaussian import gaussian
from torch import Tensor

from bitscale.config import Config
from bitscale.config.presets import preset
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import BitLinear, prepare_weights, set_kernels, set_strength
from bitscale.quant.reference import bit_linear
from bitscale.quant.schedule import (
    SIXTEEN_BIT,
    TERNARY,
    Strength,
    quant_strength,
    residual_value,
)

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]


def test_residual_warms_up_and_anneals_to_zero() -> None:
    values = [residual_value(step, 100, 1.0, 0.1) for step in range(103)]
    assert values[0] == 0.0
    assert values[5] == pytest.approx(0.5)
    assert values[10] == 1.0 == max(values)
    assert values[55] == pytest.approx(0.5)
    assert values[75] == pytest.approx((1 + math.cos(math.pi * 65 / 90)) / 2)
    assert values[100:] == [0.0, 0.0, 0.0]
    assert residual_value(0, 100, 0.4, 0.0) == 0.4
    assert residual_value(0, 0, 1.0, 0.0) == 0.0
    assert residual_value(99, 100, 2.0, 1.0) == pytest.approx(1.98)


def test_residual_is_a_function_of_the_step(make_config: MakeConfig) -> None:
    """Transition at step 40 of 100: from 0 at 40 over the peak to 0 at 99, the last one."""
    cfg = make_config("quant={preset: sherry, granularity: row}")
    assert quant_strength(39, cfg) == SIXTEEN_BIT
    residuals = [quant_strength(step, cfg).residual for step in range(40, 100)]
    assert residuals[0] == residuals[-1] == 0.0
    assert residuals[-2] > 0.0
    assert residuals[:6] == sorted(residuals[:6])
    assert 0.99 < max(residuals) <= 1.0
    assert quant_strength(99, cfg) == TERNARY
    ramped = make_config(
        "quant={preset: sherry, granularity: row}",
        "transition.ramp={shape: linear, over: {steps: 20}}",
        "transition.residual={peak: 0.5, warmup: 0.0, over: {steps: 40}}",
    )
    assert quant_strength(40, ramped) == SIXTEEN_BIT
    assert quant_strength(50, ramped).residual == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert quant_strength(80, ramped) == TERNARY
    for override in ("quant.preset=b158", "transition.at=null"):
        other = make_config("quant={preset: sherry, granularity: row}", override)
        assert all(quant_strength(step, other).residual == 0.0 for step in range(100))
    added = make_config("transition.residual.peak=0.25")
    assert max(quant_strength(step, added).residual for step in range(100)) > 0.24


def test_residual_must_end_before_the_run(make_config: MakeConfig) -> None:
    sherry = "quant={preset: sherry, granularity: row}"
    with pytest.raises(ConfigError, match="ends at step 100, but the run's last step is 99"):
        make_config(sherry, "transition.residual.over={steps: 60}")
    make_config(sherry, "transition.residual.over={steps: 59}")
    make_config("transition.residual.over={steps: 60}")  # b158 has none that could end


def test_residual_against_finite_differences() -> None:
    x = gaussian(2, 128).double().requires_grad_()
    w = gaussian(4, 128, seed=1).double().requires_grad_()

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return bit_linear(x, w, None, Strength(0.0, 0.0, 0.6), preset("sherry"))

    assert torch.autograd.gradcheck(layer, (x, w), eps=1e-6, atol=1e-6, fast_mode=True)
    with torch.no_grad():
        low, high = (
            bit_linear(x, w, None, Strength(1.0, 1.0, eps), preset("sherry")) for eps in (0.2, 0.7)
        )
        torch.testing.assert_close((high - low) / 0.5, x @ w.T)


@pytest.mark.parametrize("name", ["b158", "sherry"])
def test_residual_is_added_beside_kernels_and_specification(name: str) -> None:
    """A kernel does not know it: the layer is then computed by the specification."""
    layer = BitLinear(128, 12, preset(name))
    set_kernels(layer, "auto", "cpu")
    x, grad = gaussian(5, 128), gaussian(5, 12, seed=1)
    for residual in (0.5, 0.0):
        strength = Strength(1.0, 1.0, residual)
        set_strength(layer, strength)
        prepare_weights(layer)
        layer.weight.grad = None
        y = layer(x)
        y.backward(grad)
        plain = layer.weight.detach().clone().requires_grad_()
        want = bit_linear(x, plain, None, strength, preset(name))
        want.backward(grad)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(layer.weight.grad, plain.grad)


def test_residual_needs_kernels_that_know_it(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"quant\.kernel='triton' with .* does not compute"):
        make_config("transition.residual.peak=0.5", "quant.kernel=triton")
    with pytest.raises(ConfigError, match=r"quant\.gradient_bits=8 does not compute"):
        make_config("transition.residual.peak=0.5", "quant.gradient_bits=8")
    with pytest.raises(ConfigError, match=r"16-bit products that parallel\.tp=2 does not share"):
        make_config("transition.residual.peak=0.5", "parallel.tp=2")
    make_config("transition.residual.peak=0.5", "quant.kernel=auto")
