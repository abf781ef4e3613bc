"""SIGTERM and SIGINT: save, exit with 75, continue bitwise."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from bitscale.checkpoint import Reader, latest_checkpoint
from kill_points import wait_for_step
from runs import (
    KEEP_ALL,
    TRANSITION_STEP,
    checkpoint_dirs,
    differences,
    events,
    metrics,
    start,
    train,
    train_command,
)

pytestmark = pytest.mark.e2e


def test_stop_and_signals_continue_bitwise(
    config_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    """train.stop_step, then SIGTERM, then SIGINT, each followed by --resume auto."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = (config_file, f"run.dir={run_dir}", KEEP_ALL, "--resume", "auto")
    stop = train("plain", *arguments, f"train.stop_step={TRANSITION_STEP}")
    assert "transition begins" not in stop.stdout
    assert metrics(run_dir, "train")[-1]["step"] == TRANSITION_STEP
    assert not events(run_dir, "finished")
    for number, step in ((signal.SIGTERM, 18), (signal.SIGINT, 26)):
        process = start(train_command("plain", *arguments), log)
        wait_for_step(process, run_dir, step)
        process.send_signal(number)
        assert process.wait(60) == 75, log.read_text()
        stopped = events(run_dir, "preempted")[-1]["step"]
        assert checkpoint_dirs(run_dir)[-1].name == f"step-{stopped:08d}"
        message = f"stopped by a signal after step {stopped}; saved, continue with --resume auto"
        assert message in log.read_text()
        assert "Traceback" not in log.read_text()
    train("plain", *arguments)
    assert differences(finished_run, run_dir) == []
    assert len(events(run_dir, "preempted")) == 2
    assert len(events(run_dir, "transition")) == 1


def test_second_signal_ends_at_once(config_file: Path, tmp_path: Path) -> None:
    """The first arrives in an evaluation that takes long; the second does not wait for it."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    slow = ("train.eval_every=1", "train.eval_batches=0", "train.micro_batch_size=1")
    process = start(train_command("plain", config_file, f"run.dir={run_dir}", *slow), log)
    wait_for_step(process, run_dir, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    assert checkpoint_dirs(run_dir) == []


def test_sigterm_to_torchrun(config_file: Path, tmp_path: Path) -> None:
    """torchrun starts each rank in a session of its own, passes SIGTERM or SIGINT on to them once,
    waits up to 30 s for their save, and exits with 1 and a traceback of its own. So it does for a
    signal to its process group (Ctrl-C). If the ranks alone get the signal they exit with 75 and
    torchrun with 1, or it starts them again with --max-restarts."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(_long_run("torchrun", config_file, run_dir), log)
    wait_for_step(process, run_dir, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1, log.read_text()
    _assert_saved(run_dir, log)


def test_sigterm_to_the_group_of_deepspeed(config_file: Path, tmp_path: Path) -> None:
    """Ranks of `deepspeed` on one machine share its process group, so that Ctrl-C (or a job system)
    reaches them directly, and a second time passed on by DeepSpeed's launch.py; the second must
    not end the save. The `deepspeed` command itself dies of the signal (here exit code -15); if
    the ranks alone get it, it exits with their 75. Given to the `deepspeed` process alone, a
    SIGTERM ends that process and nothing else: the ranks train on."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(_long_run("deepspeed", config_file, run_dir), log)
    wait_for_step(process, run_dir, 10)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    _assert_saved(run_dir, log)


def _long_run(launcher: str, config_file: Path, run_dir: Path) -> list[str]:
    """A run that does not end before the signal, and saves at the signal only."""
    overrides = ("train.steps=100000", "train.eval_every=0", "checkpoint.every=0", "log.every=1")
    return train_command(launcher, config_file, f"run.dir={run_dir}", *overrides)


def _assert_saved(run_dir: Path, log: Path) -> None:
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None, log.read_text()
    meta = Reader(path).meta  # verifies every checksum
    assert meta.world_size == 2
    assert meta.step == metrics(run_dir, "train")[-1]["step"]
    assert events(run_dir, "preempted")[-1]["step"] == meta.step
    assert not list((run_dir / "checkpoints").glob(".step-*"))
