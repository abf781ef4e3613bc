"""megatron-core's own GPTModel with our layer spec: against our decoder, and over TP ranks.

Shapes: B batch, S sequence.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron_cpu import megatron_on_cpu
from torch import Tensor
from world import World

from bitscale.config import ModelConfig, QuantConfig
from bitscale.errors import ConfigError
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import prepare_weights, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore::UserWarning")]

LAYERS, D, HEADS, KV_HEADS, FF, VOCAB, B, S = 2, 64, 8, 4, 96, 256, 2, 32
HEAD = D // HEADS
STEPS, TRANSITION, RAMP = 20, 8, 6
World_of = Callable[[int], World]


def strength_at(step: int) -> Strength:
    value = min(max((step - TRANSITION) / RAMP, 0.0), 1.0)
    return Strength(value, value)


def text_batches() -> list[Tensor]:
    """Bytes of this file: real text, [B, S + 1] a step."""
    data = torch.tensor(list(Path(__file__).read_bytes()))
    return list(data[: STEPS * B * (S + 1)].view(STEPS, B, S + 1))


def our_decoder() -> Decoder:
    m = ModelConfig(
        vocab_size=VOCAB, num_layers=LAYERS, d_model=D, num_heads=HEADS, num_kv_heads=KV_HEADS,
        d_ff=FF, init_std=0.05,
    )  # fmt: skip
    return Decoder(m, QuantConfig(), seed=4)


def megatron_weights(decoder: Decoder) -> dict[str, Tensor]:
    """Our weights under Megatron's names, fused in its order: q q k v of each group; gate, up."""
    weights = {
        "embedding.word_embeddings.weight": decoder.embed.weight,
        "decoder.final_layernorm.weight": decoder.norm.weight,
    }
    per_group = HEADS // KV_HEADS * HEAD
    for index, block in enumerate(decoder.layers):
        attn, mlp, name = block.attn, block.mlp, f"decoder.layers.{index}"
        groups = zip(
            attn.q.weight.split(per_group),
            attn.k.weight.split(HEAD),
            attn.v.weight.split(HEAD),
            strict=True,
        )
        weights |= {
            f"{name}.input_layernorm.weight": block.attn_norm.weight,
            f"{name}.self_attention.linear_qkv.weight": torch.cat([torch.cat(g) for g in groups]),
            f"{name}.self_attention.linear_proj.weight": attn.o.weight,
            f"{name}.pre_mlp_layernorm.weight": block.mlp_norm.weight,
            f"{name}.mlp.linear_fc1.weight": torch.cat([mlp.gate.weight, mlp.up.weight]),
            f"{name}.mlp.linear_fc2.weight": mlp.down.weight,
        }
    return {name: weight.detach().clone() for name, weight in weights.items()}


def own_shard(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    if "layernorm" in name:
        return whole
    if "linear_proj" in name or "linear_fc2" in name:
        return whole.chunk(size, 1)[rank]
    if "linear_fc1" in name:  # each rank has its gate and its up
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size)[rank]


def make_gpt(tp: int, sequence_parallel: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from bitscale.model.megatron import ternary_block_spec, ternary_layer_spec

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=D, num_attention_heads=HEADS, num_query_groups=KV_HEADS,
        ffn_hidden_size=FF, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        normalization="RMSNorm", layernorm_epsilon=1e-5, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )  # fmt: skip
    layer = ternary_layer_spec(get_gpt_layer_local_spec(normalization="RMSNorm"))
    return GPTModel(
        config, ternary_block_spec(layer, LAYERS), VOCAB, S, position_embedding_type="rope", rotary_base=10_000,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip


def train_gpt(mesh: Mesh, tp: int, sequence_parallel: bool) -> tuple[list[float], list[Tensor]]:
    """Losses of 20 steps through the transition, and the codes of every layer at its end."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bitscale.model.megatron import sharded_layers

    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(tp)
        try:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            model = make_gpt(tp, sequence_parallel)
            with torch.no_grad():
                weights = megatron_weights(our_decoder())
                for name, parameter in model.named_parameters():
                    parameter.copy_(own_shard(name, weights[name], mesh.rank % tp, tp))
            adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
            losses = []
            for step, batch in enumerate(text_batches()):
                set_strength(model, strength_at(step))
                prepare_weights(model)
                loss = gpt_loss(model, batch)
                loss.backward()
                for parameter in model.parameters():
                    if getattr(parameter, "sequence_parallel", False):
                        group = parallel_state.get_tensor_model_parallel_group()
                        torch.distributed.all_reduce(parameter.grad, group=group)
                adam.step()
                adam.zero_grad()
                losses.append(loss.item())
            prepare_weights(model)
            codes = [layer.prepared.codes for layer in sharded_layers(model)]
            return losses, [t for pair in codes for t in pair]
        finally:
            parallel_state.destroy_model_parallel()


def gpt_loss(model: Any, batch: Tensor) -> Tensor:
    ids, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(S).expand(B, -1)
    hidden = torch.ones(S, S).triu(1).bool()[None, None]
    loss: Tensor = model(ids, positions, hidden, labels=targets).mean()
    return loss


def train_ours() -> list[float]:
    model = our_decoder()
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    losses = []
    for step, batch in enumerate(text_batches()):
        set_strength(model, strength_at(step))
        prepare_weights(model)
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def ours() -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_ours()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_gpt_model_has_our_decoders_losses(
    tp: int, sequence_parallel: bool, ours: list[float], world_of: World_of
) -> None:
    assert ours[-1] < ours[0] - 0.5  # it learns
    for losses, _ in world_of(max(tp, 2)).run(train_gpt, tp, sequence_parallel):
        differences = [abs(got - want) for got, want in zip(losses, ours, strict=True)]
        # Rounding flips single codes once training has amplified it (docs/parallelism.md).
        assert max(differences[: TRANSITION + 1]) < 2e-6, differences
        assert max(differences) < 2e-3, differences


def first_codes(mesh: Mesh, tp: int, sequence_parallel: bool) -> dict[str, list[Tensor]]:
    """Codes, scales and logits of the untrained model at λ = 1, put together from the ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from bitscale.model.megatron import sharded_layers

    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(tp)
        try:
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            model = make_gpt(tp, sequence_parallel)
            weights = megatron_weights(our_decoder())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(own_shard(name, weights[name], mesh.rank % tp, tp))
            set_strength(model, TERNARY)
            prepare_weights(model)
            layers = sharded_layers(model)
            return {
                "codes": [layer.prepared.codes.codes_FD for layer in layers],
                "scales": [layer.prepared.codes.scale.unique() for layer in layers],
                "loss": [gpt_loss(model, text_batches()[0]).detach()],
            }
        finally:
            parallel_state.destroy_model_parallel()


def test_codes_and_scales_are_bitwise_those_of_one_rank(world_of: World_of) -> None:
    whole = world_of(2).run(first_codes, 1, False)[0]
    roles = ["linear_proj", "linear_qkv", "linear_fc1", "linear_fc2"] * LAYERS
    assert [len(scales) for scales in whole["scales"]] == [1, 3, 2, 1] * LAYERS
    for tp in (2, 4):
        for sequence_parallel in (False, True):
            for rank, found in enumerate(world_of(tp).run(first_codes, tp, sequence_parallel)):
                for role, got, want in zip(roles, found["codes"], whole["codes"], strict=True):
                    assert torch.equal(got, own_shard(role, want, rank, tp)), (role, tp)
                for got, want in zip(found["scales"], whole["scales"], strict=True):
                    assert torch.equal(got, want)
                assert abs(float(found["loss"][0] - whole["loss"][0])) < 1e-6


# --- The spec and its errors ---


def test_a_spec_with_fused_norms_is_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from bitscale.model.megatron import ternary_layer_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.linear_qkv = torch.nn.Linear
    with pytest.raises(
        ConfigError, match=r"^ternary_layer_spec: linear_qkv is Linear; start from megatron-core's"
    ):
        ternary_layer_spec(spec)


def test_a_preset_that_is_not_shared_is_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from bitscale.model.megatron import ternary_layer_spec

    with pytest.raises(
        ConfigError, match=r"^tensor parallelism knows the presets b158, absmedian"
    ):
        ternary_layer_spec(get_gpt_layer_local_spec(), "twn")


def load_spec_module(monkeypatch: pytest.MonkeyPatch, **environment: str) -> ModuleType:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sys.modules.pop("bitscale.megatron_lm", None)
    import bitscale.megatron_lm as module

    return module


def test_megatron_lm_takes_the_spec_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `--spec MODULE NAME` reads vars(module)[name]; λ follows its iteration."""
    from megatron.core.transformer.spec_utils import import_module

    module = load_spec_module(
        monkeypatch, BITSCALE_TRANSITION_STEP="100", BITSCALE_RAMP_SHAPE="linear",
        BITSCALE_RAMP_STEPS="10", BITSCALE_KERNEL="reference",
    )  # fmt: skip
    spec = import_module(("bitscale.megatron_lm", "ternary_layer_spec"))
    linear = spec.submodules.mlp.submodules.linear_fc1
    assert linear.module.__name__ == "BitColumnParallelLinear"
    assert [module.strength_at(step) for step in (99, 100, 105, 110)] == [
        SIXTEEN_BIT, SIXTEEN_BIT, Strength(0.5, 0.5), TERNARY,
    ]  # fmt: skip
    # Megatron-LM's training package needs a GPU to start: here only its arguments stand in.
    arguments = SimpleNamespace(iteration=0, curr_iteration=105)
    stand_in = ModuleType("megatron.training")
    stand_in.get_args = lambda: arguments
    monkeypatch.setitem(sys.modules, "megatron.training", stand_in)
    assert linear.params["source"]() == (Strength(0.5, 0.5), 105)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BITSCALE_RAMP_STEPS", "-3", "BITSCALE_RAMP_STEPS='-3' is not a whole number of steps"),
        ("BITSCALE_RAMP_SHAPE", "square", "BITSCALE_RAMP_SHAPE='square' is unknown; use one of"),
        ("BITSCALE_QUANT", "b159", "quantizer preset 'b159' is unknown"),
    ],
)
def test_wrong_environment(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_spec_module(monkeypatch, **{name: value})
