"""Checkpoints do not know ranks or stages: what any layout saved, any other restores."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_fragments import same
from tiny_runs import (
    NO_PERSISTENCE,
    Whole,
    make_batches,
    make_engine,
    odd_config,
    train_step,
    whole_state,
)
from world import World

from bitscale import checkpoint
from bitscale.config import Config, config_hash, to_tree
from bitscale.engine import Fragment, TrainEngine
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh

pytestmark = pytest.mark.dist

SAVED_STEP = 3
WORLD_SIZES = (1, 2, 4)


class Layout(NamedTuple):
    world_size: int
    stage: int
    dtype: str

    @property
    def folder(self) -> str:
        return "-".join(map(str, self))


LAYOUTS = [Layout(size, stage, "fp32") for size in WORLD_SIZES for stage in (0, 1, 2, 3)]
LAYOUTS += [Layout(1, 1, "bf16"), Layout(2, 2, "bf16"), Layout(4, 3, "bf16")]


class Saved(NamedTuple):
    """What the saving run held and did next."""

    state: dict[str, Whole]
    next_loss: float
    next_state: dict[str, Whole]


def layout_config(layout: Layout) -> Config:
    """Ternary from step 2 on: the checkpoint and the step after it are at λ = 1."""
    deepspeed = NO_PERSISTENCE if layout.stage == 3 else {}
    return odd_config(
        layout.stage,
        layout.dtype,
        engine={"deepspeed": deepspeed},
        transition={"at": {"step": 2}, "ramp": {"shape": "none"}},
    )


def save(
    engine: TrainEngine, mesh: Mesh, root: Path, step: int, fragments: Iterator[Fragment]
) -> Path:
    meta = checkpoint.Meta(
        step=step,
        tokens=0,
        lambda_weight=1.0,
        lambda_activation=1.0,
        config=to_tree(engine.cfg),
        config_hash=config_hash(engine.cfg),
        identity={},
        shapes={name: list(shape) for name, shape in engine.parameter_shapes().items()},
        world_size=mesh.world_size,
        versions={},
    )
    return checkpoint.save(root, meta, fragments, mesh, rng_state=torch.get_rng_state())


def save_layouts(mesh: Mesh, root: Path, corpus: Path) -> dict[Layout, Saved]:
    """Train, save and go on in every mode of this world."""
    saved = {}
    for layout in LAYOUTS:
        if layout.world_size != mesh.world_size:
            continue
        cfg = layout_config(layout)
        engine = make_engine(cfg, mesh)
        batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
        for step in range(SAVED_STEP):
            train_step(engine, batches, step, mesh)
        state = whole_state(engine, mesh)
        torch.manual_seed(mesh.rank)
        path = save(engine, mesh, root / layout.folder, SAVED_STEP, engine.fragments())
        assert path.name == f"step-{SAVED_STEP:08d}"
        next_loss, _ = train_step(engine, batches, SAVED_STEP, mesh)
        saved[layout] = Saved(state, next_loss, whole_state(engine, mesh))
    return saved


def restore_layouts(
    mesh: Mesh, root: Path, corpus: Path, saved: dict[Layout, Saved], here: Layout
) -> None:
    """One engine restores every checkpoint; that of its own layout first, freshly built."""
    cfg = layout_config(here)
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
    for there in sorted(saved, key=lambda layout: layout != here):
        reader = checkpoint.Reader(checkpoint.resolve(root / there.folder))
        reader.restore(engine.fragments(), engine.parameter_shapes())
        engine.publish_masters()
        check_state(whole_state(engine, mesh), saved[there].state, f"{there} -> {here}")
        rng_state = reader.rng_state(mesh.rank)
        assert (rng_state is None) == (mesh.rank >= there.world_size)
        if rng_state is not None:
            expected = torch.Generator().manual_seed(mesh.rank).get_state()
            assert torch.equal(rng_state, expected)
        if there.dtype == here.dtype:
            loss, _ = train_step(engine, batches, SAVED_STEP, mesh)
            difference = abs(loss - saved[there].next_loss)
            # The same weights on the same micro-batches: only the mean over ranks is rounded
            # in another order.
            assert difference <= (0.0 if there == here else 1e-6), f"{there} -> {here}: {loss}"
            if there == here:
                check_state(whole_state(engine, mesh), saved[there].next_state, f"after {here}")


def check_state(ours: dict[str, Whole], theirs: dict[str, Whole], where: str) -> None:
    """Masters, moments and step counts, by name, to the bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not same(ours[name], theirs[name])]
    assert not differing, f"{where}: {differing}"


@pytest.fixture(scope="module")
def saved(
    world_of: Callable[[int], World], tmp_path_factory: pytest.TempPathFactory, corpus_prefix: Path
) -> tuple[Path, dict[Layout, Saved]]:
    root = tmp_path_factory.mktemp("layouts")
    layouts: dict[Layout, Saved] = {}
    for size in WORLD_SIZES:
        layouts |= world_of(size).run(save_layouts, root, corpus_prefix)[0]
    assert set(layouts) == set(LAYOUTS)
    return root, layouts


@pytest.mark.parametrize("here", LAYOUTS, ids=lambda layout: layout.folder)
def test_restores_what_every_layout_saved(
    world_of: Callable[[int], World],
    saved: tuple[Path, dict[Layout, Saved]],
    corpus_prefix: Path,
    here: Layout,
) -> None:
    root, layouts = saved
    world_of(here.world_size).run(restore_layouts, root, corpus_prefix, layouts, here)


def fail_to_save(mesh: Mesh, root: Path, failing_rank: int) -> list[str]:
    """Save step 1, fail to save step 2, save step 2 after all; the errors' messages."""
    engine = make_engine(odd_config(1, "fp32"), mesh)
    first = save(engine, mesh, root, 1, engine.fragments())

    def in_the_way() -> Iterator[Fragment]:
        if mesh.rank == failing_rank:
            # A directory where this rank's file goes: root may write into read-only ones.
            name = f"state-{mesh.rank:05d}-of-{mesh.world_size:05d}.safetensors"
            (root / ".step-00000002.partial" / name).mkdir()
        yield from engine.fragments()

    messages = []
    with pytest.raises(CheckpointError) as error:
        save(engine, mesh, root, 2, in_the_way())
    messages.append(str(error.value))
    assert checkpoint.latest_checkpoint(root) == first
    assert checkpoint.list_checkpoints(root) == [first]

    # Rank 0's own part: the pointer cannot be written.
    mesh.barrier()
    if mesh.is_main:
        (root / ".latest.partial").mkdir()
    with pytest.raises(CheckpointError) as error:
        save(engine, mesh, root, 3, engine.fragments())
    messages.append(str(error.value))
    assert checkpoint.latest_checkpoint(root) == first
    mesh.barrier()
    if mesh.is_main:
        (root / ".latest.partial").rmdir()

    second = save(engine, mesh, root, 2, engine.fragments())
    assert checkpoint.latest_checkpoint(root) == second
    assert not list(root.glob(".step-00000002*"))
    assert list(checkpoint.Reader(second).parameters())

    with pytest.raises(CheckpointError) as error:
        save(engine, mesh, root / "latest" / "below-a-file", 1, engine.fragments())
    messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_one_rank_that_cannot_write_fails_the_save_on_every_rank(
    world_of: Callable[[int], World], tmp_path: Path, failing_rank: int
) -> None:
    ranks = world_of(2).run(fail_to_save, tmp_path, failing_rank)
    assert ranks[0] == ranks[1]
    shard, pointer, folder = ranks[0]
    assert f"step-00000002: not saved, state-0000{failing_rank}-of-00002.safetensors:" in shard
    assert "step-00000003: not saved" in pointer and ".latest.partial" in pointer
    assert "not saved" in folder and "Not a directory" in folder
    for message in ranks[0]:
        assert "the previous checkpoint remains in force: make room, or make" in message
