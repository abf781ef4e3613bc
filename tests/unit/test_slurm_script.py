"""launch/slurm.sbatch with stand-ins for Slurm's commands, which are not here: what it calls."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"


def submit(tmp_path: Path, code: int) -> tuple[int, list[str]]:
    """The script's exit code and the commands it gave, where every rank ends with `code`."""
    calls = tmp_path / "calls"
    srun = f'echo "srun $BITSCALE_RANKS $MASTER_ADDR:$MASTER_PORT $*" >>{calls}; exit {code}'
    scontrol = f'[ "$1" = show ] && echo node7 && echo node8 || echo "scontrol $*" >>{calls}'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "run.yaml", "train.steps=9"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS_PER_NODE": "8",
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, calls.read_text().splitlines()


def test_ranks_meet_at_the_first_node_and_resume(tmp_path: Path) -> None:
    code, calls = submit(tmp_path, 0)
    assert code == 0
    assert calls == [
        "srun slurm node7:21234 --wait=60 --kill-on-bad-exit=0 "
        "python -u -m bitscale.cli.main train run.yaml train.steps=9 --resume auto"
    ]


def test_a_job_that_has_saved_is_queued_again(tmp_path: Path) -> None:
    code, calls = submit(tmp_path, 75)
    assert code == 75 and calls[1:] == ["scontrol requeue 41234"]


def test_a_job_that_failed_is_not(tmp_path: Path) -> None:
    code, calls = submit(tmp_path, 2)
    assert code == 2 and len(calls) == 1
