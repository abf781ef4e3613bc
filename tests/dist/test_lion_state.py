"""Lion, an optimizer with one moment, at every ZeRO stage, with TP and PP, and in checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_fragments import same
from test_layouts import save
from tiny_runs import (
    NO_PERSISTENCE,
    SNAPSHOTS,
    TRANSITION_STEP,
    Whole,
    make_batches,
    make_engine,
    reference,
    tiny_config,
    train,
    train_step,
    whole_state,
)
from world import World

from bitscale import checkpoint
from bitscale.config import Config, num_kv_heads
from bitscale.mesh import Mesh, share_model
from bitscale.transition import begin_transition

pytestmark = pytest.mark.dist

World_of = Callable[[int], World]
SAVED_STEP = 3
# Without clipping: the stages round its factor in different ways.
LION = {"name": "lion", "lr": 3e-4, "betas": [0.9, 0.99], "clip": 0.0}


def lion_config(stage: int, dtype: str = "fp32", **parallel: Any) -> Config:
    engine = {"deepspeed": NO_PERSISTENCE} if stage == 3 else {}
    return tiny_config(stage, dtype, optim=LION, engine=engine, parallel=parallel)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")], ids=str
)
def test_one_rank_trains_what_plain_torch_trains_to_the_bit(
    stage: int, dtype: str, world_of: World_of, corpus_prefix: Path
) -> None:
    cfg = lion_config(stage, dtype)
    curve = world_of(1).run(train, cfg, corpus_prefix)[0]
    # At stage 3 in fp32 gradients meet in another order (tiny_runs.reference).
    wanted = reference(cfg, corpus_prefix, regroup=stage == 3)
    for step in SNAPSHOTS:
        for name, whole in wanted.states[step].items():
            assert same(curve.states[step][name], whole), (step, name)
            assert not curve.states[step][name].exp_avg_sq.any()


def save_lion(mesh: Mesh, root: Path, corpus: Path) -> dict[str, Whole]:
    engine = make_engine(lion_config(0), mesh)
    batches = make_batches(engine.cfg, corpus)
    for step in range(SAVED_STEP):
        train_step(engine, batches, step, mesh)
    save(engine, mesh, root, SAVED_STEP, engine.fragments())
    return whole_state(engine, mesh)


def restore_lion(mesh: Mesh, cfg: Config, root: Path, corpus: Path) -> list[dict[str, Whole]]:
    """What was restored, what a step made of it, and what a reset has left of that."""
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    engine = make_engine(cfg, mesh)
    reader = checkpoint.Reader(checkpoint.resolve(root))
    reader.restore(engine.fragments(), engine.parameter_shapes())
    engine.publish_masters()
    states = [whole_state(engine, mesh)]
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    train_step(engine, batches, SAVED_STEP, mesh)
    states.append(whole_state(engine, mesh))
    begin_transition(engine, mesh, "reset")
    return [*states, whole_state(engine, mesh)]


@pytest.mark.parametrize(
    ("world_size", "cfg"),
    [(4, lion_config(1, tp=2, pp=2)), (2, lion_config(3))],
    ids=["tp2-pp2-zero1", "dp2-zero3"],
)
def test_its_one_moment_goes_through_checkpoints_and_policies(
    world_size: int, cfg: Config, world_of: World_of, corpus_prefix: Path, tmp_path: Path
) -> None:
    saved = world_of(1).run(save_lion, tmp_path, corpus_prefix)[0]
    path = checkpoint.resolve(tmp_path)
    with safe_open(path / "state-00000-of-00001.safetensors", framework="pt") as file:
        kinds = {key.split("|")[1] for key in file.keys() if "|" in key}  # noqa: SIM118
    assert kinds == {"master", "exp_avg"}
    arguments = (cfg, tmp_path, corpus_prefix)
    world = world_of(world_size)
    restored, stepped, reset = world.run(restore_lion, *arguments, seconds=300)[0]
    assert restored.keys() == saved.keys()
    for name, whole in saved.items():
        assert same(restored[name], whole) and whole.exp_avg.any(), name
        assert stepped[name].step == SAVED_STEP + 1
        moved = (stepped[name].master - whole.master).abs()
        assert 0 < float(moved.max()) < 1.5 * LION["lr"], "an update is of the size of the rate"
        assert torch.equal(reset[name].master, stepped[name].master)
        assert reset[name].step == 0 and not reset[name].exp_avg.any()
    assert SAVED_STEP < TRANSITION_STEP
