"""What a decoder costs, by arithmetic, against the decoder itself."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bitscale.config import Checkpointing, ModelConfig, QuantConfig, quant_spec
from bitscale.model import cost
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.model.cost import Phase, Setting, way_of
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.unit

STRENGTHS: dict[Phase, Strength] = {
    "16 bit": SIXTEEN_BIT,
    "ramp": Strength(0.5, 0.5),
    "ternary": TERNARY,
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "num_layers": 2,
    "d_model": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 160,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "query norms": {"qk_norm": True, "tie_embeddings": False},
    "BitNet b1.58 2B4T": {"mlp": "relu2_glu", "sub_norm": True},
    "GPT": {"mlp": "relu2", "norm": "layernorm", "bias": True, "num_kv_heads": None},
    "OLMo": {"norm": "layernorm", "norm_affine": False},
    "OLMo 2": {"post_norm": True, "qk_norm": "width", "bias": "qkv"},
    "norms without weight": {"norm_affine": False, "qk_norm": True, "sub_norm": True},
}
BATCH, SEQ_LEN = 2, 64


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **changes})


def decoder(
    m: ModelConfig,
    phase: Phase,
    dtype: torch.dtype,
    *,
    preset: str = "b158",
    ckpt: Checkpointing = "none",
) -> Decoder:
    quant = QuantConfig(preset=preset)  # type: ignore[arg-type]
    model = Decoder(m, quant, activation_checkpointing=ckpt).to(dtype).train()
    set_strength(model, STRENGTHS[phase])
    prepare_weights(model)
    return model


def batch(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(vocab_size, (BATCH, SEQ_LEN + 1))
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return ids, targets, torch.zeros_like(ids)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_decoder(variant: str) -> None:
    m = model_config(**VARIANTS[variant])
    held, model = cost.parameters(m), Decoder(m, QuantConfig())
    assert held.total == sum(p.numel() for p in model.parameters())
    assert held.matrices == sum(layer.weight.numel() for _, layer in bit_linears(model))


def test_parameters_of_committed_sizes(count_parameters: Callable[..., int]) -> None:
    m = model_config(num_layers=7, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14336)
    assert cost.parameters(m).total == count_parameters(m, SIZES["vocab_size"])


def test_stages_and_shards_add_up_to_the_model() -> None:
    m = model_config(num_layers=6, tie_embeddings=False, norm_affine=False)
    whole = cost.parameters(m)
    parts = [
        cost.parameters(m, num_layers=n, tp=2, has_embedding=n == 3, has_head=n == 1)
        for n in (3, 2, 1)
    ]
    assert whole.total == 2 * sum(part.total for part in parts)
    flops = [cost.forward_flops(m, 64, num_layers=n, tp=2, has_head=n == 1) for n in (3, 2, 1)]
    assert cost.forward_flops(m, 64).total == 2 * sum(part.total for part in flops)


def test_key_value_heads_fewer_than_ranks_are_replicated() -> None:
    m = model_config(num_heads=8, num_kv_heads=2)
    assert [cost.shard(m, tp).kv_heads for tp in (1, 2, 4, 8)] == [2, 1, 1, 1]
    assert cost.shard(m, 8).q == cost.shard(m, 8).kv == 8


def saved_bytes(model: Decoder, dtype_bytes: int, reset: bool) -> int:
    """Bytes of the distinct storages that a forward pass keeps, and of prepared weights; without
    the weights themselves."""
    ids, targets, documents = batch(SIZES["vocab_size"])
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    for _, layer in bit_linears(model):
        for held in layer.prepared or ():
            for tensor in (held,) if isinstance(held, Tensor) else held or ():
                if tensor.numel() > 1:
                    keep(tensor)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, targets, documents if reset else None)
    return sum(storage.nbytes() for storage in kept.values())


def expected_saved(
    m: ModelConfig,
    phase: Phase,
    dtype_bytes: int,
    preset: str,
    reset: bool,
    ckpt: Checkpointing,
) -> float:
    spec = quant_spec(QuantConfig(preset=preset))  # type: ignore[arg-type]
    at = Setting(
        phase, way_of(spec), spec.activation is not None, dtype_bytes, SEQ_LEN,
        reset_attention=reset, checkpointing=ckpt,
    )  # fmt: skip
    per_token = cost.embedding_saved_bytes() + sum(cost.head_saved_bytes(m, at).values())
    a_step, a_pass, unprepared = cost.weight_copies(phase, at.way, dtype_bytes)
    if spec.weight.rounding == "stochastic":
        a_step, a_pass = 0, unprepared
    per_token += m.num_layers * sum(cost.block_saved_bytes(m, at).values())
    if ckpt != "none" and reset:
        per_token += SEQ_LEN
    tables = 2 * 4 * SEQ_LEN * m.d_model // m.num_heads
    matrices = cost.parameters(m).matrices
    kept = matrices - m.num_layers * cost.recomputed_matrices(m, ckpt)
    num_tokens = BATCH * SEQ_LEN
    bytes_ = num_tokens * per_token + cost.loss_saved_bytes(m, at, num_tokens) + tables
    return bytes_ + a_step * matrices + a_pass * kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("phase", STRENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_bytes_are_those_of_the_decoder(
    variant: str, phase: Phase, dtype: torch.dtype
) -> None:
    m = model_config(**VARIANTS[variant])
    sizes: dict[tuple[bool, Checkpointing], int] = {}
    for reset, ckpt in itertools.product((False, True), get_args(Checkpointing)):
        measured = saved_bytes(decoder(m, phase, dtype, ckpt=ckpt), dtype.itemsize, reset)
        expected = expected_saved(m, phase, dtype.itemsize, "b158", reset, ckpt)
        assert expected == pytest.approx(measured, rel=1e-3), (ckpt, reset)
        sizes[reset, ckpt] = measured
    for reset in (False, True):
        assert sizes[reset, "none"] > sizes[reset, "selective"] > sizes[reset, "full"]


@pytest.mark.parametrize(
    "preset", ["hf", "onebit", "torchao", "trilm", "twn", "stochastic", "weight_only", "int4"]
)
@pytest.mark.parametrize("phase", ["ramp", "ternary"])
def test_saved_bytes_of_presets_without_kernels(preset: str, phase: Phase) -> None:
    m = model_config(d_model=128, d_ff=256)
    kinds: tuple[Checkpointing, ...] = ("none", "selective")
    for ckpt in kinds:
        model = decoder(m, phase, torch.bfloat16, preset=preset, ckpt=ckpt)
        expected = expected_saved(m, phase, 2, preset, False, ckpt)
        assert expected == pytest.approx(saved_bytes(model, 2, False), rel=0.01), ckpt


@pytest.mark.parametrize("preset", ["b158", "torchao"])
@pytest.mark.parametrize("phase", STRENGTHS)
@pytest.mark.parametrize("ckpt", get_args(Checkpointing))
def test_flops_are_those_that_pytorch_counts(
    phase: Phase, ckpt: Checkpointing, preset: str
) -> None:
    m = model_config(num_layers=3)
    model = decoder(m, phase, torch.bfloat16, preset=preset, ckpt=ckpt)
    way = way_of(quant_spec(QuantConfig(preset=preset)))  # type: ignore[arg-type]
    ids, targets, _ = batch(SIZES["vocab_size"])
    tokens = ids.numel()
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(ids, targets)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    flops = cost.forward_flops(m, SEQ_LEN)
    again = cost.recomputed_flops(m, SEQ_LEN, phase, way, ckpt, num_layers=None)
    assert tokens * flops.total == pytest.approx(forward.get_total_flops(), rel=1e-6)
    expected = tokens * (2 * flops.total + again.total)
    assert expected == pytest.approx(backward.get_total_flops(), rel=1e-6)
