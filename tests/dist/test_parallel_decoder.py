"""bitscale's decoder shared by 2 and 4 tensor-parallel ranks, against the decoder on one."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from world import World

from bitscale.config import Checkpointing, ModelConfig, QuantConfig
from bitscale.errors import ConfigError
from bitscale.mesh import Mesh, share_model
from bitscale.model import head
from bitscale.model.bitlinear import prepare_weights, set_strength
from bitscale.model.collectives import TensorGroup, shard_of
from bitscale.model.cost import LOSS_SLICE_TOKENS
from bitscale.model.decoder import Decoder
from bitscale.model.head import IGNORED_TARGET
from bitscale.model.layers import ranks_of
from bitscale.model.vocabulary import vocabulary_range
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength

pytestmark = pytest.mark.dist

World_of = Callable[[int], World]
STRENGTHS = {"16 bit": SIXTEEN_BIT, "ramp": Strength(0.4, 0.7), "ternary": TERNARY}
# The vocabulary does not divide by 2 or 4.
BASE: dict[str, Any] = {
    "vocab_size": 97, "num_layers": 2, "d_model": 64, "num_heads": 8, "num_kv_heads": 4, "d_ff": 96,
    "init_std": 0.05,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "fewer key/value heads than ranks": {"num_kv_heads": 1, "qk_norm": True, "bias": True},
    "two key/value heads": {"num_kv_heads": 2, "bias": True, "tie_embeddings": False},
    "all heads, sub-norm": {"num_kv_heads": None, "sub_norm": True, "mlp": "relu2_glu"},
    "layer norm": {"norm": "layernorm", "mlp": "relu2", "head_bits": 8},
}


def shape(variant: str) -> ModelConfig:
    return ModelConfig(**{**BASE, **VARIANTS[variant]})


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(97, (3, 17), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORED_TARGET
    documents = torch.arange(16).expand(3, 16) // 6
    return ids[:, :-1], targets, documents


def results(model: Decoder, name: str) -> dict[str, Tensor]:
    set_strength(model, STRENGTHS[name])
    prepare_weights(model)
    loss = model(*tokens())
    loss.backward()
    with torch.no_grad():
        found = {"loss": loss, "losses": model(*tokens(), reduction="none")}
        found["logits"] = model.logits(tokens()[0])
    return {key: value.detach() for key, value in found.items()}


def shared(mesh: Mesh, variant: str, sequence_parallel: bool) -> dict[str, Any]:
    """Of every λ: loss, losses, logits, gradients put together, and the initial weights.

    Four ranks compute the loss in slices of 20 of the 48 tokens, two as a whole.
    """
    head.TOKENS_PER_SLICE = 20 if mesh.world_size == 4 else LOSS_SLICE_TOKENS
    m = shape(variant)
    mesh = share_model(mesh, mesh.world_size, m.num_kv_heads or m.num_heads)
    ranks = ranks_of(mesh, sequence_parallel=sequence_parallel)
    found: dict[str, Any] = {}
    for name in STRENGTHS:
        for checkpointing in get_args(Checkpointing):
            model = Decoder(
                m, QuantConfig(), seed=1, activation_checkpointing=checkpointing, ranks=ranks
            )
            got = results(model, name)
            parts = {key: p.grad for key, p in model.named_parameters()}
            shards = {key: shard_of(p) for key, p in model.named_parameters()}
            everyone: list[Any] = [None] * mesh.world_size
            dist.all_gather_object(everyone, (parts, shards))
            got["gradients"] = put_together(everyone)
            if checkpointing != "none":  # changes nothing
                assert torch.equal(found[name]["loss"], got["loss"])
                for key, grad in found[name]["gradients"].items():
                    assert torch.equal(grad, got["gradients"][key]), (checkpointing, key)
            found[name] = got
    initial = {key: p.detach() for key, p in model.named_parameters()}
    dist.all_gather_object(everyone, (initial, shards))
    found["initial"] = put_together(everyone)
    return found


def put_together(everyone: list[Any]) -> dict[str, Tensor]:
    """Whole tensors from the ranks' parts; what several ranks hold must be equal on them."""
    wholes: dict[str, Tensor] = {}
    for parts, shards in everyone:
        for key, part in parts.items():
            shard = shards[key]
            if key not in wholes:
                wholes[key] = torch.full(part.shape if shard is None else shard.whole, float("nan"))
            place = wholes[key] if shard is None else shard.of(wholes[key])
            if not place.isnan().any():
                torch.testing.assert_close(place, part, rtol=1e-5, atol=1e-7)
            place.copy_(part)
    return wholes


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("size", "sequence_parallel"),
    [(2, False), (2, True), (4, True), pytest.param(4, False, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_is_that_of_one_rank(
    variant: str, size: int, sequence_parallel: bool, world_of: World_of
) -> None:
    per_rank = world_of(size).run(shared, variant, sequence_parallel)
    for name in STRENGTHS:
        model = Decoder(shape(variant), QuantConfig(), seed=1)
        want = results(model, name)
        for found in per_rank:
            for key in ("loss", "losses", "logits"):
                assert relative_error(found[name][key], want[key]) < 3e-6, (name, key)
            for key, parameter in model.named_parameters():
                error = relative_error(found[name]["gradients"][key], parameter.grad)
                assert error < 3e-5, (name, key)
            for key, parameter in Decoder(shape(variant), QuantConfig(), seed=1).named_parameters():
                assert torch.equal(found["initial"][key], parameter)


def test_a_vocabulary_smaller_than_the_ranks() -> None:
    assert vocabulary_range(97, TensorGroup(None, 3, 4)) == (75, 97)
    with pytest.raises(ConfigError, match="leaves nothing for the last of parallel.tp=4 ranks"):
        vocabulary_range(5, TensorGroup(None, 0, 4))
