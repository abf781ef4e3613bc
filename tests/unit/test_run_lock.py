"""One run at a time in a run directory."""

import json
import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from bitscale import run_lock
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    with run_lock.hold(run_dir):
        about = json.loads((run_dir / "run.lock").read_text())
        assert about["host"] == socket.gethostname() and about["pid"] == os.getpid()
        with pytest.raises(ConfigError) as error, run_lock.hold(run_dir):
            pass
        assert str(error.value) == (
            f"run.dir='{run_dir}' is in use by process {os.getpid()} on {about['host']} since "
            f"{about['since']}; wait for it, stop it, or choose another run.dir"
        )
        (run_dir / "run.lock").write_text("")  # the other is just writing it
        with pytest.raises(ConfigError, match="is in use by another process; wait for it, stop"):
            run_lock.hold(run_dir).__enter__()
    with run_lock.hold(run_dir):
        pass


def test_a_killed_run_leaves_nothing_that_blocks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold_until_killed, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(60) and ours.recv() == "held"
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on "):
        run_lock.hold(tmp_path).__enter__()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with run_lock.hold(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def _hold_until_killed(run_dir: Path, pipe: Connection) -> None:
    with run_lock.hold(run_dir):
        pipe.send("held")
        signal.pause()


def test_other_ranks_hold_nothing(tmp_path: Path) -> None:
    with run_lock.hold(tmp_path / "run", enabled=False):
        assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run.dir='.*/file/run' is not writable: "):
        run_lock.hold(tmp_path / "file" / "run").__enter__()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with run_lock.hold(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/run.lock cannot be locked (Function not implemented): nothing keeps "
        "a second run out of this directory\n"
    )
