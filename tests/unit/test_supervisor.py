"""Hostfiles, who takes part, what is sent, and the agent that no rank outlives."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitscale import run_lock
from bitscale.cli.main import main
from bitscale.config import Config, load_config
from bitscale.hostfile import Host
from bitscale.supervisor.attempt import Attempt, RankEnd, find_cause
from bitscale.supervisor.hosts import largest_fit, rank_variables, why_unfit

pytestmark = pytest.mark.unit


def write_config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"""\
run: {{dir: {tmp_path}/run}}
model: {{num_layers: 2, d_model: 32, num_heads: 2, d_ff: 64}}
data: {{corpora: [{{path: corpus}}], seq_len: 32}}
train: {{steps: 10, global_batch_size: 12, micro_batch_size: 1}}
optim: {{lr: 1e-3}}
""")
    return path


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(str(write_config(tmp_path)), list(overrides))


def test_a_missing_hostfile_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    assert main(["supervise", str(path), "--hostfile", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --hostfile {tmp_path}/none: ") and error.count("\n") == 1


def test_as_many_hosts_as_the_batch_divides_over(tmp_path: Path) -> None:
    """12 sequences: 6 ranks, not 8; with tp 2 each replica is a host."""
    hosts = [Host(f"node{n}", 2) for n in (1, 2, 3, 4)]
    cfg = config(tmp_path)
    assert largest_fit(cfg, hosts) == hosts[:3]
    assert "train.global_batch_size=12 is not a multiple of" in why_unfit(cfg, hosts)
    assert largest_fit(cfg, hosts[2:]) == hosts[2:]
    shared = config(tmp_path, "parallel.tp=2", "engine.zero_stage=1")
    assert largest_fit(shared, hosts) == hosts
    assert largest_fit(shared, [Host("one", 1)]) == []


def test_hosts_that_fit_in_no_number_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=5\n")
    arguments = [str(write_config(tmp_path)), "--hostfile", str(tmp_path / "hosts")]
    assert main(["supervise", *arguments]) == 2
    assert "train.global_batch_size=12 is not a multiple of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_supervisor_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    arguments = [str(write_config(tmp_path)), "--hostfile", str(tmp_path / "hosts")]
    with run_lock.hold(tmp_path / "run", name="supervisor.lock"):
        assert main(["supervise", *arguments]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err


def test_a_host_without_ssh_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    config_file = str(write_config(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["supervise", config_file, "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "this host has no ssh to reach the others by" in capsys.readouterr().err


def test_ranks_know_their_number_and_the_meeting_point() -> None:
    variables = rank_variables([Host("b", 2), Host("a", 1)], "b", 1234)
    assert [own["RANK"] for own in variables["b"]] == ["0", "1"]
    assert variables["a"] == [
        {
            "RANK": "2",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "b",
            "MASTER_PORT": "1234",
        }
    ]


class AgentAtHand:
    """An agent that this process speaks to as the supervisor does, without ssh between."""

    def __init__(self, silence_seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bitscale.supervisor.agent", str(silence_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.hear("ready")

    def send(self, **message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, event: str) -> dict[str, Any]:
        """The next message of that kind."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message: dict[str, Any] = json.loads(line)
            if message["event"] == event:
                return message
        raise AssertionError(f"the agent ended without {event}")

    def start(self, *codes: str) -> list[int]:
        """One rank for each piece of shell; the PIDs."""
        for number, code in enumerate(codes):
            command = ["sh", "-c", code]
            ranks = [{"RANK": str(number)}]
            self.send(do="start", command=command, environment=dict(os.environ), ranks=ranks)
        pids: dict[str, int] = {}
        while len(pids) < len(codes):
            pids = self.hear("started")["pids"]
        return list(pids.values())


@pytest.fixture
def agent() -> Iterator[AgentAtHand]:
    found = AgentAtHand(silence_seconds=60.0)
    yield found
    found.process.kill()
    found.process.wait()


def test_an_agent_tells_output_codes_and_signals(agent: AgentAtHand) -> None:
    agent.start("echo rank $RANK; exit 3")
    assert agent.hear("output") == {"event": "output", "rank": 0, "text": "rank 0"}
    assert agent.hear("exit")["code"] == 3
    (rank,) = agent.start("trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done")
    agent.hear("output")
    agent.send(do="signal", number=int(signal.SIGTERM))
    assert agent.hear("output")["text"] == "saved"
    assert agent.hear("exit") == {"event": "exit", "rank": 0, "pid": rank, "code": 75}


@pytest.mark.parametrize("how", ["told", "closed", "silence", "killed"])
def test_no_rank_outlives_its_agent(how: str) -> None:
    """Nor do its children, even one in a session of its own whose parent has gone; SIGTERM does not
    impress them. A killed agent leaves the kernel to end the ranks."""
    found = AgentAtHand(silence_seconds=0.5 if how == "silence" else 60.0)
    if how == "silence":
        found.send(do="beat")
    stubborn = "trap '' TERM; while :; do sleep 0.05; done"
    pids = found.start(f'setsid sh -c "{stubborn}" & exec sh -c "{stubborn}"')
    ranks = [psutil.Process(pid) for pid in pids]
    deadline = time.monotonic() + 30
    while not (children := ranks[0].children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = ranks + children
    match how:
        case "told":
            found.send(do="end")
            assert found.hear("end")["alive"] == []
        case "closed":
            assert found.process.stdin is not None
            found.process.stdin.close()
        case "killed":
            found.process.kill()
            family = ranks
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    found.process.kill()
    found.process.wait()


def ended(rank: int, code: int, at: float) -> RankEnd:
    return RankEnd(f"node{rank}", rank, pid=100 + rank, code=code, at=at)


def attempt_of(*ends: RankEnd, **lost: str) -> Attempt:
    found = Attempt({}, queue.Queue(), silence_seconds=1.0, say=print, lost=lost)
    found.host_of = {rank: f"node{rank}" for rank in range(4)}
    found.ends = {end.rank: end for end in ends}
    return found


def test_the_cause_is_not_the_first_to_end() -> None:
    """A rank that missed another (4) comes before the one that it missed."""
    missed, fault, killed = ended(0, 4, 1.0), ended(1, 1, 2.0), ended(2, -9, 3.0)
    assert find_cause(attempt_of(missed)).host == ""  # whoever was missed, not node0
    assert find_cause(attempt_of(missed, fault)).text == (
        "rank 1 on node1 (pid 101) ended with exit code 1: it said nothing"
    )
    cause = find_cause(attempt_of(missed, fault, killed))
    assert cause.text == "rank 2 on node2 (pid 102) was killed by SIGKILL"
    assert (cause.kind, cause.host, cause.rank, cause.exit_code) == ("rank", "node2", 2, -9)
    by_real_time_signal = find_cause(attempt_of(ended(2, -37, 3.0)))
    assert by_real_time_signal.text == "rank 2 on node2 (pid 102) was killed by signal 37"
    cause = find_cause(attempt_of(missed, killed, node3="closed the ssh connection"))
    assert cause.text == "host node3 (ranks 3) closed the ssh connection"


def test_input_that_a_rank_refuses_is_told_with_its_words() -> None:
    attempt = attempt_of(ended(0, 2, 1.0))
    attempt.last_words[0] = "error: run.dir='r' is not writable"
    cause = find_cause(attempt)
    assert cause.kind == "bad input" and cause.text.endswith(": error: run.dir='r' is not writable")
