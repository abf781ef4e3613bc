"""Saving in the background: when it publishes, what training may do meanwhile, what fails it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitscale import checkpoint
from bitscale.checkpoint import Meta, Reader, Saved, Saver
from bitscale.checkpoint import saver as saver_module
from bitscale.checkpoint.write import Shard, Snapshot, write_shard
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import single_process_mesh

pytestmark = pytest.mark.unit

RNG_STATE = torch.Generator().manual_seed(1).get_state()


def meta_at(step: int) -> Meta:
    return Meta(step, 0, 0.0, 0.0, {}, "hash", {}, {"w": [4]}, 1, {})


def state(value: float = 1.0) -> list[Fragment]:
    tensors = [torch.full((4,), value + kind) for kind in range(3)]
    return [Fragment("w", 0, *tensors, torch.tensor(3.0))]


class Gate:
    """Holds the writing threads until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def write_shard(self, path: Path, snapshot: Snapshot) -> Shard:
        assert self.open.wait(60)
        return write_shard(path, snapshot)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(saver_module, "write_shard", made.write_shard)
    yield made
    made.open.set()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def poll_until_saved(saver: Saver) -> Saved:
    deadline = time.monotonic() + 60
    while (saved := saver.poll()) is None:
        assert time.monotonic() < deadline
    return saved


def test_training_goes_on_and_cannot_change_what_is_written(root: Path, gate: Gate) -> None:
    saver = Saver(root, single_process_mesh("cpu"))
    fragments = state()
    saver.begin(meta_at(1), fragments, RNG_STATE)
    for tensor in (fragments[0].master, fragments[0].exp_avg, fragments[0].exp_avg_sq):
        tensor.fill_(-1)
    fragments[0].step.fill_(9)
    assert saver.poll() is None
    assert checkpoint.latest_checkpoint(root) is None
    gate.open.set()
    saved = poll_until_saved(saver)
    assert saved.path == checkpoint.latest_checkpoint(root) == root / "step-00000001"
    assert 0 < saved.blocked_seconds < saved.seconds
    assert saved.meta.adam_steps == {"w": 3}
    assert Reader(saved.path).read("w", "exp_avg", 0, 4).tolist() == [2.0] * 4
    assert saver.poll() is None and saver.finish() is None


def test_the_bytes_are_those_of_a_save_that_waits(root: Path, tmp_path: Path) -> None:
    mesh = single_process_mesh("cpu")
    waited = checkpoint.save(root, meta_at(1), state(), mesh, rng_state=RNG_STATE)
    saver = Saver(tmp_path / "other", mesh)
    saver.begin(meta_at(1), state(), RNG_STATE)
    saved = poll_until_saved(saver)
    files = sorted(path.name for path in waited.iterdir())
    assert len(files) == 3
    for name in files:
        assert (waited / name).read_bytes() == (saved.path / name).read_bytes()


def test_finish_waits(root: Path, gate: Gate) -> None:
    saver = Saver(root, single_process_mesh("cpu"))
    saver.begin(meta_at(1), state(), RNG_STATE)
    threading.Timer(0.2, gate.open.set).start()
    saved = saver.finish()
    assert saved is not None and saved.path.is_dir()


def test_what_was_not_published_is_not_in_force(root: Path, gate: Gate) -> None:
    """As after a kill: the shards may be whole, `latest` and the list know the older one."""
    mesh = single_process_mesh("cpu")
    gate.open.set()
    first = checkpoint.save(root, meta_at(1), state(), mesh, rng_state=RNG_STATE)
    saver = Saver(root, mesh)
    saver.begin(meta_at(2), state(2.0), RNG_STATE)
    deadline = time.monotonic() + 60
    shard = root / ".step-00000002.partial" / "state-00000-of-00001.safetensors"
    while not shard.is_file():
        assert time.monotonic() < deadline
    assert checkpoint.latest_checkpoint(root) == first
    assert checkpoint.list_checkpoints(root) == [first]


def test_a_write_error_surfaces_at_the_next_poll(root: Path, gate: Gate) -> None:
    mesh = single_process_mesh("cpu")
    saver = Saver(root, mesh)
    saver.begin(meta_at(1), state(), RNG_STATE)
    (root / ".step-00000001.partial" / "state-00000-of-00001.safetensors").mkdir()
    gate.open.set()
    message = "step-00000001: not saved, state-00000-of-00001.safetensors: .*Is a directory"
    with pytest.raises(CheckpointError, match=message):
        poll_until_saved(saver)
    assert saver.finish() is None
    saver.begin(meta_at(1), state(), RNG_STATE)  # the remedy: room
    assert saver.finish() is not None


def test_a_thread_that_dies_is_an_error_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, snapshot: Snapshot) -> Shard:
        raise RuntimeError("a bug")

    monkeypatch.setattr(saver_module, "write_shard", broken)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    saver = Saver(root, single_process_mesh("cpu"))
    saver.begin(meta_at(1), state(), RNG_STATE)
    with pytest.raises(CheckpointError, match="the writing thread has died, see its traceback"):
        saver.finish()


def test_old_ones_are_deleted_and_what_keeps_them_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(root, single_process_mesh("cpu"), keep_last=1)
    for step in (1, 2):
        saver.begin(meta_at(step), state(), RNG_STATE)
        saved = saver.finish()
        assert saved is not None and saved.unpruned == ""
    assert [path.name for path in checkpoint.list_checkpoints(root)] == ["step-00000002"]

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saver_module, "prune", refuse)
    saver.begin(meta_at(3), state(), RNG_STATE)
    saved = saver.finish()
    assert saved is not None and "Permission denied" in saved.unpruned
    assert checkpoint.latest_checkpoint(root) == root / "step-00000003"
