"""What `train` does around the loop, with everything that needs ranks or a model replaced."""

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoints import save

from bitscale import checkpoint, guard, run, train
from bitscale.config import Config

pytestmark = pytest.mark.unit


class Source(SimpleNamespace):
    """A checkpoint that is open."""


def test_of_a_resumed_run_only_the_session_is_left(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is closed while it trains; amendments are rank 0's, whatever this rank saw."""
    opened: list[weakref.ref[Source]] = []
    seen: list[Any] = []

    def open_state(*args: Any, **options: Any) -> Source:
        source = Source(meta=SimpleNamespace(step=7))
        opened.append(weakref.ref(source))
        return source

    def set_up(*args: Any) -> SimpleNamespace:
        seen.append(args[5])
        return SimpleNamespace(recorder=SimpleNamespace(close=lambda: None))

    def attempt(session: Any, start: int, stop_request: Any) -> train.Outcome:
        seen.append(opened[0]())
        return train.Outcome(start, preempted=False, valid=None)

    mesh = SimpleNamespace(gather_objects=lambda mine: ["of rank 0", mine])
    for module, name, replacement in (
        (run, "identity", lambda *_: {}),
        (run, "find_resume", lambda *_: Path("step-00000007")),
        (run, "compare", lambda *_: run.Comparison([], [])),
        (run, "check_same_checkpoint", lambda *_: None),
        (guard, "load_amendments", lambda *_: "of this rank"),
        (train, "open_state", open_state),
        (train, "init_mesh", lambda *_: mesh),
        (train, "share_model", lambda mesh, *_: mesh),
        (train, "close_mesh", lambda: None),
        (train, "_set_up", set_up),
        (train, "_announce", lambda *_: None),
        (train, "_attempt", attempt),
    ):
        monkeypatch.setattr(module, name, replacement)
    rank_watch: Any = SimpleNamespace(joined=lambda: None)
    assert train._train(make_config(), [], "auto", (), rank_watch).step == 7
    assert seen == ["of rank 0", None]


def test_what_cannot_be_deleted_does_not_keep_a_run_from_going_on(
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = make_config(f"run.dir={tmp_path}")
    path = save(run.checkpoints_dir(cfg))

    def refuse(*_: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    train._rewind(cfg, checkpoint.Reader(path))
    said = capsys.readouterr().out
    assert said.startswith("warning: an older checkpoint could not be deleted: ")
    assert "Directory not empty" in said
