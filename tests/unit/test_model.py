"""The decoder: what each part computes, and that each option does what it says.

Shapes: B batch, S sequence, D model width, F feed-forward width.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config import Checkpointing, ModelConfig, QuantConfig, RopeScaling
from bitscale.model.bitlinear import (
    BitLinear,
    PackedBitLinear,
    QuantizedInput,
    bit_linears,
    set_strength,
)
from bitscale.model.decoder import Decoder, same_document_mask
from bitscale.model.head import IGNORED_TARGET, Head
from bitscale.model.layers import (
    MLP,
    Attention,
    Rotary,
    rotary_frequencies,
    rotate,
)
from bitscale.model.norms import LayerNorm, RMSNorm
from bitscale.quant.pack import pack_2bit
from bitscale.quant.reference import int8_linear, ternarize
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

QUANT = QuantConfig()
VOCAB = 97
STRENGTHS = [SIXTEEN_BIT, Strength(0.5, 0.3), TERNARY]


def shape(**changes: Any) -> ModelConfig:
    small = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 48}
    # Larger than a real initialization, so that every part of the model matters to the output.
    return ModelConfig(**{**small, "num_kv_heads": 2, "init_std": 0.3, **changes})


def make_decoder(seed: int = 0, checkpointing: Checkpointing = "none", **changes: Any) -> Decoder:
    return Decoder(shape(**changes), QUANT, seed=seed, activation_checkpointing=checkpointing)


def tokens(batch: int = 2, seq_len: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def randomize(module: nn.Module) -> None:
    """Every parameter, norms included, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.3, generator=generator)


# --- Attention ---


@pytest.mark.parametrize("strength", STRENGTHS)
@torch.no_grad()
def test_later_tokens_do_not_reach_earlier_logits(strength: Strength) -> None:
    model = make_decoder()
    set_strength(model, strength)
    ids = tokens()
    before = model.logits(ids)
    for position in (1, 11, 23):
        changed = ids.clone()
        changed[:, position] = (ids[:, position] + 1) % VOCAB
        after = model.logits(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(dim=-1).all()


@pytest.mark.parametrize("strength", STRENGTHS)
@torch.no_grad()
def test_grouped_queries_equal_repeated_keys_and_values(strength: Strength) -> None:
    """A repeated matrix has the same mean magnitude, so the same codes at λ = 1."""
    grouped = Attention(shape(num_kv_heads=2), QUANT)
    full = Attention(shape(num_kv_heads=4), QUANT)
    for name in ("q", "o"):
        getattr(full, name).weight.copy_(getattr(grouped, name).weight)
    for name in ("k", "v"):
        heads = getattr(grouped, name).weight.view(2, 8, 32)
        repeated = heads.repeat_interleave(2, dim=0)  # query heads 0, 1 use kv head 0
        getattr(full, name).weight.copy_(repeated.reshape(32, 32))
    x_BSD, tables = noise(2, 12, 32), Rotary(8, 1e4, None)(12, torch.device("cpu"))
    for module in (grouped, full):
        set_strength(module, strength)
    want = full(x_BSD, *tables, None)
    torch.testing.assert_close(grouped(x_BSD, *tables, None), want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_attention_against_an_explicit_softmax() -> None:
    attention = Attention(shape(num_kv_heads=4, bias=True), QUANT)
    randomize(attention)
    x_BSD, (cos, sin) = noise(2, 9, 32), Rotary(8, 1e4, None)(9, torch.device("cpu"))

    def heads(linear: nn.Linear) -> Tensor:
        y = F.linear(x_BSD, linear.weight, linear.bias)
        return y.double().view(2, 9, 4, 8).transpose(1, 2)

    q, k = (rotate(heads(x), cos, sin).double() for x in (attention.q, attention.k))
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    scores.masked_fill_(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    mixed = (scores.softmax(dim=-1) @ heads(attention.v)).transpose(1, 2).reshape(2, 9, 32)
    want = mixed @ attention.o.weight.double().T + attention.o.bias.double()
    got = attention(x_BSD, cos, sin, None)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [SIXTEEN_BIT, TERNARY])
@torch.no_grad()
def test_document_mask_equals_separate_documents(strength: Strength) -> None:
    model = make_decoder()
    set_strength(model, strength)
    ids, targets, lengths = tokens(1), tokens(1, seed=1), [5, 1, 11, 7]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(ids, targets, documents, reduction="none")
    pieces = zip(ids.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True)
    alone = torch.cat([model(x, y, reduction="none") for x, y in pieces], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed, model(ids, targets, reduction="none"), atol=1e-2)


def test_document_mask_by_hand() -> None:
    mask = same_document_mask(torch.tensor([[7, 7, 3, 7]]))
    assert mask.shape == (1, 1, 4, 4)
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
    assert mask[0, 0].int().tolist() == want


@torch.no_grad()
def test_qk_norm_takes_the_magnitude_out_of_queries_and_keys() -> None:
    attention = Attention(shape(qk_norm=True), QUANT)
    tables = Rotary(8, 1e4, None)(12, torch.device("cpu"))
    x_BSD = noise(2, 12, 32) * 10
    before = attention(x_BSD, *tables, None)
    for linear, factor in ((attention.q, 3.0), (attention.k, 0.5)):
        linear.weight.mul_(factor)
    torch.testing.assert_close(attention(x_BSD, *tables, None), before, rtol=1e-3, atol=1e-4)
    plain = Attention(shape(), QUANT)
    before = plain(x_BSD, *tables, None)
    plain.q.weight.mul_(3.0)
    assert not torch.allclose(plain(x_BSD, *tables, None), before, atol=1e-2)


# --- Rotary embedding ---


def test_rotation_is_relative() -> None:
    """<rotate(q, s), rotate(k, t)> depends on s - t alone."""
    cos, sin = Rotary(16, 10000.0, None)(64, torch.device("cpu"))
    q, k = noise(16), noise(16, seed=1)

    def score(s: int, t: int) -> float:
        turned_q = rotate(q[None], cos[s : s + 1], sin[s : s + 1])
        return float((turned_q * rotate(k[None], cos[t : t + 1], sin[t : t + 1])).sum())

    for distance in (0, 1, 9):
        scores = [score(t + distance, t) for t in (0, 3, 20, 54)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)
    assert abs(score(9, 0) - score(0, 9)) > 1e-2
    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-5)


def test_rotation_is_that_of_complex_numbers() -> None:
    """Pairs (i, i + E/2), angle position · θ^(-2i/E): the half-split layout."""
    cos, sin = Rotary(8, 500.0, None)(10, torch.device("cpu"))
    x = noise(10, 8).double()
    angles = torch.arange(10.0)[:, None].double() * 500.0 ** (-torch.arange(4.0).double() / 4)
    turned = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin).double(), want, rtol=1e-5, atol=1e-5)


def test_linear_scaling_stretches_every_frequency() -> None:
    plain = rotary_frequencies(16, 1e4, None)
    scaled = rotary_frequencies(16, 1e4, RopeScaling(type="linear", factor=4.0))
    torch.testing.assert_close(scaled, plain / 4)
    assert plain.tolist() == pytest.approx([10000 ** (-2 * i / 16) for i in range(8)])


def test_llama3_scaling_against_its_published_form() -> None:
    """By wavelengths, as in Meta's release of Llama 3.1 (factor 8, 1, 4, 8192)."""
    scaling = RopeScaling(
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )
    want, kinds = [], []
    for frequency in rotary_frequencies(128, 500000.0, None).tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kinds.append("kept")
            want.append(frequency)
        elif wavelength > 8192 / 1:
            kinds.append("stretched")
            want.append(frequency / 8)
        else:
            kinds.append("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert set(kinds) == {"kept", "between", "stretched"}
    got = rotary_frequencies(128, 500000.0, scaling)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_tables_grow_with_the_sequence() -> None:
    rotary, cpu = Rotary(8, 1e4, None), torch.device("cpu")
    short = rotary(4, cpu)
    long = rotary(9, cpu)
    assert [t.shape for t in (*short, *long)] == [(4, 8), (4, 8), (9, 8), (9, 8)]
    assert torch.equal(long[0][:4], short[0])
    assert torch.equal(rotary(4, cpu)[1], short[1])
    assert not list(rotary.parameters())
    assert not rotary.state_dict()


# --- Feed-forward and norms ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "relu2_glu", "relu2"])
@torch.no_grad()
def test_feed_forward_formulas(kind: str, bias: bool) -> None:
    mlp = MLP(shape(mlp=kind, bias=bias), QUANT)
    randomize(mlp)
    x_BSD = noise(2, 5, 32).double()
    w = {name: p.double() for name, p in mlp.named_parameters()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()).double())

    up_BSF = linear("up", x_BSD)
    if kind == "relu2":
        h_BSF = up_BSF.clamp(min=0) ** 2
    else:
        gate_BSF = linear("gate", x_BSD)
        silu = gate_BSF / (1 + torch.exp(-gate_BSF))
        h_BSF = up_BSF * (silu if kind == "swiglu" else gate_BSF.clamp(min=0) ** 2)
    got = mlp(x_BSD.float()).double()
    torch.testing.assert_close(got, linear("down", h_BSF), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
@torch.no_grad()
def test_norms_against_torch(affine: bool) -> None:
    x = noise(3, 5, 32) * 3 + 1
    rms, layer = RMSNorm(32, 1e-3, affine=affine), LayerNorm(32, 1e-3, affine=affine)
    randomize(rms)
    randomize(layer)
    torch.testing.assert_close(rms(x), F.rms_norm(x, (32,), rms.weight, 1e-3))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (32,), layer.weight, None, 1e-3))
    assert len(list(rms.parameters())) == len(list(layer.parameters())) == int(affine)
    assert rms(x.bfloat16()).dtype == (torch.float32 if affine else torch.bfloat16)
    assert rms.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_sub_norm_precedes_the_output_and_down_projections() -> None:
    model = make_decoder(sub_norm=True)
    inputs: dict[str, QuantizedInput] = {}
    for name, layer in bit_linears(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model.logits(tokens())
    assert all(given.strength == 0.0 for given in inputs.values())
    for name, (x, _, _) in inputs.items():
        rms = x.square().mean(dim=-1).sqrt()
        normalized = torch.allclose(rms, torch.ones_like(rms), atol=1e-2)
        assert normalized, name  # the other projections follow the blocks' own norms
    assert {type(m) for n, m in model.named_modules() if n.endswith("sub_norm")} == {RMSNorm}
    plain = make_decoder()
    plain.layers[0].attn.o.register_forward_pre_hook(lambda _, args: inputs.update(o=args[0]))
    plain.logits(tokens())
    assert not torch.allclose(inputs["o"].x_TD.square().mean(dim=-1), torch.ones(2, 24), atol=1e-1)


# --- Parameters ---

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "all heads": {"num_kv_heads": None},
    "one kv head": {"num_kv_heads": 1},
    "bias": {"bias": True},
    "bias, relu2": {"bias": True, "mlp": "relu2"},
    "relu2_glu": {"mlp": "relu2_glu"},
    "bitnet": {"sub_norm": True, "qk_norm": True, "mlp": "relu2_glu"},
    "olmo": {"norm": "layernorm", "norm_affine": False},
    "layernorm": {"norm": "layernorm"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters(
    variant: str, count_parameters: Callable[[ModelConfig, int], int]
) -> None:
    model = make_decoder(**VARIANTS[variant])
    count = sum(p.numel() for p in model.parameters())
    assert count == count_parameters(shape(**VARIANTS[variant]), VOCAB)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model = make_decoder(**VARIANTS[variant])
    set_strength(model, TERNARY)
    model(tokens(), tokens(seed=1)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every key changes no softmax, so its gradient is rounding noise.
    assert [name for name in dead if not name.endswith("attn.k.bias")] == []


def test_tied_embeddings_are_one_parameter() -> None:
    model = make_decoder()
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    untied = make_decoder(tie_embeddings=False)
    assert untied.head.weight is not untied.embed.weight
    assert not torch.equal(untied.head.weight, untied.embed.weight)


def test_non_affine_layernorm_has_no_parameters() -> None:
    model = make_decoder(norm="layernorm", norm_affine=False)
    norms = [m for m in model.modules() if isinstance(m, LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    assert not [p for m in norms for p in m.parameters()]
    assert {p.ndim for p in model.parameters()} == {2}


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = make_decoder(seed=5)
    torch.manual_seed(2)
    torch.randn(10)
    again = make_decoder(seed=5, checkpointing="full")
    other = make_decoder(seed=6)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.ndim == 1), name


def test_initial_distribution() -> None:
    model = make_decoder(d_model=128, d_ff=256, num_layers=8, init_std=0.02, bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            back = name.endswith(("attn.o.weight", "mlp.down.weight"))
            want = 0.02 / 4 if back else 0.02  # sqrt(2 · 8) = 4
            assert float(parameter.detach().std()) == pytest.approx(want, rel=0.06), name
            assert abs(float(parameter.detach().mean())) < want / 10, name


# --- Quantization inside the model ---


def test_strength_reaches_every_bitlinear_and_the_head() -> None:
    model = make_decoder()
    layers = dict(bit_linears(model))
    assert set(layers) == {
        f"layers.{i}.{name}"
        for i in range(2)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == set()
    assert {layer.strength for layer in layers.values()} == {SIXTEEN_BIT}
    set_strength(model, Strength(0.25, 0.5))
    strengths = {layer.strength for layer in layers.values()} | {model.head.strength}
    assert strengths == {Strength(0.25, 0.5)}


@torch.no_grad()
def test_each_layer_is_quantized_at_its_strength() -> None:
    """Turning one layer's λ to 1 changes the output: no layer ignores it."""
    model, ids = make_decoder(), tokens()
    before = model.logits(ids)
    for name, layer in bit_linears(model):
        layer.strength = TERNARY
        assert not torch.allclose(model.logits(ids), before, atol=1e-3), name
        layer.strength = SIXTEEN_BIT
    assert torch.equal(model.logits(ids), before)


@torch.no_grad()
def test_head_bits() -> None:
    x = noise(3, 5, 32)
    eight, sixteen = (Head(32, VOCAB, QUANT, bits=bits) for bits in (8, 16))
    for head in (eight, sixteen):
        set_strength(head, TERNARY)
    assert torch.equal(sixteen(x), F.linear(x, sixteen.weight))
    assert torch.equal(eight(x), int8_linear(x, eight.weight, TERNARY, QUANT))
    assert not torch.equal(eight(x), F.linear(x, eight.weight))
    set_strength(eight, SIXTEEN_BIT)
    assert torch.equal(eight(x), F.linear(x, eight.weight))
    assert make_decoder(head_bits=8).head.bits == 8


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_layer_is_bitwise_the_trained_one(bias: bool) -> None:
    trained = BitLinear(32, 48, QUANT, bias=bias)
    set_strength(trained, TERNARY)
    codes_FD, scale = ternarize(trained.weight, QUANT)
    packed = PackedBitLinear(pack_2bit(codes_FD), scale, trained.bias, QUANT)
    x = noise(2, 7, 32)
    assert torch.equal(packed(x), trained(x))
    assert not list(packed.parameters())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_activation_checkpointing_changes_nothing(strength: Strength, masked: bool) -> None:
    documents = (torch.arange(24) // 7).expand(2, 24) if masked else None
    results = []
    for checkpointing in get_args(Checkpointing):
        model = make_decoder(checkpointing=checkpointing)
        set_strength(model, strength)
        loss = model(tokens(), tokens(seed=1), documents)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, *recomputed in zip(*results, strict=True):
        assert all(torch.equal(plain, other) for other in recomputed)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_recomputes(checkpointing: Checkpointing) -> None:
    calls: list[torch.nn.Module] = []
    model = make_decoder(checkpointing=checkpointing)
    attn = model.layers[0].attn
    for layer in (attn.q, attn.o):
        layer.register_forward_pre_hook(lambda module, _: calls.append(module))
    model(tokens(), tokens(seed=1)).backward()
    # Recomputation of a block goes through both layers, that between products ends in o.
    again = {"full": [attn.q, attn.o], "selective": [attn.o]}[checkpointing]
    assert calls == [attn.q, attn.o, *again]
    model.eval()(tokens(), tokens(seed=1))
    assert calls == [attn.q, attn.o, *again, attn.q, attn.o]


# --- Loss ---


@torch.no_grad()
def test_loss_is_the_mean_over_targets_that_count() -> None:
    model, ids, targets = make_decoder(), tokens(), tokens(seed=1)
    targets[0, 3:7] = IGNORED_TARGET
    log_probabilities = model.logits(ids).double().log_softmax(dim=-1)
    counted = targets != IGNORED_TARGET
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = model(ids, targets, reduction="none")
    assert losses.shape == (2, 24)
    torch.testing.assert_close(losses.double(), -picked * counted, rtol=1e-5, atol=1e-5)
    mean = -(picked * counted).sum() / counted.sum()
    torch.testing.assert_close(model(ids, targets).double(), mean, rtol=1e-6, atol=1e-6)
    assert (losses[0, 3:7] == 0).all()


@pytest.mark.parametrize("strength", STRENGTHS)
@torch.no_grad()
def test_bf16_model_gives_fp32_logits_near_the_fp32_model(strength: Strength) -> None:
    model, ids = make_decoder(init_std=0.05), tokens()
    set_strength(model, strength)
    exact = model.logits(ids)
    rounded = model.bfloat16().logits(ids)
    assert rounded.dtype == exact.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.1
