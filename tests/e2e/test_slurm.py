"""launch/slurm.sbatch under a real Slurm, whose nodes are network namespaces of this machine."""

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import ask, job_fields, slurm, why_no_slurm

from bitscale.fit.table import read_table
from host_faults import FAULT_STEP, LAUNCH, WATCH, pid_of, steps_taken
from netns_hosts import HEAD, Hosts, make_hosts, why_not
from runs import CONFIG, KEEP_ALL, differences, events, train

_REASON = why_not() or why_no_slurm()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(bool(_REASON), reason=f"no Slurm here: {_REASON}"),
]
SWEEP = """\
base: base.yaml
title: a try
seeds: {values: [1]}
set: {engine.device: cpu, log.telemetry_every: 0}
arms:
  sixteen: {transition.at: null}
  early: {transition.at.step: 8}
  late: {transition.at.step: 14}
"""
_ONE_RANK_A_NODE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


@dataclass
class Cluster:
    hosts: Hosts
    env: dict[str, str]

    def submit(self, log: Path, *arguments: object, **variables: str) -> str:
        """launch/slurm.sbatch with these; the job's number."""
        options = [*_ONE_RANK_A_NODE, "--time=10", f"--output={log}", "--parsable"]
        command = ["sbatch", *options, LAUNCH / "slurm.sbatch", *arguments]
        return ask(self.hosts, self.env | variables, *command)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Until the job is in one of `states`; what Slurm says of it."""
        deadline = time.monotonic() + 300
        while (fields := job_fields(self.hosts, self.env, job))["JobState"] not in states:
            assert time.monotonic() < deadline, fields
            time.sleep(0.2)
        return fields

    def wait_for_step(self, job: str, run_dir: Path, step: int) -> None:
        deadline = time.monotonic() + 300
        while not (steps := steps_taken(run_dir)) or max(steps) < step:
            assert time.monotonic() < deadline
            assert job_fields(self.hosts, self.env, job)["JobState"] in ("PENDING", "RUNNING")
            time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    with make_hosts(2, folder / "hosts") as hosts, slurm(hosts, folder / "slurm") as env:
        yield Cluster(hosts, env)


def test_a_preempted_job_saves_and_goes_on_by_itself(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """To the very bits of a run that was never interrupted."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    # Slurm takes some seconds to preempt.
    longer = ["train.steps=400", "train.eval_every=0", "checkpoint.every=100"]
    arguments = [config_file, "engine.zero_stage=3", *longer, "checkpoint.keep_last=1"]
    train("torchrun", *arguments, f"run.dir={tmp_path / 'reference'}")
    job = cluster.submit(log, *arguments, f"run.dir={run_dir}", *WATCH)
    cluster.wait_for_step(job, run_dir, FAULT_STEP)
    other = "sbatch --parsable -p high -N2 --exclusive --output=/dev/null --wrap true"
    first = ask(cluster.hosts, cluster.env, *other.split())
    fields = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert cluster.wait(first, "COMPLETED")
    assert "; saved, continue with --resume auto" in log.read_text()
    assert len(events(run_dir, "preempted")) == 1
    assert [line["world_size"] for line in events(run_dir, "resume")] == [2]
    assert differences(tmp_path / "reference", run_dir) == []


def test_after_a_killed_rank_the_job_goes_on_by_itself(
    cluster: Cluster, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3", *WATCH]
    job = cluster.submit(log, *arguments)
    cluster.wait_for_step(job, run_dir, FAULT_STEP)
    cluster.hosts.execute("node2", "kill", "-KILL", pid_of(run_dir, 1))
    fields = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert "rank 1 on node2" in log.read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert differences(finished_run_2_ranks, run_dir) == []


def test_a_cancelled_job_saves_and_does_not_come_back(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = cluster.submit(log, config_file, f"run.dir={run_dir}", KEEP_ALL, *WATCH)
    cluster.wait_for_step(job, run_dir, FAULT_STEP)
    ask(cluster.hosts, cluster.env, "scancel", job)
    cluster.wait(job, "CANCELLED", "FAILED", "COMPLETED")
    deadline = time.monotonic() + 60
    while not events(run_dir, "preempted"):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    time.sleep(10)  # longer than Slurm waits before it starts a job again
    assert cluster.wait(job, "CANCELLED", "PENDING", "RUNNING")["JobState"] == "CANCELLED"


def test_deepspeed_s_own_slurm_runner(
    cluster: Cluster, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3"]
    job = cluster.submit(log, *arguments, LAUNCHER="deepspeed")
    fields = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert fields["JobState"] == "COMPLETED", log.read_text()
    assert differences(finished_run_2_ranks, run_dir) == []


def test_a_sweep_as_job_arrays(cluster: Cluster, python_corpus: Path, tmp_path: Path) -> None:
    """`bitscale sweep --backend slurm`, a trunk and what begins from it."""
    pytest.importorskip("submitit")
    (tmp_path / "try.yaml").write_text(SWEEP, encoding="utf-8")
    (tmp_path / "base.yaml").write_text(CONFIG.replace("CORPUS", str(python_corpus)))
    options = ["--backend", "slurm", "--slurm", "slurm_partition=low", "--slurm", "timeout_min=10"]
    command = [sys.executable, "-m", "bitscale.cli.main", "sweep", tmp_path / "try.yaml"]
    log, out = tmp_path / "log", tmp_path / "out"
    process = cluster.hosts.start(HEAD, [*command, "--out", out, *options], log, cluster.env)
    assert process.wait(400) == 0, log.read_text()
    arrays = [int(count) for count in re.findall(r"submitted (\d+) jobs", log.read_text())]
    assert arrays == [1, 2]
    assert {row["status"] for row in read_table(out)} == {"finished"}
