"""Learned scales in layers and models: who owns them, when they are noticed.

Numerics are in test_literature_presets.py. Shapes: T tokens, D inputs, F outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from torch import Tensor, nn

from bitscale.config import Config, QuantConfig
from bitscale.config.presets import preset
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import (
    BitLinear,
    bit_linears,
    is_scale,
    prepare_weights,
    set_strength,
)
from bitscale.model.bitlinearize import bitlinearize, unbitlinearize
from bitscale.model.decoder import Decoder
from bitscale.optim import decayed_and_not
from bitscale.quant.learned import initial_scale
from bitscale.quant.reference import bit_linear
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from bitscale.telemetry import TernaryTelemetry

pytestmark = pytest.mark.unit


def make_layer(d_in: int = 64, d_out: int = 12) -> BitLinear:
    torch.manual_seed(0)
    return BitLinear(d_in, d_out, preset("paretoq"), bias=True)


@pytest.fixture
def decoder(make_config: Callable[..., Config]) -> Decoder:
    cfg = make_config("quant.preset=paretoq", "model.vocab_size=50", "model.bias=true")
    return Decoder(cfg.model, cfg.quant)


def test_scale_is_a_parameter_from_construction() -> None:
    layer = make_layer()
    assert layer.alpha is not None
    assert torch.equal(layer.alpha, initial_scale(layer.weight))
    assert list(layer.state_dict()) == ["weight", "bias", "alpha"]
    assert "alpha" not in BitLinear(8, 8, preset("b158")).state_dict()
    layer.strength = TERNARY
    x = gaussian(5, 64)
    want = bit_linear(
        x, layer.weight, layer.bias, TERNARY, preset("paretoq"), alpha_F=initial_scale(layer.weight)
    )
    assert torch.equal(layer(x), want)


def test_gradient_is_zero_in_16_bit_and_not_none() -> None:
    layer, x = make_layer(), gaussian(5, 64)
    assert layer.alpha is not None
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.alpha.grad is not None
    assert not layer.alpha.grad.any()
    layer.strength = TERNARY
    layer(x).sum().backward()
    assert layer.alpha.grad.any()


def test_adam_leaves_a_scale_alone_in_16_bit() -> None:
    """No gradient, no weight decay (it is one-dimensional): not a bit changes."""
    layer, x = make_layer(), gaussian(5, 64)
    decayed, others = decayed_and_not(layer.parameters())
    assert [p is layer.alpha for p in others] == [False, True]
    adam = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.1, weight_decay=0.1
    )
    assert layer.alpha is not None
    before, weight = layer.alpha.detach().clone(), layer.weight.detach().clone()
    for _ in range(3):
        adam.zero_grad()
        layer(x).square().sum().backward()
        adam.step()
    assert torch.equal(layer.alpha, before)
    assert not torch.equal(layer.weight, weight)
    assert int(adam.state[layer.alpha]["step"]) == 3


def test_prepared_codes_notice_a_new_scale() -> None:
    layer, x = make_layer(), gaussian(5, 64)
    assert layer.alpha is not None
    layer.strength = TERNARY
    prepare_weights(layer)
    assert layer.prepared is not None
    assert torch.equal(layer(x), make_again(layer)(x))
    with torch.no_grad():
        layer.alpha.mul_(0.5)
    assert torch.equal(layer(x), make_again(layer)(x))
    layer.prepare_weight()
    assert torch.equal(layer(x), make_again(layer)(x))


def make_again(layer: BitLinear) -> BitLinear:
    """The same layer, which has prepared nothing."""
    again = make_layer()
    again.load_state_dict(layer.state_dict())
    again.strength = layer.strength
    return again


def test_decoder_starts_scales_from_its_own_weights(decoder: Decoder) -> None:
    layers = dict(bit_linears(decoder))
    scales = {name for name, _ in decoder.named_parameters() if is_scale(name)}
    assert scales == {f"{name}.alpha" for name in layers}
    for layer in layers.values():
        assert torch.equal(layer.alpha, layer.weight.abs().amax(1))  # type: ignore[arg-type]
    tokens = torch.arange(16)[None]
    for strength in (SIXTEEN_BIT, Strength(0.5, 0.0), TERNARY):
        set_strength(decoder, strength)
        decoder.zero_grad()
        decoder(tokens, tokens).backward()
        gradients = [layer.alpha.grad for layer in layers.values() if layer.alpha is not None]
        assert all(grad is not None for grad in gradients)
        assert all(bool(grad.any()) == (strength.weight > 0) for grad in gradients)  # type: ignore[union-attr]


def test_the_other_parameters_start_as_without_scales(
    decoder: Decoder, make_config: Callable[..., Config]
) -> None:
    parameters = dict(decoder.named_parameters())
    other = Decoder(make_config("model.vocab_size=50", "model.bias=true").model, QuantConfig())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_bitlinearize_adds_scales_and_unbitlinearize_removes_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    keys, before = list(model.state_dict()), set(vars(model[0]))
    weights = [model[0].weight, model[2].weight]
    bitlinearize(model, "paretoq", fused={"0": 3})
    assert [name for name, _ in model.named_parameters() if is_scale(name)] == [
        "0.alpha",
        "2.alpha",
    ]
    assert model[0].weight is weights[0]
    x = gaussian(5, 16)
    model(x).sum().backward()
    assert model[0].alpha.grad.shape == (24,)  # type: ignore[union-attr]
    unbitlinearize(model)
    assert list(model.state_dict()) == keys
    assert set(vars(model[0])) == before
    assert torch.equal(model[0](x), F.linear(x, weights[0], model[0].bias))  # type: ignore[arg-type]


def test_convolutions_refuse_what_is_not_defined_for_them() -> None:
    for name in ("paretoq", "tequila"):
        with pytest.raises(ConfigError, match="0 is a Conv2d, for which learned scales and the"):
            bitlinearize(nn.Sequential(nn.Conv2d(4, 8, 3)), name)
    rowwise = replace(preset("sherry").weight, granularity="row", group_size=None)
    sherry = replace(preset("sherry"), weight=rowwise)
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    weight, x = model[0].weight, gaussian(2, 4, 7, 7)
    bitlinearize(model, sherry, strength=Strength(1.0, 1.0, 0.5))
    y = model(x)
    set_strength(model, TERNARY)
    want = model(x) + 0.5 * F.conv2d(x, weight)  # type: ignore[arg-type]
    torch.testing.assert_close(y, want)
    with pytest.raises(ConfigError, match=r"bitlinearize: 0: .*one of each 4 inputs, but 27"):
        bitlinearize(nn.Sequential(nn.Conv2d(3, 8, 3)), sherry)


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    yield parameter.data


def test_telemetry_reads_codes_by_the_learned_scale() -> None:
    layer = make_layer()
    assert layer.alpha is not None
    telemetry = TernaryTelemetry(nn.ModuleDict({"a": layer}))
    first = telemetry.read(gathered, compute=True)["a"]
    with torch.no_grad():
        layer.alpha.mul_(0.25)
    second = telemetry.read(gathered, compute=True)["a"]
    assert first["scale"] == pytest.approx(4 * float(second["scale"] or 0.0))
    assert float(second["zeros"] or 0.0) < float(first["zeros"] or 0.0)
    assert float(second["flipped"] or 0.0) > 0.1


@pytest.mark.parametrize("name", ["tequila", "sherry", "paretoq"])
def test_compiled_layer_computes_the_same(name: str) -> None:
    layer, x = BitLinear(128, 12, preset(name)), gaussian(5, 128)
    layer.strength = Strength(1.0, 1.0, 0.25)
    layer.prepare_weight()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
