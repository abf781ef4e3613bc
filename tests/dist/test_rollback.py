"""Going back in process leaves nothing of what went wrong, whatever the ranks share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_fragments import same
from test_layouts import save
from tiny_runs import (
    NO_PERSISTENCE,
    make_batches,
    make_engine,
    micro_batches,
    odd_config,
    tiny_config,
    train_step,
    whole_state,
)
from world import World

from bitscale import checkpoint
from bitscale.config import Config, num_kv_heads
from bitscale.mesh import Mesh, share_model
from bitscale.model.bitlinear import bit_linears
from bitscale.train import restore

pytestmark = pytest.mark.dist

SAVED_STEP = 3


class Case(NamedTuple):
    world_size: int
    stage: int
    dtype: str
    tp: int = 1
    pp: int = 1

    def config(self) -> Config:
        # Sizes that ranks do not divide leave padding in ZeRO's tensors.
        make = odd_config if self.tp * self.pp == 1 else tiny_config
        deepspeed = {3: NO_PERSISTENCE}
        return make(
            self.stage,
            self.dtype,
            engine={"deepspeed": deepspeed.get(self.stage, {})},
            parallel={"tp": self.tp, "pp": self.pp},
            transition={"at": {"step": 2}, "ramp": {"shape": "none"}},
        )


CASES = [Case(2, 0, "fp32"), Case(2, 1, "bf16"), Case(2, 3, "fp32")]
CASES += [Case(4, 1, "bf16", tp=2, pp=2)]


def go_wrong_and_back(mesh: Mesh, case: Case, root: Path, corpus: Path) -> None:
    cfg = case.config()
    mesh = share_model(mesh, case.tp, num_kv_heads(cfg), case.pp)
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    for step in range(SAVED_STEP):
        train_step(engine, batches, step, mesh)
    path = save(engine, mesh, root / "-".join(map(str, case)), SAVED_STEP, engine.fragments())
    expected = [train_step(engine, batches, step, mesh) for step in (3, 4)]
    state = whole_state(engine, mesh)
    # Two bad steps: a NaN in one gradient of one rank, then weights that are NaN everywhere.
    if mesh.rank == 0:
        layer: Any = next(layer for _, layer in bit_linears(engine.module))
        hook = layer.weight.register_hook(lambda gradient: gradient * torch.nan)
    result = engine.train_step(micro_batches(cfg, batches, 5), lr=1e-3, weight_decay=0.1)
    if mesh.rank == 0:
        hook.remove()
    assert not torch.isfinite(result.grad_norm), "seen on every rank"
    for fragment in engine.fragments():
        for view in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq):
            view.fill_(torch.nan)
        fragment.step.fill_(99)
    engine.publish_masters()
    spoilt, _ = train_step(engine, batches, 6, mesh)
    assert spoilt != spoilt
    restore(engine, mesh, checkpoint.Reader(path))
    assert [train_step(engine, batches, step, mesh) for step in (3, 4)] == expected
    again = whole_state(engine, mesh)
    assert [name for name in state if not same(state[name], again[name])] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_back_to_the_bit(
    world_of: Callable[[int], World], tmp_path: Path, corpus_prefix: Path, case: Case
) -> None:
    world_of(case.world_size).run(go_wrong_and_back, case, tmp_path, corpus_prefix)


# What a fork may have that its trunk has not.
FORKS: dict[str, dict[str, Any]] = {
    "SubLN and scales": {"model": {"sub_norm": "transition"}, "quant": {"preset": "paretoq"}},
    "another optimizer": {"optim": {"name": "lion"}},
}


def back_to_a_trunk(mesh: Mesh, root: Path) -> None:
    cfg = tiny_config(1, "fp32")
    trunk = make_engine(cfg, mesh)
    for fragment in trunk.fragments():
        fragment.exp_avg.fill_(0.5)
        fragment.step.fill_(3)  # or the moments would count as none
    path = save(trunk, mesh, root, 3, trunk.fragments())
    for name, changes in FORKS.items():
        engine = make_engine(tiny_config(1, "fp32", **changes), mesh)
        reader = checkpoint.Reader(path)
        reader.meta = replace(reader.meta, lambda_weight=0.0)
        restore(engine, mesh, reader)
        state = whole_state(engine, mesh)
        for fragment in engine.fragments():
            for view in (fragment.master, *fragment.moments().values()):
                view.fill_(torch.nan)
            fragment.step.fill_(99)
        engine.publish_masters()
        restore(engine, mesh, reader)
        again = whole_state(engine, mesh)
        assert [key for key in state if not same(state[key], again[key])] == [], name


def test_back_to_a_trunk_of_another_model(world_of: Callable[[int], World], tmp_path: Path) -> None:
    """What the trunk lacks is as new as when the fork began."""
    world_of(1).run(back_to_a_trunk, tmp_path, seconds=300)
