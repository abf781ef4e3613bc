"""plain, torchrun and deepspeed start the same training; a wrong world size is told once."""

import shutil
import time
from pathlib import Path

import pytest

from bitscale.cli.main import main
from runs import (
    KEEP_ALL,
    TRANSITION_STEP,
    differences,
    events,
    execute,
    free_port,
    metrics,
    train_command,
)

pytestmark = pytest.mark.e2e

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def test_deepspeed_is_bitwise_torchrun(
    config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    """launch/local.sh is `deepspeed --num_gpus 2 --no_local_rank --module bitscale.cli.main`."""
    run_dir = tmp_path / "run"
    arguments = [str(config_file), f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3"]
    launcher = ["env", f"MASTER_PORT={free_port()}", str(LAUNCH / "local.sh"), "2"]
    done = execute([*launcher, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(run_dir, "start")[0]["world_size"] == 2
    assert differences(finished_run_2_ranks, run_dir) == []


def test_one_rank_agrees_with_two(finished_run: Path, finished_run_2_ranks: Path) -> None:
    """Rounding alone differs (one rank by ZeRO-1, two by ZeRO-3, both add up in fp32): before the
    transition by fp32's 1e-7 grown over 16 steps; after it a code that flips on a rounding error
    moves the loss by up to 6e-4 here. A wrong reduction (a sum for a mean, a batch twice) shows
    as 1e-2 from the second step on."""
    one, two = metrics(finished_run, "train"), metrics(finished_run_2_ranks, "train")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert events(finished_run_2_ranks, "start")[0]["world_size"] == 2
    for mine, its in zip(one, two, strict=True):
        before = mine["step"] <= TRANSITION_STEP
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4 if before else 5e-3)


def test_torchrun_script(config_file: Path, finished_run_2_ranks: Path, tmp_path: Path) -> None:
    """launch/torchrun.sh continues a run that is finished: nothing is left to do."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run_2_ranks, run_dir)
    arguments = [str(config_file), f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3"]
    done = execute([str(LAUNCH / "torchrun.sh"), "2", *arguments, "--resume", "auto"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing to do: the checkpoint is at step 40 of 40") == 1
    assert differences(finished_run_2_ranks, run_dir) == []


def test_world_size_that_does_not_fit_is_told_once(config_file: Path, tmp_path: Path) -> None:
    """torchrun exits with 1 whatever its ranks exit with (here 2)."""
    command = train_command("torchrun", config_file, "train.global_batch_size=6")
    done = execute(command, cwd=tmp_path)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "global_batch_size" in line]
    assert lines == [
        "error: train.global_batch_size=6 is not a multiple of train.micro_batch_size=2 x "
        "2 data-parallel ranks (world_size=2); use a global batch of 4 or 8, or another number of "
        "ranks"
    ]
    assert not (tmp_path / "run").exists()


def test_scripts_say_how_they_are_used() -> None:
    for script in ("local.sh", "torchrun.sh", "multinode.sh", "mpi.sh"):
        done = execute([str(LAUNCH / script)])
        assert done.returncode != 0
        assert f"launch/{script}" in done.stderr and "CONFIG" in done.stderr, done.stderr


def test_silent_ranks_wait_for_rank_0(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Launchers stop all ranks when one exits: rank 1 must not be faster than rank 0's message."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    arguments = ["train", str(config_file), "train.global_batch_size=3"]
    for rank, told, waited in (("0", 1, []), ("1", 0, [10.0])):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("train.global_batch_size=3") == told
        assert waits == waited
