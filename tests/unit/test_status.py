"""`bitscale status` and `bitscale runs`: states, also of runs that died without a word."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitscale.cli.main import main
from bitscale.errors import DataError
from bitscale.heartbeat import HeartbeatWriter, heartbeat_path
from bitscale.recorder import Recorder, SpeedRecord, TrainRecord, ValidRecord
from bitscale.status import find_runs, read_status, show_runs, show_status

pytestmark = pytest.mark.unit

Capture = pytest.CaptureFixture[str]


def record(run_dir: Path, *, steps: int = 10, strength: float = 0.25, end: str = "") -> Path:
    """A run that has recorded `steps` of 40 steps, and how it ended."""
    recorder = Recorder(run_dir, enabled=True, resume_step=None, num_steps=40, tensorboard=False)
    recorder.event(0, 0, "start", world_size=2)
    recorder.train(
        [
            TrainRecord(step, 100 * step, 9.0 - step / 10, 1e-3, 0.1, strength, strength, 1.0)
            for step in range(1, steps + 1)
        ]
    )
    recorder.speed(
        SpeedRecord(steps, 1234.0, 0.1, 0.5, 30.0, {"c": 0.1}, 1, 0.2, 0.1),
    )
    recorder.valid(ValidRecord(steps, 100 * steps, 7.5, 1808.0, 2.0))
    if end:
        recorder.event(steps, 100 * steps, end)
    recorder.close()
    return run_dir


def beats(run_dir: Path, number: int = 2, *, world_size: int = 0, **changes: object) -> Path:
    """Heartbeats of `number` ranks of this very process, living unless `changes` says otherwise."""
    for rank in range(number):
        writer = HeartbeatWriter(
            run_dir,
            rank=rank,
            local_rank=rank,
            world_size=world_size or number,
            interval_seconds=5.0,
        )
        writer.joined()
        writer.mark("step", 10)
        writer.write()
        change(run_dir, rank, **changes)
    return run_dir


def change(run_dir: Path, rank: int, **changes: object) -> None:
    path = heartbeat_path(run_dir, rank)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def state(run_dir: Path) -> tuple[str, str]:
    status = read_status(run_dir)
    return status.state, status.why


def test_a_running_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005\n")
    status = read_status(beats(record(tmp_path)))
    assert (status.state, status.why) == ("running", "step")
    assert (status.step, status.num_steps, status.tokens) == (10, 40, 1000)
    assert (status.loss, status.valid_loss) == (8.0, 7.5)
    assert (status.lambda_weight, status.lambda_phase) == (0.25, "ramp")
    assert (status.tokens_per_second, status.checkpoint) == (1234.0, "step-00000005")
    assert status.eta_seconds is not None and 0 < status.eta_seconds <= 30.0
    assert (status.slowest_rank, status.slowdown) == (1, 2.0)
    assert [(rank.rank, rank.state, rank.step) for rank in status.ranks] == [
        (0, "alive", 10),
        (1, "alive", 10),
    ]


@pytest.mark.parametrize(("strength", "phase"), [(0.0, "16 bit"), (0.5, "ramp"), (1.0, "ternary")])
def test_the_phase_of_lambda(tmp_path: Path, strength: float, phase: str) -> None:
    assert read_status(record(tmp_path, strength=strength)).lambda_phase == phase


def test_a_run_whose_processes_are_gone_was_killed(tmp_path: Path) -> None:
    """SIGKILL to all: the heartbeats are seconds old and say `step`."""
    beats(record(tmp_path), started=1.0)  # another process has these ids now
    assert state(tmp_path)[0] == "killed"
    assert "no process is left; the last heartbeat came " in state(tmp_path)[1]
    assert read_status(tmp_path).eta_seconds is None
    assert {rank.state for rank in read_status(tmp_path).ranks} == {"gone"}


def test_a_late_heartbeat_of_a_process_that_is_there_is_a_busy_machine_s(tmp_path: Path) -> None:
    beats(record(tmp_path), interval_seconds=-1.0)  # so that any age counts as old
    assert state(tmp_path) == ("running", "step")
    beats(tmp_path, interval_seconds=-1.0, host="elsewhere")
    assert state(tmp_path)[0] == "killed"


def test_hosts_that_are_silent_for_long_were_killed(tmp_path: Path) -> None:
    now = time.time()
    beats(record(tmp_path), host="elsewhere", time=now - 10, started=now - 100)
    assert state(tmp_path)[0] == "running"
    beats(tmp_path, host="elsewhere", time=now - 60, started=now - 100)
    assert state(tmp_path)[0] == "killed"


def test_one_lost_rank_stalls_the_run(tmp_path: Path) -> None:
    beats(record(tmp_path))
    change(tmp_path, 1, started=1.0)
    host = socket.gethostname()
    assert state(tmp_path) == ("stalled", f"rank 1 on {host} is gone at step 10")


def test_ranks_without_progress_are_stalled(tmp_path: Path) -> None:
    beats(record(tmp_path), phase_since=time.time() - 200, waiting_for="all_reduce")
    assert state(tmp_path)[0] == "stalled"
    change(tmp_path, 1, waiting_for=None)
    assert state(tmp_path)[1].endswith(f"look at rank 1 on {socket.gethostname()}")
    for rank in range(2):
        change(tmp_path, rank, phase="save")  # takes long by nature
    assert state(tmp_path) == ("running", "save")


@pytest.mark.parametrize(
    ("end", "phase", "failure", "expected"),
    [
        ("finished", "done", "", ("finished", "")),
        ("finished", "step", "", ("finished", "")),  # killed between the event and the end
        ("preempted", "done", "", ("stopped", "by a signal, after saving")),
        ("", "done", "", ("stopped", "at train.stop_step, or by a signal")),
        ("", "failed", "error", ("failed", "rank 0 on HOST and 1 more: an error at step 10")),
        ("", "failed", "peer", ("failed", "2 ranks lost each other at step 10")),
        ("", "failed", "hang", ("failed", "rank 0 on HOST and 1 more: hung at step 10")),
    ],
)
def test_how_a_run_ended(
    tmp_path: Path, end: str, phase: str, failure: str, expected: tuple[str, str]
) -> None:
    beats(record(tmp_path, end=end), phase=phase, failure=failure, started=1.0)
    reason = expected[1].replace("HOST", socket.gethostname())
    assert state(tmp_path) == (expected[0], reason)


def test_a_failure_names_its_cause_and_not_the_victims(tmp_path: Path) -> None:
    beats(record(tmp_path), 3, phase="failed", failure="peer")
    change(tmp_path, 2, phase="step", failure="", started=1.0)
    assert state(tmp_path) == ("failed", f"rank 2 on {socket.gethostname()}: died at step 10")
    beats(tmp_path, 3, phase="failed", failure="hang", waiting_for="all_reduce")
    change(tmp_path, 1, waiting_for=None)
    assert state(tmp_path) == ("failed", f"rank 1 on {socket.gethostname()}: hung at step 10")


def test_a_session_that_died_after_an_orderly_stop_was_killed(tmp_path: Path) -> None:
    """It had not come so far as to record its resumption."""
    record(tmp_path, end="preempted")
    later = time.time() + 30
    beats(tmp_path, phase="start", started=later, time=later + 5)
    assert state(tmp_path)[0] == "killed"


def test_a_finished_run_that_is_begun_again_is_running(tmp_path: Path) -> None:
    beats(record(tmp_path, end="finished"), phase="start")
    assert state(tmp_path) == ("running", "start")


def test_without_heartbeats_it_is_unknown(tmp_path: Path) -> None:
    assert state(record(tmp_path))[0] == "unknown"
    assert state(record(tmp_path / "b", end="finished"))[0] == "finished"
    assert state(record(tmp_path / "c", end="preempted"))[0] == "stopped"


def test_a_run_that_has_recorded_nothing_yet(tmp_path: Path) -> None:
    status = read_status(beats(tmp_path, 1, world_size=2, phase="start"))
    assert (status.state, status.step, status.loss) == ("running", None, None)
    assert [rank.state for rank in status.ranks] == ["alive", "missing"]
    assert "missing" in show_status(status)


def test_torn_and_endless_files_are_read_from_the_end(tmp_path: Path) -> None:
    record(tmp_path)
    path = tmp_path / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    filling = '{"kind": "telemetry", "step": 1, "layers": {}}\n' * 120_000  # 5.6 MB
    path.write_text(f'{first}\n{filling}{rest}{{"kind": "train", "step": 11, "lo')
    status = read_status(tmp_path)
    assert (status.step, status.num_steps, status.loss) == (10, 40, 8.0)


def test_many_ranks_are_shown_worst_first(tmp_path: Path) -> None:
    beats(record(tmp_path), 20)
    change(tmp_path, 17, step=3)
    change(tmp_path, 19, started=1.0)
    text = show_status(read_status(tmp_path))
    rows = text[text.index("rank  host") :].splitlines()[1:]
    assert [row.split()[0] for row in rows[:3]] == ["19", "17", "0"]
    assert "gone" in rows[0]
    assert rows[-1] == "and 4 more (--all shows them)"
    assert len(show_status(read_status(tmp_path), all_ranks=True).splitlines()) > 25


def test_runs_are_found_at_any_depth_but_not_within_a_run(tmp_path: Path) -> None:
    for name in ("a", "sweep/b", "sweep/c", "a/checkpoints/x", ".trash/d"):
        record(tmp_path / name)
    record(tmp_path / "a" / "nested")
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["a", "a/nested", "sweep/b", "sweep/c"]
    text = show_runs([read_status(path) for path in find_runs(tmp_path)])
    assert len(text.splitlines()) == 5
    assert all("10/40" in row for row in text.splitlines()[1:])


def test_commands(tmp_path: Path, capsys: Capture) -> None:
    run_dir = beats(record(tmp_path / "a"), host="elsewhere")
    record(tmp_path / "b", end="finished")
    assert main(["status", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "running (step)" in text and "loss       8.0000, valid 7.5000" in text
    assert "ramp .25" in text and "1.23k tok/s, ETA " in text
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][1]["state"] == "alive"
    assert main(["status", str(run_dir), "--stacks"]) == 0
    how = capsys.readouterr().out.splitlines()
    assert how[0].startswith(f"rank 0: ssh elsewhere kill -USR2 {os.getpid()}, then read ")
    assert main(["status", str(tmp_path / "b"), "--watch"]) == 0  # it has ended: shown once
    assert capsys.readouterr().out.count("finished") == 1
    assert main(["runs", str(tmp_path), "--state", "runing"]) == 2
    assert "--state 'runing' is none; use running, stalled, fin" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--state", "finished"]) == 0
    assert [row.split()[1] for row in capsys.readouterr().out.splitlines()] == ["state", "finished"]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    states = [run["state"] for run in json.loads(capsys.readouterr().out)]
    assert states == ["running", "finished"]


def test_json_has_no_nan(tmp_path: Path, capsys: Capture) -> None:
    recorder = Recorder(tmp_path, enabled=True, resume_step=None, num_steps=4, tensorboard=False)
    recorder.train([TrainRecord(1, 1, float("nan"), 1e-3, 0.1, 0.0, 0.0, float("inf"))])
    recorder.close()
    assert main(["status", str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert json.loads(text)["loss"] is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [("status", "no run here, neither metrics.jsonl nor heartbeats"), ("runs", "no such folder")],
)
def test_wrong_folders(tmp_path: Path, capsys: Capture, command: str, reason: str) -> None:
    assert main([command, str(tmp_path / "missing")]) == 2
    assert f"error: {tmp_path / 'missing'}: {reason}" in capsys.readouterr().err


def test_an_empty_folder_has_no_runs(tmp_path: Path, capsys: Capture) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"
    with pytest.raises(DataError):
        read_status(tmp_path)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    record(tmp_path)
    program = (
        "import sys; from bitscale.cli.main import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'pydantic', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status", str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
