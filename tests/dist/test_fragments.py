"""Fragments: the one view on masters and Adam moments, at every ZeRO stage and rank count.

The model's sizes are not divisible by the rank count, and some parameters have fewer elements
than there are ranks (tiny_runs.odd_config).
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    KINDS,
    NO_PERSISTENCE,
    SOME_PERSISTENCE,
    Whole,
    make_batches,
    make_engine,
    odd_config,
    tiny_config,
    train_step,
    whole_state,
)
from torch import Tensor
from world import World

from bitscale.config import Config, OptimizerState, ScaledMoments, num_kv_heads
from bitscale.data.batches import evaluation_batches
from bitscale.data.shards import TokenShard
from bitscale.engine import TrainEngine
from bitscale.mesh import Mesh, share_model
from bitscale.model.decoder import Decoder
from bitscale.transition import begin_transition

pytestmark = pytest.mark.dist

MODES = [
    pytest.param(0, "fp32", {}, id="zero0-fp32"),
    pytest.param(1, "fp32", {}, id="zero1-fp32"),
    pytest.param(2, "fp32", {}, id="zero2-fp32"),
    pytest.param(3, "fp32", {}, id="zero3-fp32-persistent"),
    pytest.param(3, "fp32", NO_PERSISTENCE, id="zero3-fp32"),
    pytest.param(1, "bf16", {}, id="zero1-bf16"),
    pytest.param(2, "bf16", {}, id="zero2-bf16"),
    pytest.param(3, "bf16", SOME_PERSISTENCE, id="zero3-bf16"),
]
POLICIES: tuple[OptimizerState, ...] = (
    *("keep", "keep_second_moment", "reset"),
    ScaledMoments(scale=0.3),
)
TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("stage", "dtype", "deepspeed"), MODES)
def test_fragments(
    world_of: Callable[[int], World],
    corpus_prefix: Path,
    world_size: int,
    stage: int,
    dtype: str,
    deepspeed: dict[str, object],
) -> None:
    """Coverage, policies and publication on one engine a combination: starting one is what
    costs."""
    cfg = odd_config(stage, dtype, engine={"deepspeed": deepspeed})
    world_of(world_size).run(check_fragments, cfg, corpus_prefix)


def check_fragments(mesh: Mesh, cfg: Config, corpus: Path) -> None:
    engine = make_engine(cfg, mesh)
    parameters = list(engine.module.parameters())
    check_coverage(engine, mesh)
    for step, policy in enumerate(POLICIES):
        check_policy(engine, mesh, corpus, policy, step)
    check_publication(engine, mesh, corpus)
    after = list(engine.module.parameters())
    assert len(after) == len(parameters)
    assert all(a is b for a, b in zip(after, parameters, strict=True)), "Parameters were replaced"


def check_coverage(engine: TrainEngine, mesh: Mesh) -> None:
    """Each element is saved by exactly one rank, at its own place, with fresh Adam state."""
    cfg = engine.cfg
    weights = dict(Decoder(cfg.model, cfg.quant, seed=cfg.train.seed).named_parameters())
    assert engine.parameter_shapes() == {n: tuple(w.shape) for n, w in weights.items()}
    state = whole_state(engine, mesh)  # fails unless covered exactly once
    for name, weight in weights.items():
        assert torch.equal(state[name].master, rounded(weight.detach().flatten(), cfg)), name
        assert not state[name].exp_avg.any() and not state[name].exp_avg_sq.any(), name
        assert state[name].step == 0, name
    for fragment in engine.fragments():
        assert fragment.numel > 0
        sizes = {fragment.exp_avg.numel(), fragment.exp_avg_sq.numel(), fragment.numel}
        assert len(sizes) == 1
        assert fragment.start + fragment.numel <= weights[fragment.name].numel()


def check_policy(
    engine: TrainEngine, mesh: Mesh, corpus: Path, policy: OptimizerState, step: int
) -> None:
    """After a step under load: what the policy leaves of the moments, on all ranks, and that the
    optimizer itself (not a copy) goes on from there."""
    batches = make_batches(engine.cfg, corpus, mesh.dp_rank, mesh.dp_size)
    train_step(engine, batches, step, mesh)
    before = whole_state(engine, mesh)
    assert all(whole.exp_avg_sq.any() and whole.step > 0 for whole in before.values())
    begin_transition(engine, mesh, policy)
    after = whole_state(engine, mesh)
    for name, now in after.items():
        assert same(now, after_policy(before[name], policy)), f"{policy} {name}"
    masters = torch.cat([whole.master for whole in after.values()])
    # Of the size of an update, nothing that bf16 could hold: masters were not made anew from it.
    assert not torch.equal(masters, masters.bfloat16().float())
    train_step(engine, batches, step, mesh)
    beta1, beta2 = engine.cfg.optim.betas
    for name, whole in whole_state(engine, mesh).items():
        assert whole.step == after[name].step + 1, f"{policy} {name}"
        gradient = whole.exp_avg - beta1 * after[name].exp_avg
        square = whole.exp_avg_sq - beta2 * after[name].exp_avg_sq
        torch.testing.assert_close(
            square / (1 - beta2),
            (gradient / (1 - beta1)).square(),
            rtol=1e-3,
            atol=1e-5 * float(whole.exp_avg_sq.max()) / (1 - beta2),
        )


def after_policy(then: Whole, policy: OptimizerState) -> Whole:
    """What a policy makes of a parameter: its master stays, whatever it is."""
    zeros = torch.zeros_like(then.exp_avg)
    if isinstance(policy, ScaledMoments):
        f = policy.scale
        return then._replace(exp_avg=then.exp_avg * f, exp_avg_sq=then.exp_avg_sq * f**2)
    return {
        "keep": then,
        "keep_second_moment": then._replace(exp_avg=zeros),
        "reset": Whole(then.master, zeros, zeros, 0),
    }[policy]


def check_publication(engine: TrainEngine, mesh: Mesh, corpus: Path) -> None:
    """Masters written through fragments become every rank's compute weights, bit for bit, and
    those are what the forward pass uses."""
    wanted = {
        name: pattern(name, 0, math.prod(shape)).view(shape)
        for name, shape in engine.parameter_shapes().items()
    }
    for fragment in engine.fragments():
        fragment.master.copy_(pattern(fragment.name, fragment.start, fragment.numel))
    engine.publish_masters()
    cfg = engine.cfg
    for name, parameter in engine.module.named_parameters():
        with engine.gathered(parameter) as weight:
            assert weight.dtype == TORCH_DTYPE[cfg.train.dtype]
            assert torch.equal(weight, wanted[name].to(weight.dtype)), name
    plain = Decoder(cfg.model, cfg.quant)
    plain.load_state_dict(wanted)
    plain.to(TORCH_DTYPE[cfg.train.dtype]).eval()
    for module, ours in zip(plain.modules(), engine.module.modules(), strict=True):
        if hasattr(ours, "strength"):
            module.strength = ours.strength
    (batch,) = evaluation_batches(
        TokenShard(corpus), seq_len=8, batch_size=2, dp_rank=0, dp_size=1, max_batches=1
    )
    size = cfg.model.vocab_size or 0
    batch = batch._replace(
        input_ids_BS=batch.input_ids_BS % size, target_ids_BS=batch.target_ids_BS % size
    )
    with torch.no_grad():
        expected = plain(batch.input_ids_BS, batch.target_ids_BS, reduction="none")
    assert torch.equal(engine.token_losses(batch), expected)


@pytest.mark.parametrize(
    ("stage", "dtype", "parallel"),
    [
        pytest.param(1, "bf16", {"tp": 2, "pp": 2}, id="zero1-tp2-pp2-bf16"),
        pytest.param(3, "fp32", {"tp": 2, "sequence_parallel": True}, id="zero3-tp2-sp-dp2"),
    ],
)
def test_policies_on_ranks_that_share_layers(
    world_of: Callable[[int], World],
    corpus_prefix: Path,
    stage: int,
    dtype: str,
    parallel: dict[str, object],
) -> None:
    deepspeed = NO_PERSISTENCE if stage == 3 else {}
    cfg = tiny_config(stage, dtype, parallel=parallel, engine={"deepspeed": deepspeed})
    world_of(4).run(check_shared, cfg, corpus_prefix)


def check_shared(mesh: Mesh, cfg: Config, corpus: Path) -> None:
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    engine = make_engine(cfg, mesh)
    for step, policy in enumerate(POLICIES):
        check_policy(engine, mesh, corpus, policy, step)


def rounded(weight: Tensor, cfg: Config) -> Tensor:
    """Masters start from the compute weights."""
    return weight.to(TORCH_DTYPE[cfg.train.dtype]).float()


def same(a: Whole, b: Whole) -> bool:
    return a.step == b.step and all(torch.equal(getattr(a, k), getattr(b, k)) for k in KINDS)


def pattern(name: str, start: int, numel: int) -> Tensor:
    """fp32 values that tell parameter and position, and that bf16 has to round."""
    index = torch.arange(start, start + numel, dtype=torch.float64)
    return torch.cos(index * 0.7 + sum(name.encode())).float() / 8
