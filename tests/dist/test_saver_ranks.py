"""Saving in the background on several ranks: skew, errors, and what they see on resumption."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from world import World

from bitscale import checkpoint, run
from bitscale.checkpoint import Meta, Reader, Saved, Saver
from bitscale.checkpoint import saver as saver_module
from bitscale.checkpoint.write import Shard, Snapshot, write_shard
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh

pytestmark = pytest.mark.dist


def test_saving_on_two_ranks(world_of: Callable[[int], World], tmp_path: Path) -> None:
    world_of(2).run(check_saver, tmp_path)


def check_saver(mesh: Mesh, folder: Path) -> None:
    check_a_slow_rank_holds_nobody_up(mesh, folder / "slow")
    check_a_failing_rank_is_everyones_error(mesh, folder / "failing")
    check_ranks_that_see_different_checkpoints(mesh)


def check_a_slow_rank_holds_nobody_up(mesh: Mesh, root: Path) -> None:
    """Rank 1 cannot write yet: both train on, with collectives of their own, and nothing is
    published; then both publish at the same step."""
    may_write = threading.Event()
    if mesh.rank == 0:
        may_write.set()

    def held(path: Path, snapshot: Snapshot) -> Shard:
        assert may_write.wait(60)
        return write_shard(path, snapshot)

    with replaced_writer(held):
        saver = Saver(root, mesh)
        saver.begin(meta_at(3), state(mesh), torch.get_rng_state())
        if mesh.rank == 0:
            wait_until_written(saver)
        for step in range(3):
            assert int(mesh.sum(torch.tensor(step + mesh.rank))) == 2 * step + 1
            assert saver.poll() is None
        assert checkpoint.latest_checkpoint(root) is None
        may_write.set()
        step, saved = poll_until_saved(saver)
    assert len(set(mesh.gather_objects(step))) == 1
    assert saved.path == checkpoint.latest_checkpoint(root)
    reader = Reader(saved.path, verify=(mesh.rank, 2))
    assert reader.read("w", "exp_avg", 0, 8).tolist() == [1.0] * 4 + [2.0] * 4
    assert saved.meta.adam_steps == {"w": 3}
    mesh.barrier()


def check_a_failing_rank_is_everyones_error(mesh: Mesh, root: Path) -> None:
    """While the other is still writing."""
    release = threading.Event()

    def failing(path: Path, snapshot: Snapshot) -> Shard:
        if mesh.rank == 1:
            return Shard(path.name, error=f"{path.name}: disk on fire")
        assert release.wait(60)
        return write_shard(path, snapshot)

    with replaced_writer(failing):
        saver = Saver(root, mesh)
        saver.begin(meta_at(3), state(mesh), torch.get_rng_state())
        if mesh.rank == 1:
            wait_until_written(saver)
        mesh.barrier()
        with pytest.raises(CheckpointError, match="not saved, state-00001-of-00002.*: disk on fire; th"):
            saver.poll()
        release.set()
        assert saver.finish() is None
    assert checkpoint.latest_checkpoint(root) is None
    mesh.barrier()


def check_ranks_that_see_different_checkpoints(mesh: Mesh) -> None:
    run.check_same_checkpoint(mesh, None)
    run.check_same_checkpoint(mesh, Path("a/step-00000002"))
    seen = Path("a/step-00000002") if mesh.rank == 0 else None
    with pytest.raises(CheckpointError) as error:
        run.check_same_checkpoint(mesh, seen)
    assert str(error.value) == (
        "rank 1 would resume from none and rank 0 from step-00000002: the file system does not "
        "show every host the same yet; start again, or name the checkpoint with --resume PATH"
    )


@contextmanager
def replaced_writer(writer: Callable[[Path, Snapshot], Shard]) -> Iterator[None]:
    """The saver's threads write with `writer`."""
    saver_module.write_shard = writer
    try:
        yield
    finally:
        saver_module.write_shard = write_shard


def wait_until_written(saver: Saver) -> None:
    assert saver._pending is not None and saver._pending.thread is not None
    saver._pending.thread.join(60)
    assert saver._pending.shard is not None


def poll_until_saved(saver: Saver) -> tuple[int, Saved]:
    """How many polls it took, and what came of it."""
    deadline = time.monotonic() + 60
    count = 1
    while (saved := saver.poll()) is None:
        assert time.monotonic() < deadline
        count += 1
    return count, saved


def meta_at(step: int) -> Meta:
    return Meta(step, 0, 0.0, 0.0, {}, "hash", {}, {"w": [8]}, 2, {})


def state(mesh: Mesh) -> list[Fragment]:
    """Four of the eight elements of `w`; the first moment is rank + 1."""
    master, exp_avg, exp_avg_sq = torch.full((3, 4), mesh.rank + 1.0)
    return [Fragment("w", 4 * mesh.rank, master, exp_avg, exp_avg_sq, torch.tensor(3.0))]
