"""Which checkpoint is in force, which are pruned; saves that cannot be finished."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import STATE_FILE, make_fragments, meta_at, names, save

from bitscale import checkpoint
from bitscale.checkpoint import Reader
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh, single_process_mesh

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


# Which checkpoint is in force


def test_checkpoints_are_listed_oldest_first_and_the_last_is_in_force(root: Path) -> None:
    assert checkpoint.latest_checkpoint(root) is None
    for step in (9, 10, 100):
        save(root, step)
    assert names(checkpoint.list_checkpoints(root)) == [
        "step-00000009",
        "step-00000010",
        "step-00000100",
    ]
    assert checkpoint.latest_checkpoint(root) == root / "step-00000100"


def test_a_checkpoint_is_found_by_its_own_its_folders_or_its_runs_path(root: Path) -> None:
    path = save(root)
    for given in (path, root, root.parent):
        assert checkpoint.resolve(given) == path


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_checkpoints_is_refused(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "elsewhere"
    if exists:
        (path / "checkpoints").mkdir(parents=True)
    message = "elsewhere: no checkpoint here; name a run directory, or a step-... directory with a"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resolve(path)


def test_latest_that_names_a_missing_one_is_refused(root: Path) -> None:
    save(root, 1)
    shutil.rmtree(save(root, 2))
    message = (
        r"latest names 'step-00000002', which is missing or incomplete; write the name of one of "
        r"\['step-00000001'\] into it, or delete it"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resolve(root)
    (root / "latest").unlink()  # the remedy
    assert checkpoint.resolve(root) == root / "step-00000001"


@pytest.mark.parametrize(
    ("content", "shown"),
    [(b"", "''"), (b"\n", "''"), (b"\xff\x00junk", r"'\ufffd\x00junk'"), (b"../x", "'../x'")],
)
def test_latest_that_holds_no_name_is_refused(root: Path, content: bytes, shown: str) -> None:
    save(root, 1)
    (root / "latest").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint.latest_checkpoint(root)
    assert str(error.value).startswith(f"{root}/latest holds {shown}, which is not a checkpoint's")
    assert "['step-00000001'] into it, or delete it" in str(error.value)


def test_a_kill_between_rename_and_pointer_leaves_the_older_one_in_force(root: Path) -> None:
    first = save(root, 1)
    save(root, 2, seed=1)
    (root / "latest").write_text("step-00000001\n")
    assert checkpoint.latest_checkpoint(root) == first
    again = save(root, 2, seed=2)  # the resumed run comes to the same step
    assert checkpoint.latest_checkpoint(root) == again
    assert torch.equal(Reader(again).read("b", "master", 0, 7), make_fragments(2)[2].master)
    kept = Reader(root / "superseded-step-00000002")
    assert torch.equal(kept.read("b", "master", 0, 7), make_fragments(1)[2].master)


def test_leftovers_of_killed_saves_are_ignored_and_cleaned(root: Path) -> None:
    first = save(root, 1)
    for leftover in (".step-00000002.partial", ".step-00000003.partial", ".step-00000000.deleted"):
        (root / leftover).mkdir()
        (root / leftover / STATE_FILE).write_bytes(b"half a file")
    (root / "step-00000004").mkdir()  # a copy by hand that was interrupted: no meta.json
    assert checkpoint.list_checkpoints(root) == [first]
    assert checkpoint.latest_checkpoint(root) == first

    second = save(root, 2)  # over its own leftover
    assert sorted(names(list(second.iterdir()))) == ["SHA256SUMS", "meta.json", STATE_FILE]
    checkpoint.prune(root, keep_last=2, keep_every=0)
    assert sorted(names(list(root.iterdir()))) == [
        "latest",
        "step-00000001",
        "step-00000002",
        "step-00000004",
    ]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep_at", "kept"),
    [
        (1, 0, (), [60]),
        (2, 0, (), [50, 60]),
        (1, 20, (), [20, 40, 60]),
        (2, 30, (), [30, 50, 60]),
        (9, 0, (), [10, 20, 30, 40, 50, 60]),
        (1, 30, (10, 20, 25), [10, 20, 30, 60]),
    ],
)
def test_prune(
    root: Path, keep_last: int, keep_every: int, keep_at: tuple[int, ...], kept: list[int]
) -> None:
    for step in range(10, 70, 10):
        save(root, step)
    checkpoint.prune(root, keep_last, keep_every, keep_at)
    assert names(checkpoint.list_checkpoints(root)) == [f"step-{step:08d}" for step in kept]
    assert checkpoint.latest_checkpoint(root) == root / "step-00000060"


def test_only_checkpoints_are_pruned(root: Path) -> None:
    """A copy by hand stays; one that was moved away, and linked to, loses the link only."""
    moved = root.parent / "moved"
    shutil.move(save(root, 1), moved)
    (root / "step-00000001").symlink_to(moved)
    shutil.copytree(save(root, 2), root / "step-best")
    assert names(checkpoint.list_checkpoints(root)) == ["step-00000001", "step-00000002"]
    dict(Reader(root / "step-00000001").parameters())
    checkpoint.prune(root, keep_last=1, keep_every=0)
    assert sorted(names(list(root.iterdir()))) == ["latest", "step-00000002", "step-best"]
    dict(Reader(moved).parameters())


def test_steps_beyond_eight_digits_come_last(root: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(root, step)
    assert names(checkpoint.list_checkpoints(root)) == ["step-99999999", "step-100000000"]
    assert checkpoint.rewind(root, root / "step-99999999") == [root / "step-100000000"]


def test_rewind_keeps_later_ones_aside(root: Path) -> None:
    paths = [save(root, step) for step in (1, 2, 3)]
    assert checkpoint.rewind(root, paths[0]) == paths[1:]
    assert checkpoint.latest_checkpoint(root) == paths[0]
    assert checkpoint.list_checkpoints(root) == [paths[0]]
    for path in paths[1:]:
        kept = root / f"superseded-{path.name}"
        assert torch.equal(Reader(kept).read("b", "master", 0, 7), make_fragments()[2].master)
    checkpoint.prune(root, keep_last=1, keep_every=0)
    assert (root / "superseded-step-00000003").is_dir()
    assert checkpoint.rewind(root, paths[0]) == []


# A save that cannot be finished


def in_the_way(root: Path) -> Iterator[Fragment]:
    (root / ".step-00000002.partial" / STATE_FILE).mkdir()
    yield from make_fragments()


def save_over(root: Path, fragments: Iterator[Fragment] | list[Fragment]) -> None:
    mesh: Mesh = single_process_mesh("cpu")
    checkpoint.save(root, meta_at(2), fragments, mesh, rng_state=torch.get_rng_state())


@pytest.mark.parametrize("what", ["the state file", "the pointer", "the directory"])
def test_a_failed_save_leaves_the_previous_one_in_force(root: Path, what: str) -> None:
    first = save(root, 1)
    message = "step-00000002: not saved, .*; the previous checkpoint remains in force: make room"
    with pytest.raises(CheckpointError, match=message):
        if what == "the state file":
            save_over(root, in_the_way(root))
        elif what == "the pointer":
            (root / ".latest.partial").mkdir()
            save_over(root, make_fragments())
        else:
            (root / "a-file").touch()
            save_over(root / "a-file" / "checkpoints", make_fragments())
    assert checkpoint.latest_checkpoint(root) == first
    dict(Reader(first).parameters())
