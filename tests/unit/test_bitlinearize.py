"""Any model's layers made quantized and back: what must stay, what must change, what is refused.

Shapes: B batch, D inputs, F outputs.
"""

import copy
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from kernel_cases import NEEDS_CPU_KERNELS
from torch import Tensor, nn

import bitscale
from bitscale.config import QuantConfig
from bitscale.config.presets import preset
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import QUANTIZATION, BitConv2d, BitLinear, set_strength
from bitscale.model.bitlinearize import bitlinearize, unbitlinearize
from bitscale.quant.quantizer import dequantize, quantize
from bitscale.quant.reference import INT8_ROWS, bit_linear
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from bitscale.telemetry import TernaryTelemetry

pytestmark = pytest.mark.unit


class Tiny(nn.Module):
    """Embedding tied to the head, fused q/k/v, a layer used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.again = self.blocks[0]
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        h = q * k + v
        for block in self.blocks:
            h = h + F.gelu(block(h))
        return self.lm_head(self.again(h))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


TOKENS = torch.arange(12).view(2, 6)


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())


def test_optimizer_built_before_keeps_training_the_weights() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model).backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in parameters.items()}

    names = bitlinearize(model, exclude="lm_head")
    assert names == ("qkv", "blocks.0", "blocks.1")
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in after)
    before = {name: p.detach().clone() for name, p in after.items()}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(not torch.equal(state[n], optimizer.state[p]["exp_avg"]) for n, p in after.items())
    assert losses[-1] < losses[0] - 0.5


def test_forward_is_that_of_the_preset_and_back() -> None:
    model = tiny()
    reference = copy.deepcopy(model)
    bitlinearize(model, "hf", include=["blocks.*"], exclude="blocks.1")
    assert isinstance(model.blocks[0], BitLinear)
    assert type(model.blocks[1]) is nn.Linear
    x = gaussian(3, 16)
    plain = reference.blocks[0]
    want = bit_linear(x, plain.weight, plain.bias, TERNARY, preset("hf"))
    assert torch.equal(model.blocks[0](x), want)
    assert not torch.equal(model.blocks[0](x), plain(x))

    set_strength(model, Strength(0.5, 0.25))
    want = bit_linear(x, plain.weight, plain.bias, Strength(0.5, 0.25), preset("hf"))
    assert torch.equal(model.blocks[0](x), want)
    set_strength(model, SIXTEEN_BIT)
    assert torch.equal(model(TOKENS), reference(TOKENS))

    assert unbitlinearize(model) == ("blocks.0",)
    assert type(model.blocks[0]) is nn.Linear
    assert vars(model.blocks[0]).keys() == vars(plain).keys()
    assert torch.equal(model(TOKENS), reference(TOKENS))
    assert unbitlinearize(model) == ()


@pytest.mark.parametrize("name", ["b158", "twn", "quest"])
def test_sums_are_exact_under_autocast(name: str) -> None:
    """bf16 would round them: another output than that of the exported model."""
    layer = nn.Linear(128, 8)
    bitlinearize(layer, name)
    x, grad = gaussian(3, 128).requires_grad_(), gaussian(3, 8, seed=1)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)])
    assert all(torch.equal(got, want) for want, got in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("b158", "reference"),
        ("twn", "reference"),
        pytest.param("b158", "cpu", marks=NEEDS_CPU_KERNELS),
    ],
)
def test_one_token_without_a_batch(name: str, kernel: str) -> None:
    layer = nn.Linear(16, 8)
    bitlinearize(layer, name, kernel=kernel)
    x, grad = gaussian(16).requires_grad_(), gaussian(8, seed=1)
    leaves = [x, layer.weight, layer.bias]
    for strength in (TERNARY, Strength(0.5, 0.5), SIXTEEN_BIT):
        set_strength(layer, strength)
        y, want = layer(x), layer(x[None])
        assert y.shape == (8,) and torch.equal(y, want[0])
        for left, right in zip(
            torch.autograd.grad(y, leaves, grad),
            torch.autograd.grad(want, leaves, grad[None]),
            strict=True,
        ):
            assert torch.equal(left, right)


@NEEDS_CPU_KERNELS
def test_the_next_layer_may_write_into_the_output() -> None:
    """nn.ReLU(inplace=True); autograd refuses that for a view made in a custom function."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True))
    reference = copy.deepcopy(model)
    bitlinearize(model, kernel="cpu")
    bitlinearize(reference)
    x = gaussian(2, 3, 16)
    grads = []
    for each in (model, reference):
        each(x).sum().backward()
        grads.append(each[0].weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["b158", "twn"])
def test_a_gradient_of_the_gradient_is_refused_where_it_would_be_wrong(name: str) -> None:
    layer = nn.Linear(16, 8)
    bitlinearize(layer, name)
    x, grad = gaussian(2, 16).requires_grad_(), gaussian(2, 8, seed=1)

    def penalty(strength: Strength) -> Tensor:
        set_strength(layer, strength)
        (grad_x,) = torch.autograd.grad(layer(x), x, grad, create_graph=True)
        return grad_x.square().sum()

    penalty(Strength(0.99, 0.99)).backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match=r"create_graph=True.* first derivative only; leave"):
        penalty(TERNARY)


def test_what_is_tied_stays_tied() -> None:
    model = tiny()
    bitlinearize(model)
    assert model.lm_head.weight is model.embed.weight
    assert model.again is model.blocks[0]
    assert isinstance(model.again, BitLinear)
    assert len(list(model.parameters())) == len(list(tiny().parameters()))
    loss(model).backward()
    assert model.embed.weight.grad is not None
    rows = model.embed.weight.grad.abs().sum(dim=1)
    assert (rows > 0).all()  # through the head: tokens that were not looked up too
    unbitlinearize(model)
    assert model.lm_head.weight is model.embed.weight


def test_a_layer_is_found_under_any_of_its_names() -> None:
    assert bitlinearize(tiny(), include="again") == ("blocks.0",)
    assert bitlinearize(tiny(), exclude=["again", "qkv", "lm_head"]) == ("blocks.1",)


def test_hooks_buffers_mode_dtype_and_frozen_weights_stay() -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    layer.register_buffer("mask", torch.ones(4))
    layer.weight.requires_grad_(False)
    layer.note = "mine"  # type: ignore[assignment]
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    model = nn.Sequential(layer, nn.Dropout()).eval()
    bitlinearize(model)
    assert model[0] is layer
    assert isinstance(layer, BitLinear)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == torch.bfloat16
    assert layer.note == "mine"
    assert model(gaussian(2, 8).bfloat16()).dtype == torch.bfloat16
    assert calls == ["before", "after"]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "0.mask"}


def test_root_device_copies_and_meta() -> None:
    root = nn.Linear(8, 4)
    assert bitlinearize(root) == ("",)
    assert isinstance(root, BitLinear)
    twin = copy.deepcopy(root)
    x = gaussian(2, 8)
    assert torch.equal(twin(x), root(x))
    assert twin.quant == root.quant
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    bitlinearize(model)
    assert model[0].weight.is_meta


def test_state_dict_loads_both_ways() -> None:
    model, plain = tiny(), tiny()
    bitlinearize(model)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.qkv.weight, plain.qkv.weight)
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("fused", [{"qkv": 3}, {"q*": (16, 16, 16)}])
def test_fused_matrices_get_a_scale_each(fused: dict[str, Any]) -> None:
    model = tiny()
    with torch.no_grad():
        model.qkv.weight[:16] *= 50
    bitlinearize(model, include="qkv", fused=fused)
    x = gaussian(3, 16)
    parts = [bit_linear(x, w, None, TERNARY, preset("b158")) for w in model.qkv.weight.split(16)]
    assert torch.equal(model.qkv(x), torch.cat(parts, dim=1))
    assert not torch.equal(
        bit_linear(x, model.qkv.weight, None, TERNARY, preset("b158")), model.qkv(x)
    )
    assert set(vars(model.qkv)) - set(vars(tiny().qkv)) == set(QUANTIZATION)
    unbitlinearize(model)
    assert vars(model.qkv).keys() == vars(tiny().qkv).keys()


def test_two_calls_with_two_specifications() -> None:
    model = tiny()
    bitlinearize(model, "int4", include="blocks.*")
    names = bitlinearize(model, QuantConfig(preset="absmedian"), exclude="lm_head")
    assert names == ("qkv",)
    assert model.blocks[1].quant == preset("int4")
    assert model.qkv.quant == QuantConfig(preset="absmedian")


# --- Convolutions ---


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("name", ["b158", "trilm", "int4"])
def test_convolution_is_that_of_the_quantized_tensors(
    name: str, padding_mode: str, groups: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, padding_mode=padding_mode)
    plain = copy.deepcopy(conv)
    assert bitlinearize(nn.Sequential(conv), name) == ("0",)
    assert isinstance(conv, BitConv2d)
    x = gaussian(5, 4, 9, 8) * torch.logspace(-1, 1, 5)[:, None, None, None]
    x.requires_grad_()
    spec = preset(name)
    w_hat = dequantize(quantize(plain.weight.flatten(1), spec.weight), spec.weight)
    plain.weight.data = w_hat.view_as(plain.weight)
    images = quantize(x.flatten(1), INT8_ROWS)
    x_hat = dequantize(images, INT8_ROWS).view_as(x) if spec.activation is not None else x.detach()
    x_hat.requires_grad_()
    y, want = conv(x), plain(x_hat)
    assert torch.equal(y, want)
    grad = gaussian(*y.shape, seed=1)
    y.backward(grad)
    want.backward(grad)
    assert torch.equal(x.grad, x_hat.grad)
    assert torch.equal(conv.weight.grad, plain.weight.grad)
    assert torch.equal(conv.bias.grad, plain.bias.grad)
    torch.testing.assert_close(conv(x[0]), y[0], rtol=0, atol=1e-6)  # an image without a batch


def test_convolution_at_lambda_0_is_bitwise_the_plain_one() -> None:
    conv = nn.Conv2d(4, 6, 3)
    x = gaussian(5, 4, 9, 8)
    want = conv(x)
    model = nn.Sequential(conv)
    bitlinearize(model, strength=SIXTEEN_BIT)
    assert torch.equal(model(x), want)
    set_strength(model, TERNARY)
    assert not torch.equal(model(x), want)
    unbitlinearize(model)
    assert type(conv) is nn.Conv2d
    assert torch.equal(model(x), want)


def test_vision_model_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    bitlinearize(model, "absmedian")
    labels = torch.arange(32) % 2
    images = gaussian(32, 1, 8, 8)
    images[labels == 1, :, :4] += 1.0
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        value = F.cross_entropy(model(images), labels)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.3 * losses[0]


# --- What is refused ---


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "block.*"}, r"include='block.\*' matches no .*there are 5 layers: 'qkv'"),
        ({"exclude": ["lm_haed"]}, "exclude='lm_haed' matches no linear layer"),
        ({"include": "qkv", "exclude": "q*"}, "nothing to convert"),
        ({"fused": {"kv": 2}}, "fused='kv' matches no layer that is converted"),
        ({"fused": {"qkv": 5}}, "qkv has 48 rows, not divisible into 5 equal"),
        ({"fused": {"qkv": (16, 16)}}, r"48 rows, but fused matrices of 16 \+ 16 = 32"),
        ({"spec": "group64"}, "qkv: quantizer group_size=64 does not divide the 16 inputs"),
        ({"spec": "b159"}, "preset 'b159' is unknown"),
        ({"spec": QuantConfig(preset="twn", weight_bits=2)}, "ternary"),
        (
            {"strength": Strength(1.5, 1.0)},
            r"^strength.weight=1.5 must be in \[0, 1\]: 0 is the 16-",
        ),
    ],
)
def test_refused_and_left_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        bitlinearize(model, **options)
    assert not any(isinstance(m, BitLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (Strength(1.0, -0.1), r"^strength.activation=-0.1 must be in \[0, 1\]: .*; use bitscale.q"),
        (Strength(float("nan"), 0.0), r"^strength.weight=nan must be in \[0, 1\]"),
        (Strength(1.0, 1.0, float("inf")), "^strength.residual=inf must be 0 or more: "),
    ],
)
def test_impossible_strength(strength: Strength, message: str) -> None:
    model = tiny()
    bitlinearize(model)
    with pytest.raises(ConfigError, match=message):
        set_strength(model, strength)
    assert model.qkv.strength == TERNARY


def test_too_many_inputs_are_refused_before_the_transition() -> None:
    layer = nn.Linear(16_385, 1)
    message = (
        r"^bitlinearize: 0 has 16385 inputs, .* exactly up to 16384; exclude it or use product="
    )
    with pytest.raises(ConfigError, match=message):
        bitlinearize(nn.Sequential(layer), "int4", strength=SIXTEEN_BIT)
    assert type(layer) is nn.Linear
    assert bitlinearize(nn.Sequential(layer), "b158") == ("0",)


def test_subclasses_are_not_converted_behind_their_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Doubling(4, 4))
    with pytest.raises(ConfigError, match=r"1 is a Doubling, .*exclude='1'"):
        bitlinearize(model)
    assert type(model[0]) is nn.Linear
    assert bitlinearize(model, exclude="1") == ("0",)
    with pytest.raises(ConfigError, match="NonDynamicallyQuantizableLinear"):
        bitlinearize(nn.MultiheadAttention(8, 2))


def test_nothing_left_to_convert() -> None:
    model = tiny()
    bitlinearize(model)
    with pytest.raises(ConfigError, match="excluded or quantized already, of 5 layers"):
        bitlinearize(model)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        bitlinearize(nn.Sequential(nn.ReLU()))


def test_convolutions_refuse_what_is_defined_for_rows_only() -> None:
    with pytest.raises(ConfigError, match="0 is a Conv2d, for which norm='layernorm'"):
        bitlinearize(nn.Sequential(nn.Conv2d(1, 1, 3)), "sdu")
    with pytest.raises(ConfigError, match="fused='0': 0 is no linear layer"):
        bitlinearize(nn.Sequential(nn.Conv2d(1, 2, 3)), fused={"0": 2})


def test_encoder_layers_fast_path_would_read_past_the_quantizer() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    with pytest.raises(ConfigError, match="set_fastpath_enabled"):
        bitlinearize(model, include="linear*")
    x = gaussian(2, 3, 16)
    with torch.no_grad():
        want = model(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            bitlinearize(model, include="linear*")
            assert float((model(x) - want).abs().max()) > 1e-3
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        # What the refusal is about: with the fast path the quantized layers do nothing.
        assert float((model(x) - want).abs().max()) < 1e-4


# --- Telemetry ---


@pytest.mark.parametrize("name", ["b158", "int4", "group64", "stochastic"])
def test_telemetry_reads_every_kind_of_codes(name: str) -> None:
    """And draws nothing from the generator that the training run draws from."""
    model = nn.Sequential(nn.Linear(64, 512))
    bitlinearize(model, name)
    with torch.no_grad():
        model[0].weight.copy_(gaussian(512, 64, seed=5))  # the draws come from seed 0
    telemetry = TernaryTelemetry(model)
    before = torch.get_rng_state()
    first = telemetry.read(nullcontext, compute=True)["0"]
    same = telemetry.read(nullcontext, compute=True)["0"]
    assert first["flipped"] is None
    assert same["flipped"] == 0.0
    with torch.no_grad():
        model[0].weight[:128] *= -1
    flipped = telemetry.read(nullcontext, compute=True)["0"]["flipped"]
    assert torch.equal(torch.get_rng_state(), before)
    assert flipped is not None
    zeros = first["zeros"]
    assert zeros is not None
    assert flipped == pytest.approx(0.25 * (1 - zeros), abs=0.03)
    assert zeros == pytest.approx({"int4": 0.135, "stochastic": 0.259}.get(name, 0.31), abs=0.04)
    assert first["scale"] == pytest.approx(
        {"int4": 0.339, "stochastic": 0.674}.get(name, 0.798), abs=0.03
    )


# --- The package ---


def test_importing_bitscale_does_not_import_torch() -> None:
    code = "import bitscale, sys; bitscale.QuantSpec; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_offers_what_it_names() -> None:
    assert all(getattr(bitscale, name) is not None for name in bitscale.__all__)
    assert bitscale.bitlinearize is bitlinearize
    with pytest.raises(AttributeError, match="no attribute 'bitlinearise'"):
        _ = bitscale.bitlinearise  # type: ignore[attr-defined]
