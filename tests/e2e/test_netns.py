"""Training over hosts that are network namespaces of this machine, with real faults.

The others of its kind, all launchers and all faults, are measured by tools/inject_host_faults.py.
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host_faults import (
    FAULT_STEP,
    LAUNCH,
    WATCH,
    cable_out,
    compare,
    end,
    host_environment,
    launch,
    rank_killed,
    ranks_left,
    supervisor_record,
    wait_all,
    wait_for_step,
)
from netns_hosts import HEAD, Hosts, make_hosts, why_not
from runs import KEEP_ALL, differences, events

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts here: {why_not()}"),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with make_hosts(2, tmp_path / "hosts", ssh_port=2222) as made:
        yield made


@contextmanager
def supervised(
    hosts: Hosts, run_dir: Path, log: Path, *arguments: object
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A supervised training that has come to FAULT_STEP; nothing of it is left afterwards."""
    processes = launch(
        hosts, "supervise", hosts.nodes, [*arguments, f"run.dir={run_dir}", KEEP_ALL, *WATCH], log
    )
    try:
        wait_for_step(processes, run_dir, FAULT_STEP, 300)
        yield processes
        assert ranks_left(hosts) == []
    finally:
        end(hosts, processes)


def test_a_killed_rank_is_named_and_the_run_goes_on(
    hosts: Hosts, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    """On the same hosts, from the last checkpoint, to the very bits of a run without a fault."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with (
        supervised(hosts, run_dir, log, config_file, "engine.zero_stage=3") as processes,
        rank_killed(hosts, "node2", run_dir, 1),
    ):
        assert wait_all(processes, 300) == [0], log.read_text()
    record = supervisor_record(run_dir)
    (failure,) = [line for line in record if line["event"] == "end of attempt"][:-1]
    assert failure["kind"] == "rank" and failure["host"] == "node2" and failure["rank"] == 1
    assert "rank 1 on node2 (pid " in str(failure["text"])
    assert "was killed by SIGKILL" in str(failure["text"])
    assert f"supervisor: {failure['text']}" in log.read_text()
    assert [line["world_size"] for line in record if line["event"] == "attempt"] == [2, 2]
    assert differences(finished_run_2_ranks, run_dir) == []


@pytest.mark.slow
def test_a_host_without_its_cable_is_left_out(
    hosts: Hosts, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    """The host of rank 0, of the ranks' meeting point and of the run's lock, even: its ranks end by
    themselves, and the rest goes on with twice the micro-batches."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with (
        supervised(hosts, run_dir, log, config_file) as processes,
        cable_out(hosts, "node1", run_dir, 0),
    ):
        assert wait_all(processes, 300) == [0], log.read_text()
        assert ranks_left(hosts) == []  # while it is still out
    record = supervisor_record(run_dir)
    failure = next(line for line in record if line["event"] == "end of attempt")
    assert failure["kind"] == "host" and failure["host"] == "node1"
    assert str(failure["text"]).startswith("host node1 (ranks 0) has not been heard of for ")
    attempts = [line for line in record if line["event"] == "attempt"]
    assert [line["hosts"] for line in attempts] == [{"node1": 1, "node2": 1}, {"node2": 1}]
    assert [line["accumulation"] for line in attempts] == [1, 2]
    assert "without node1: it " in log.read_text()
    # Codes that flip on a rounding error move the loss by up to 6e-4 (test_launchers.py).
    outcome = compare(finished_run_2_ranks, run_dir)
    assert outcome == "the same losses" or float(outcome.split()[2]) < 5e-3, outcome


@pytest.mark.slow
def test_torchrun_ends_on_the_host_that_is_cut_off(
    hosts: Hosts, config_file: Path, tmp_path: Path
) -> None:
    """Its agent asks the head's store, which does not answer: for 15 minutes, by torchrun alone."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3", *WATCH]
    processes = launch(hosts, "torchrun", hosts.nodes, arguments, log)
    try:
        wait_for_step(processes, run_dir, FAULT_STEP, 300)
        with cable_out(hosts, "node2", run_dir, 1):
            assert wait_all(processes, 200) == [1, 1], log.read_text()
            assert ranks_left(hosts) == []
    finally:
        end(hosts, processes)
    said = log.read_text()
    assert "hosts: rank 0 on node1, rank 1 on node2" in said
    assert "error on node2: torchrun has not heard from the store of its rendezvous" in said
    assert "error on node1: torchrun" not in said


@pytest.mark.slow
def test_a_signal_to_the_supervisor_saves_on_every_rank(
    hosts: Hosts, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, "engine.zero_stage=3"]
    with supervised(hosts, run_dir, log, *arguments) as processes:
        # nsenter waits for the command it has become the parent of: signal that itself.
        pid = hosts.execute(HEAD, "pgrep", "-f", "cli.main supervise").split()[0]
        hosts.execute(HEAD, "kill", f"-{int(signal.SIGTERM)}", pid)
        assert wait_all(processes, 300) == [75], log.read_text()
    assert events(run_dir, "preempted")
    with supervised(hosts, run_dir, log, *arguments) as processes:
        assert wait_all(processes, 300) == [0], log.read_text()
    assert differences(finished_run_2_ranks, run_dir) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpirun"])
def test_a_script_reaches_sshds_on_another_port(
    launcher: str, hosts: Hosts, config_file: Path, finished_run_2_ranks: Path, tmp_path: Path
) -> None:
    """SSH_PORT of launch/multinode.sh and launch/mpi.sh; nothing listens on port 22."""
    if launcher != "pdsh":
        pytest.importorskip("mpi4py")
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3"]
    processes = launch(hosts, launcher, hosts.nodes, arguments, log)
    try:
        assert wait_all(processes, 300) == [0], log.read_text()
    finally:
        end(hosts, processes)
    assert differences(finished_run_2_ranks, run_dir) == []


def test_hosts_not_reached_on_the_port_are_named(
    hosts: Hosts, config_file: Path, tmp_path: Path
) -> None:
    """Before a rank is started anywhere: those of the other hosts would wait for the missing."""
    log = tmp_path / "log"
    env = host_environment() | {"SSH_PORT": "2223"}
    script = [LAUNCH / "multinode.sh", hosts.hostfile(1), config_file, f"run.dir={tmp_path}/run"]
    assert wait_all([hosts.start(HEAD, script, log, env)], 60) == [2], log.read_text()
    refused = "connect to host {} port 2223: Connection refused"
    said = log.read_text()
    assert said.startswith("error: 2 of 2 hosts not reached: node1: ssh: "), said
    assert refused.format("node1") in said and refused.format("node2") in said
    assert "make 'ssh -p 2223 node1 true' work" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()
