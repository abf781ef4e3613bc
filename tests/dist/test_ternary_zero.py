"""Training without a 16-bit copy of ternary matrices is the same training, on fewer bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_fragments import same
from tiny_runs import (
    TERNARY_STEP,
    TRANSITION_STEP,
    make_batches,
    make_engine,
    odd_config,
    tiny_config,
    train_step,
    whole_state,
)
from world import World

from bitscale.mesh import Mesh

pytestmark = pytest.mark.dist


def run(mesh: Mesh, cfg, corpus):
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    out = [train_step(engine, batches, step, mesh) for step in range(14)]
    return out, whole_state(engine, mesh)


def compare(mesh, make, stage, dtype, corpus):
    plain = run(mesh, make(stage, dtype), corpus)
    ours = run(mesh, make(stage, dtype, engine={"ternary_gather": True}), corpus)
    assert plain[0] == ours[0]
    assert [n for n in plain[1] if not same(plain[1][n], ours[1][n])] == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("make","stage", "dtype"), [(odd_config,1, "bf16"), (odd_config, 2, "bf16"), (tiny_config,1,"fp32")])
def test_same(world_of: Callable[[int], World], corpus_prefix: Path, world_size, make, stage, dtype):
    world_of(world_size).run(compare, make, stage, dtype, corpus_prefix)
