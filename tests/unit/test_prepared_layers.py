"""What BitLinear does once instead of several times: weights a step, inputs, norm and codes.

Shapes: T tokens, D inputs, F outputs.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import NoHostMemory
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from bitscale import bitlinearize
from bitscale.config import Checkpointing, ModelConfig, QuantConfig
from bitscale.config.presets import PRESETS, preset
from bitscale.errors import ConfigError, KernelUnavailable
from bitscale.model.bitlinear import (
    BitLinear,
    bit_linears,
    forget_weights,
    prepare_weights,
    set_kernels,
    set_strength,
)
from bitscale.model.decoder import Block, Decoder
from bitscale.quant.kernels import get_kernels, log_specification, plain
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

D, FF, VOCAB = 32, 48, 61
STRENGTHS = {
    "16 bit": SIXTEEN_BIT,
    "ramp": Strength(0.3, 0.6),
    "weights first": Strength(1.0, 0.5),
    "weights only": Strength(0.7, 0.0),
    "activations only": Strength(0.0, 0.7),
    "ternary": TERNARY,
}


def decoder(quant: QuantConfig | None = None, **changes: Any) -> Decoder:
    fields = {"vocab_size": VOCAB, "num_layers": 2, "d_model": D, "num_heads": 4, "d_ff": FF}
    return Decoder(ModelConfig(**{**fields, **changes}), quant or QuantConfig(), seed=1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model: Decoder) -> tuple[Tensor, ...]:
    loss = model(*tokens())
    return (loss, *torch.autograd.grad(loss, list(model.parameters())))


def count_calls(model: nn.Module) -> Counter[str]:
    """Counts of the kernels that `model` calls from now on."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    kernels = plain.KERNELS._replace(
        **{
            name: counted(name, function)
            for name, function in plain.KERNELS._asdict().items()
            if name != "name"
        }
    )
    for _, layer in bit_linears(model):
        layer.kernels = kernels
    return calls


# --- Weights ---


@pytest.mark.parametrize(
    "quantizer", ["b158", "absmedian", "twn", "group64", "int4", "quest", "sdu"]
)
@pytest.mark.parametrize("name", STRENGTHS)
def test_preparing_changes_no_bit(quantizer: str, name: str) -> None:
    model = decoder(QuantConfig(preset=quantizer), d_model=128, d_ff=256)
    set_strength(model, STRENGTHS[name])
    without = loss_and_gradients(model)
    prepare_weights(model)
    for got, want in zip(loss_and_gradients(model), without, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
@pytest.mark.parametrize("name", ["ramp", "ternary"])
def test_weights_are_quantized_once_for_all_micro_batches(
    name: str, checkpointing: Checkpointing
) -> None:
    model = decoder()
    model.activation_checkpointing = checkpointing
    set_strength(model, STRENGTHS[name])
    calls = count_calls(model)
    kernel = "ternarize" if name == "ternary" else "blend_weight"
    num_layers = len(list(bit_linears(model)))
    prepare_weights(model)
    prepare_weights(model)  # nothing has changed
    for _ in range(3):
        loss_and_gradients(model)
    assert calls[kernel] == num_layers
    forget_weights(model)
    loss_and_gradients(model)
    # Of a block's seven, those of o and down are in what selective checkpointing computes again.
    again = {"none": 0, "selective": num_layers * 2 // 7, "full": num_layers}[checkpointing]
    assert calls[kernel] == 2 * num_layers + again


def fresh(layer: BitLinear) -> BitLinear:
    """The same layer, which has prepared nothing."""
    copied = copy.deepcopy(layer)
    forget_weights(copied)
    return copied


def test_a_changed_weight_or_strength_is_noticed() -> None:
    layer = BitLinear(D, FF, QuantConfig())
    x = noise(5, D)
    set_strength(layer, TERNARY)
    prepare_weights(layer)
    before = layer(x)
    with torch.no_grad():
        layer.weight[0] = -layer.weight[0]
    assert not torch.equal(layer(x), before)
    prepare_weights(layer)
    set_strength(layer, Strength(0.5, 0.5))
    blended = layer(x)
    forget_weights(layer)
    assert torch.equal(layer(x), blended)
    set_strength(layer, SIXTEEN_BIT)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    set_strength(layer, TERNARY)
    prepare_weights(layer)
    before = layer(x)
    layer.weight.data = layer.weight.data * 3  # another storage, of no other version
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), fresh(layer)(x))


def test_a_write_through_data_needs_forget() -> None:
    """The documented limit: PyTorch counts no version of `.data`."""
    layer = BitLinear(D, FF, QuantConfig())
    x = noise(5, D)
    set_strength(layer, TERNARY)
    prepare_weights(layer)
    before = layer(x)
    layer.weight.data.mul_(2)
    assert torch.equal(layer(x), before)
    forget_weights(layer)
    assert not torch.equal(layer(x), before)


class CopiesMasters(torch.optim.SGD):
    """As Megatron's optimizer: the update reaches the weights through `.data`."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.copy_(parameter.data - 0.5 * parameter.grad)


@pytest.mark.parametrize(
    "make",
    [lambda weights: torch.optim.SGD(weights, lr=0.5, fused=True), CopiesMasters],
    ids=["fused", "through data"],
)
def test_a_step_of_an_optimizer_is_noticed_without_another_version(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    layer = BitLinear(D, FF, QuantConfig())
    set_strength(layer, TERNARY)
    optimizer, x = make([layer.weight]), noise(5, D)
    for _ in range(2):
        prepare_weights(layer)
        before, version = layer(x), layer.weight._version
        before.square().sum().backward()
        optimizer.step()
        assert layer.weight._version == version, "what this test is about"
        assert not layer.is_prepared()
        assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), fresh(layer)(x))
    # Who gives codes knows when they end: DeepSpeed's update is not of the module's own weights.
    layer.use_codes(layer._ternarize())
    optimizer.step()
    assert layer.is_prepared()


def test_drawn_codes_are_drawn_anew() -> None:
    layer = BitLinear(D, FF, QuantConfig(preset="stochastic"))
    set_strength(layer, TERNARY)
    prepare_weights(layer)
    x = noise(5, D)
    assert not torch.equal(layer(x), layer(x))


# --- Inputs ---


def test_each_distinct_input_is_quantized_once() -> None:
    model = decoder(sub_norm=True)
    set_strength(model, TERNARY)
    calls = count_calls(model)
    loss_and_gradients(model)
    # The inputs of q, k, v; of o; of gate, up; of down: all behind a norm.
    assert calls["rms_norm_quantize_rows"] == calls["rms_norm_grad"] == 4 * 2
    assert calls["quantize_rows"] == 0
    assert calls["integer_linear"] == calls["input_grad"] == calls["weight_grad"] == 7 * 2


def test_layer_norm_keeps_its_own_pass() -> None:
    model = decoder(norm="layernorm", norm_affine=False)
    set_strength(model, TERNARY)
    calls = count_calls(model)
    loss_and_gradients(model)
    assert (calls["quantize_rows"], calls["rms_norm_quantize_rows"]) == (4 * 2, 0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norm_is_the_norm_and_then_the_layers(affine: bool, dtype: torch.dtype) -> None:
    m = ModelConfig(
        vocab_size=VOCAB, num_layers=1, d_model=D, num_heads=4, d_ff=FF, norm_affine=affine
    )
    block = Block(m, QuantConfig()).to(dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise(D))
    set_strength(block, TERNARY)
    cos_SE, sin_SE = decoder().rotary(8, torch.device("cpu"))
    x_BSD = noise(2, 8, D).to(dtype).requires_grad_()
    fused = block(x_BSD, cos_SE, sin_SE, None)
    h = x_BSD + block.attn(block.attn_norm(x_BSD), cos_SE, sin_SE, None)
    apart = h + block.mlp(block.mlp_norm(h))
    assert torch.equal(fused, apart)
    inputs = [x_BSD, *block.parameters()]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(
        torch.autograd.grad(fused.square().sum(), inputs),
        torch.autograd.grad(apart.square().sum(), inputs),
        strict=True,
    ):
        assert got.isfinite().all()
        assert float((got - want).norm()) <= bound * float(want.norm())


def test_normed_values_are_not_there_to_be_misread() -> None:
    model = decoder()
    set_strength(model, TERNARY)
    layer = model.layers[0]
    given = layer.attn.q.quantize_input(noise(2, 8, D), layer.attn_norm)
    assert given.x_TD.isnan().all()
    assert given.x_TD.untyped_storage().nbytes() == given.x_TD.element_size()
    set_strength(layer.attn.k, Strength(0.5, 0.5))
    with pytest.raises(AssertionError, match="the input has another layer's λ"):
        layer.attn.k(given)
    set_strength(layer.attn.k, SIXTEEN_BIT)
    with pytest.raises(AssertionError, match="this layer quantizes its own input"):
        layer.attn.k(given)


# --- Memory, main_grad, compilation ---


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of distinct memory that autograd keeps for the backward pass of `run`."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(kept.values())


def test_saved_for_backward() -> None:
    """D + 4 bytes a token for an input, however many layers read it; of a weight, its codes."""
    num_tokens, width = 256, 512
    q, k = (BitLinear(width, width, QuantConfig()).bfloat16() for _ in range(2))
    layers = nn.ModuleList([q, k])
    set_strength(layers, TERNARY)
    prepare_weights(layers)
    x_TD = noise(num_tokens, width).bfloat16().requires_grad_()
    codes = 2 * (width * width + 4)

    def run() -> list[Tensor]:
        given = q.quantize_input(x_TD)
        return [q(given), k(given)]

    assert saved_bytes(run) == num_tokens * (width + 4) + codes
    sixteen = nn.Linear(width, width, bias=False).bfloat16()
    assert saved_bytes(lambda: sixteen(x_TD)) == 2 * (num_tokens * width + width * width)


def test_gradient_goes_into_main_grad() -> None:
    layer = BitLinear(D, FF, QuantConfig(), bias=True)
    set_strength(layer, TERNARY)
    x_TD, grad_TF = noise(9, D), noise(9, FF, seed=1)
    layer(x_TD).backward(grad_TF)
    want = layer.weight.grad.clone()
    layer.weight.grad = None
    layer.weight.main_grad = torch.ones(FF, D)
    layer(x_TD).backward(grad_TF)
    assert layer.weight.grad is None
    assert torch.equal(layer.weight.main_grad, 1 + want)
    # Megatron's convention: it waits for a gradient of any content, and reads the flag.
    layer.weight.grad_added_to_main_grad = False
    layer(x_TD).backward(grad_TF)
    assert layer.weight.grad is not None
    assert layer.weight.grad_added_to_main_grad is True
    assert torch.equal(layer.weight.main_grad, 1 + want + want)


@pytest.mark.parametrize("name", ["16 bit", "ramp", "ternary"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_compiled_block_has_no_graph_break(name: str, prepared: bool) -> None:
    model = decoder(num_layers=1)
    block = model.layers[0]
    set_strength(block, STRENGTHS[name])
    if prepared:
        prepare_weights(block)
    cos_SE, sin_SE = model.rotary(8, torch.device("cpu"))
    x_BSD = noise(2, 8, D).requires_grad_()
    inputs = [x_BSD, *block.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, want = (f(x_BSD, cos_SE, sin_SE, None) for f in (compiled, block))
    assert torch.equal(got, want)
    for left, right in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_serves_every_step_of_one_strength() -> None:
    """New weights and codes need no new graph; another λ does, as docs/kernels.md says."""
    layer = BitLinear(D, FF, QuantConfig())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs, graphs = [], []
    for strength in (TERNARY, TERNARY, TERNARY, Strength(0.5, 0.5)):
        set_strength(layer, strength)
        prepare_weights(layer)
        outputs.append(compiled(noise(5, D)))
        assert torch.equal(outputs[-1], layer(noise(5, D)))
        graphs.append(counter.frame_count)
        with torch.no_grad():
            layer.weight.add_(0.1 * noise(FF, D, seed=len(graphs)))
    assert graphs[:3] == [1, 1, 1] and graphs[3] > 1
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_copied_from_or_to_the_host(name: str) -> None:
    """Tensors of the meta device have no values, and an operator that mixes devices is seen."""
    for fused in (None, (16, 8, 24)):
        with torch.device("meta"):
            layer = BitLinear(256, FF, preset(name), bias=True)
            x_TD = torch.empty(2, 3, 256, requires_grad=True)
        if fused:
            layer.rows, layer.kernels = fused, None
        for strength in (*STRENGTHS.values(), Strength(1.0, 1.0, 0.3)):
            set_strength(layer, strength)
            with NoHostMemory():
                prepare_weights(layer)
                layer(x_TD).sum().backward()
    assert x_TD.grad is not None and x_TD.grad.is_meta


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("bits", [None, 8, 16, 24])
def test_nothing_waits_for_the_device(name: str, bits: int | None) -> None:
    """Fake tensors have no values: whoever asks for one (`item`, `if tensor`) fails."""
    with FakeTensorMode():
        layer = BitLinear(D, FF, QuantConfig(gradient_bits=bits))
        set_strength(layer, STRENGTHS[name])
        norm = decoder().layers[0].attn_norm
        x_TD = torch.randn(5, D, requires_grad=True)
        y_TF = layer(layer.quantize_input(x_TD, norm))
        y_TF.sum().backward()
        assert x_TD.grad is not None and x_TD.grad.shape == (5, D)


# --- Choice of kernels ---


def test_gradient_bits_reach_the_layer() -> None:
    x_TD, grad_TF = noise(64, D), noise(64, FF, seed=1)
    gradients = {}
    for bits in (None, 8, 16, 24):
        torch.manual_seed(0)
        layer = BitLinear(D, FF, QuantConfig(gradient_bits=bits))
        set_strength(layer, TERNARY)
        layer(x_TD).backward(grad_TF)
        gradients[bits] = layer.weight.grad
    exact = gradients[None]
    errors = [float((gradients[bits] - exact).norm() / exact.norm()) for bits in (8, 16, 24)]
    assert 1e-3 < errors[0] < 3e-2
    assert 1e-6 < errors[1] < 1e-4
    assert errors[2] < 1e-6


def test_set_kernels() -> None:
    model = decoder()
    set_kernels(model, "reference", "cpu")
    assert model.layers[0].attn.q.kernels is get_kernels("reference", "cpu")
    with pytest.raises(KernelUnavailable, match=r"^quant.kernel='triton' needs an NVIDIA GPU"):
        set_kernels(model, "triton", "cpu")
    other = decoder(QuantConfig(preset="twn"))
    for name in ("reference", "auto"):
        set_kernels(other, name, "cpu")
        assert other.layers[0].attn.q.kernels is None


def test_auto_says_once_what_it_leaves_to_plain_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    log_specification.cache_clear()
    linears = nn.ModuleDict({name: nn.Linear(D, 3 * D) for name in ("a", "b", "qkv")})
    with caplog.at_level(logging.INFO, "bitscale.quant.kernels"):
        bitlinearize(linears, "twn", include=["a", "b"], kernel="auto")
        bitlinearize(linears, include="qkv", fused={"qkv": 3}, kernel="auto")
    assert [layer.kernels for _, layer in bit_linears(linears)] == [None] * 3
    assert caplog.messages == [
        f"quant.kernel='auto': plain PyTorch computes layers with {what}; kernels know b158 and "
        "absmedian with one matrix a weight"
        for what in ("another quantizer", "several matrices in a weight")
    ]
    log_specification.cache_clear()


def test_a_kernel_for_a_preset_that_it_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine with a GPU; the kernels themselves are not reached.
    monkeypatch.setattr("bitscale.quant.kernels._why_no_triton", lambda device_type: None)
    monkeypatch.setattr("bitscale.quant.kernels._triton_table", lambda: plain.KERNELS)
    get_kernels.cache_clear()
    message = (
        r"^quant.kernel='triton' computes b158 and absmedian with one matrix a weight, and {} has "
        r"another quantizer or several; use quant.kernel=reference$"
    )
    with pytest.raises(ConfigError, match=message.format("layers.0.attn.q")):
        set_kernels(decoder(QuantConfig(preset="twn")), "triton", "cuda")
    linears = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D)})
    with pytest.raises(ConfigError, match=message.format("qkv")):
        bitlinearize(linears, fused={"qkv": 3}, kernel="triton")
    assert type(linears["qkv"]) is nn.Linear
    get_kernels.cache_clear()
