"""The hang watchdog in processes of its own, which it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitscale.heartbeat import read_heartbeats, stack_path
from bitscale.status import write_stacks

pytestmark = pytest.mark.unit

# A rank whose main thread does BODY; the watchdog knows `beats`.
PROGRAM = """\
import sys, time
from pathlib import Path
from bitscale.heartbeat import HeartbeatWriter
from bitscale.watch.watchdog import Watchdog
from bitscale.watch.whereabouts import place_of_main_thread

def hang():
    time.sleep(1000)

run_dir = Path(sys.argv[1])
beats = HeartbeatWriter(run_dir, rank=0, local_rank=0, world_size=1, interval_seconds=0.1,
                        place=place_of_main_thread)
watchdog = Watchdog(run_dir, beats, rank=0, hang_seconds=float(sys.argv[2]))
beats.start()
watchdog.start()
"""


def start(tmp_path: Path, hang_seconds: float, body: str) -> "subprocess.Popen[str]":
    program = tmp_path / "rank.py"
    program.write_text(PROGRAM + body)
    command = [sys.executable, str(program), str(tmp_path / "run"), str(hang_seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_hang_ends_with_stacks_a_line_and_code_3(tmp_path: Path) -> None:
    process = start(tmp_path, 0.5, "beats.mark('step', 7)\nhang()\n")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    (line,) = error.splitlines()
    assert line.startswith(f"error on rank 0 ({os.uname().nodename}, process {process.pid}): no ")
    assert "(watch.hang_seconds=0.5) in phase step, step 7, not in a collective, at " in line
    assert "rank.py:8 in hang" in line
    stacks = stack_path(tmp_path / "run", 0)
    assert str(stacks) in line
    assert f"process {process.pid}" in stacks.read_text()
    assert 'rank.py", line 8 in hang' in stacks.read_text()
    (heartbeat,) = read_heartbeats(tmp_path / "run")
    assert (heartbeat.phase, heartbeat.failure, heartbeat.step) == ("failed", "hang", 7)
    assert "in hang" in heartbeat.place


def test_progress_and_long_phases_are_no_hang(tmp_path: Path) -> None:
    """Steps of less than the bound, however many; a save may take four times as long."""
    body = """\
for step in range(6):
    beats.mark("step", step)
    time.sleep(0.25)
beats.mark("save", 6)
time.sleep(2)
watchdog.stop()
beats.end()
"""
    process = start(tmp_path, 1.0, body)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert read_heartbeats(tmp_path / "run")[0].phase == "done"


def test_a_stopped_process_has_not_hung(tmp_path: Path) -> None:
    """SIGSTOP for longer than the bound, as a job system suspends a job; then it goes on."""
    body = """\
beats.mark("step", 1)
for _ in range(15):
    time.sleep(0.1)
watchdog.stop()
beats.end()
"""
    process = start(tmp_path, 3.0, body)
    deadline = time.monotonic() + 60
    # The watchdog has seen the step by then.
    while not [b for b in read_heartbeats(tmp_path / "run") if b.time > b.phase_since + 0.7]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_a_signal_writes_the_stacks_of_a_living_rank(tmp_path: Path) -> None:
    """Without a watchdog too, and even though the main thread is inside a call."""
    process = start(tmp_path, 0.0, "beats.mark('step', 1)\nhang()\n")
    stacks = stack_path(tmp_path / "run", 0)
    deadline = time.monotonic() + 60
    while not [b for b in read_heartbeats(tmp_path / "run") if "in hang" in b.place]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (text,) = write_stacks(tmp_path / "run")
    assert text.startswith(f"rank 0 on {os.uname().nodename}, process {process.pid} ({stacks}):\n")
    assert 'rank.py", line 8 in hang' in text
    assert text.splitlines()[-1] in stacks.read_text()
    assert process.poll() is None
    process.kill()
    process.wait()
    assert write_stacks(tmp_path / "run") == [f"rank 0: process {process.pid} is gone"]
    assert process.stderr is not None
    process.stderr.close()


def test_stacks_go_to_stderr_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory belongs")
    process = start(tmp_path, 0.5, "hang()\n")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "stacks go to stderr" in error
    assert 'rank.py", line 8 in hang' in error
