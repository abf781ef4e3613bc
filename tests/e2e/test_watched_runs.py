"""A rank hangs, dies, fails or is slow: who is named, how it ends, and what `status` says."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bitscale.heartbeat import read_heartbeats, stack_path
from bitscale.status import read_status
from runs import environment, events, metrics
from watched_sessions import AT, HANG_SECONDS, SLOW_UNTIL

pytestmark = pytest.mark.e2e

HOST = socket.gethostname()
SESSIONS = Path(__file__).with_name("watched_sessions.py")


def run_cases(config_file: Path, folder: Path, *names: str) -> dict[str, int]:
    """A process of its own: sessions are forked from it."""
    done = subprocess.run(
        [sys.executable, str(SESSIONS), str(config_file), str(folder), *names],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def codes(config_file: Path, folder: Path) -> dict[str, int]:
    return run_cases(config_file, folder, "hang", "die", "killed", "slow")


def log_lines(folder: Path, name: str, start: str) -> list[str]:
    text = (folder / f"{name}.log").read_text(errors="replace")
    return [line for line in text.splitlines() if line.startswith(start)]


def test_a_hang_ends_every_rank_and_names_the_one_that_hangs(
    codes: dict[str, int], folder: Path
) -> None:
    assert codes["hang"] == 3
    waiting, hanging = sorted(log_lines(folder, "hang", "error on rank"))
    assert (
        f"(watch.hang_seconds={HANG_SECONDS}) in phase step, step {AT}, in all_reduce, " in waiting
    )
    # Which of the watchdogs is first is chance.
    behind = (
        rf"furthest behind is rank 1 on {HOST}: (phase step, step {AT} for \d+s|hung at step {AT}),"
    )
    assert re.search(behind, waiting), waiting
    assert "is not in a collective, at e2e/watched_sessions.py:" in waiting
    assert f"step {AT}, not in a collective, at e2e/watched_sessions.py:" in hanging
    assert "the other ranks wait for this one" in hanging
    for rank, function in ((0, "all_reduce"), (1, "hang")):
        assert f"in {function}\n" in stack_path(folder / "hang", rank).read_text()
    status = read_status(folder / "hang")
    assert (status.state, status.why) == ("failed", f"rank 1 on {HOST}: hung at step {AT}")
    assert [(rank.state, rank.failure) for rank in status.ranks] == [("failed", "hang")] * 2


def test_a_peer_that_dies_is_named_at_once(codes: dict[str, int], folder: Path) -> None:
    assert codes["die"] == 9  # the launcher's, of the rank that died
    (error,) = log_lines(folder, "die", "error")
    dead = read_heartbeats(folder / "die")[1]
    assert error.startswith(
        f"error on rank 0 ({HOST}): all_reduce failed in phase step, step {AT}, "
    )
    assert f": rank 1 on {HOST} is gone: there is no process {dead.pid} any more" in error
    assert "continue with --resume auto [" in error
    assert "Traceback" not in (folder / "die.log").read_text()
    status = read_status(folder / "die")
    assert (status.state, status.ranks[1].state) == ("failed", "gone")
    assert status.why.startswith(f"rank 1 on {HOST}: died at step ")


def test_a_killed_run_is_known_as_such(codes: dict[str, int], folder: Path) -> None:
    assert codes["killed"] == -9
    status = read_status(folder / "killed")
    assert (status.state, status.step, status.num_steps) == ("killed", AT, 40)
    assert status.loss == metrics(folder / "killed", "train")[-1]["loss"]
    assert [rank.state for rank in status.ranks] == ["gone"]


def test_a_slow_rank_is_named_until_it_is_not_slow(codes: dict[str, int], folder: Path) -> None:
    assert codes["slow"] == 0
    slow, over, *_ = [e for e in events(folder / "slow", "straggler") if e["ranks"] == [1]]
    assert (slow["is_over"], over["is_over"], slow["host"]) == (False, True, HOST)
    assert slow["own_seconds"] > max(0.1, 1.2 * slow["others_seconds"])
    assert slow["step"] < SLOW_UNTIL < over["step"]
    line = log_lines(folder, "slow", "straggler: ")[0]
    assert line.startswith(f"straggler: rank 1 on {HOST} is slow: it needs 1")
    assert read_status(folder / "slow").state == "finished"
    assert [beat.phase for beat in read_heartbeats(folder / "slow")] == ["done", "done"]


def test_a_live_run_can_be_scraped(codes: dict[str, int], folder: Path) -> None:
    text = (folder / "slow.prom").read_text()
    assert f"bitscale_step {float(SLOW_UNTIL + 1)!r}\n" in text
    assert "bitscale_planned_steps 40.0\n" in text
    assert "bitscale_zeros_share 0." in text
    assert f'bitscale_rank_step{{rank="1",host="{HOST}"}} ' in text


@pytest.mark.slow
def test_a_collective_that_times_out_and_an_error_of_one_rank(
    config_file: Path, tmp_path: Path
) -> None:
    assert run_cases(config_file, tmp_path, "timeout", "fail") == {"timeout": 4, "fail": 1}
    (error,) = log_lines(tmp_path, "timeout", "error")
    timed_out = f"all_reduce timed out (watch.collective_timeout_seconds={HANG_SECONDS}) in phase"
    assert error.startswith(f"error on rank 0 ({HOST}): {timed_out} step, step {AT}, ")
    assert f"furthest behind is rank 1 on {HOST}: phase step, step {AT} for " in error
    status = read_status(tmp_path / "fail")
    assert (status.state, status.ranks[1].failure) == ("failed", "error")
    assert status.why.startswith(f"rank 1 on {HOST}: an error at step {AT}")
