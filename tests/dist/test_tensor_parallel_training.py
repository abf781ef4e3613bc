"""Training with tensor parallelism and ZeRO against one process; checkpoints between layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_fragments import same
from test_layouts import SAVED_STEP, save
from tiny_runs import (
    NO_PERSISTENCE,
    TRANSITION_STEP,
    Curve,
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
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh, share_model
from bitscale.telemetry import TernaryTelemetry

pytestmark = pytest.mark.dist

World_of = Callable[[int], World]


class Layout(NamedTuple):
    world_size: int
    tp: int
    sequence_parallel: bool
    stage: int

    @property
    def folder(self) -> str:
        return "-".join(map(str, self))


LAYOUTS = [
    Layout(2, 2, False, 1),
    Layout(2, 2, True, 2),
    Layout(2, 2, True, 3),
    Layout(4, 2, False, 1),
    Layout(4, 2, True, 2),
    Layout(4, 4, True, 1),  # two ranks a key/value head
    Layout(4, 2, True, 3),
]
# Two ranks a key/value head are in test_parallel_decoder.py, too.
SLOW = (Layout(2, 2, True, 3), Layout(4, 2, True, 2), Layout(4, 4, True, 1))
ONE = Layout(1, 1, False, 1)
MODEL = {"vocab_size": 61, "qk_norm": True, "bias": True, "sub_norm": False}


def layout_config(layout: Layout, **changes: Any) -> Config:
    engine = {"deepspeed": NO_PERSISTENCE} if layout.stage == 3 else {}
    return tiny_config(
        layout.stage,
        "fp32",
        model=MODEL,
        engine=engine,
        parallel={"tp": layout.tp, "sequence_parallel": layout.sequence_parallel},
        **changes,
    )


@pytest.fixture(scope="module")
def alone(corpus_prefix: Path) -> Curve:
    return reference(layout_config(ONE), corpus_prefix)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in LAYOUTS],
    ids=lambda layout: layout.folder,
)
def test_losses_and_states_are_those_of_one_process(
    layout: Layout, alone: Curve, world_of: World_of, corpus_prefix: Path
) -> None:
    """Clipped steps, the ramp and the ternary phase; a code that flips shows up to 1e-3."""
    cfg = layout_config(layout)
    curve = world_of(layout.world_size).run(train, cfg, corpus_prefix)[0]
    differences = [abs(a - b) for a, b in zip(curve.losses, alone.losses, strict=True)]
    assert max(differences[: TRANSITION_STEP + 1]) < 2e-6, differences
    assert max(differences) < 1e-3, differences
    for got, want in zip(
        curve.grad_norms[:TRANSITION_STEP], alone.grad_norms[:TRANSITION_STEP], strict=True
    ):
        assert got == pytest.approx(want, rel=2e-5)
    for name, whole in alone.states[TRANSITION_STEP].items():
        got = curve.states[TRANSITION_STEP][name]
        assert got.step == whole.step
        error = float((got.master - whole.master).norm() / whole.master.norm().clamp(min=1e-3))
        assert error < 1e-4, name


def save_layout(mesh: Mesh, layout: Layout, root: Path, corpus: Path) -> dict[str, Whole]:
    cfg = layout_config(layout)
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg))
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    for step in range(SAVED_STEP):
        train_step(engine, batches, step, mesh)
    save(engine, mesh, root / layout.folder, SAVED_STEP, engine.fragments())
    return whole_state(engine, mesh)


def restore_layout(
    mesh: Mesh, here: Layout, saved: dict[Layout, dict[str, Whole]], root: Path
) -> None:
    cfg = layout_config(here)
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg))
    engine = make_engine(cfg, mesh)
    for there, state in saved.items():
        reader = checkpoint.Reader(checkpoint.resolve(root / there.folder))
        reader.restore(engine.fragments(), engine.parameter_shapes())
        engine.publish_masters()
        restored = whole_state(engine, mesh)
        assert [name for name in state if not same(restored[name], state[name])] == []
        # Telemetry reads whole weights; so does whoever exports.
        figures = TernaryTelemetry(engine.module).read(engine.gathered, compute=mesh.is_main)
        assert len(figures) == (14 if mesh.is_main else 0)
        for name, parameter in engine.module.named_parameters():
            with engine.gathered(parameter) as whole:
                assert torch.equal(whole.flatten(), state[name].master), name


@pytest.mark.slow
def test_checkpoints_between_layouts(
    world_of: World_of, tmp_path: Path, corpus_prefix: Path
) -> None:
    layouts = [ONE, Layout(2, 1, False, 3), *LAYOUTS]
    saved = {
        layout: world_of(layout.world_size).run(save_layout, layout, tmp_path, corpus_prefix)[0]
        for layout in layouts
    }
    for here in layouts:
        world_of(here.world_size).run(restore_layout, here, saved, tmp_path)
    # What an export or an evaluation in one process reads.
    for there, state in saved.items():
        reader = checkpoint.Reader(checkpoint.resolve(tmp_path / there.folder))
        for name, master in reader.parameters():
            assert torch.equal(master.flatten(), state[name].master)


def test_a_missing_part_is_noticed(
    world_of: World_of, tmp_path: Path, corpus_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[0]
    world_of(2).run(save_layout, layout, tmp_path, corpus_prefix)
    reader = checkpoint.Reader(checkpoint.resolve(tmp_path / layout.folder))
    pieces = reader._index["layers.0.attn.o.weight", "master"]
    reader._index["layers.0.attn.o.weight", "master"] = [p for p in pieces if p.part[1] == 0]
    with pytest.raises(CheckpointError, match="parts of tensor-parallel ranks are miss"):
        dict(reader.parameters())
