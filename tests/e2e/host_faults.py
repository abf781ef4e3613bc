"""Faults of hosts and ranks during a training over namespaces, timed, by every launcher.

Used by test_netns.py and tools/inject_host_faults.py.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bitscale.heartbeat import heartbeat_path
from netns_hosts import HEAD, Hosts
from runs import GLOBAL_BATCH, KEEP_ALL, differences, environment, events, metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
LAUNCHERS = ("supervise", "torchrun", "pdsh", "openmpi", "mpirun")
FAULT_STEP = 18  # two steps into the transition; the last checkpoint is of step 15
SLOW_STEP = 3  # a straggler is named after 20 slow steps, of 40
# Short bounds, so that a fault shows in seconds: the defaults are minutes.
WATCH = (
    "watch.heartbeat_seconds=1",
    "watch.hang_seconds=45",
    "watch.collective_timeout_seconds=60",
)
SUPERVISE = ("--host-seconds", "10", "--heartbeat-seconds", "20", "--stall-seconds", "120")
LAUNCHER_SECONDS = 420.0  # after which one that has not ended "runs on"
_PORT = "29500"
_STEP_LINE = re.compile(r"^step \d+/\d+ ")
_RANK = re.compile(r"\S*python\S* (-u )?-m bitscale\.cli\.main train ")


def launch(
    hosts: Hosts,
    launcher: str,
    nodes: Sequence[str],
    arguments: Sequence[object],
    log: Path,
) -> list[subprocess.Popen[bytes]]:
    """Start `bitscale train ARGUMENTS` with a rank on each of `nodes`; what was started here."""
    hostfile = hosts.hostfile(1, nodes)
    env = host_environment() | {"SSH_PORT": str(hosts.ssh_port)}
    match launcher:
        case "supervise":
            command = [sys.executable, "-m", "bitscale.cli.main", "supervise", *arguments]
            command += ["--hostfile", hostfile, "--ssh-port", hosts.ssh_port, *SUPERVISE]
            return [hosts.start(HEAD, command, log, env)]
        case "torchrun":
            # Every node waits for the others at the first.
            env |= {"NUM_NODES": str(len(nodes)), "HEAD": f"{nodes[0]}:{_PORT}"}
            command = [LAUNCH / "torchrun.sh", "1", *arguments]
            return [hosts.start(node, command, log, env) for node in nodes]
        case "mpirun":
            command = [LAUNCH / "mpi.sh", len(nodes), "--hostfile", hostfile, *arguments]
            return [hosts.start(HEAD, command, log, env)]
    env |= {"LAUNCHER": launcher, "MASTER_PORT": _PORT}
    command = [LAUNCH / "multinode.sh", hostfile, *arguments]
    return [hosts.start(HEAD, command, log, env)]


def host_environment() -> dict[str, str]:
    """Of a shell on such a host; mpirun asks whether root means it."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    network = {"IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    return environment() | root | network | {"PYTHONPATH": path}


def wait_for_step(
    processes: Sequence[subprocess.Popen[bytes]], run_dir: Path, step: int, seconds: float
) -> None:
    """Until the metrics show `step`; RuntimeError if the launch ends, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not (steps := steps_taken(run_dir)) or max(steps) < step:
        if all(process.poll() is not None for process in processes):
            raise RuntimeError(f"the launch ended before step {step}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no step {step} in {seconds:.0f} s")
        time.sleep(0.02)


def steps_taken(run_dir: Path) -> list[int]:
    try:
        return [line["step"] for line in metrics(run_dir, "train")]
    except (OSError, ValueError):  # none yet, or half a line
        return []


def wait_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int] | None:
    """Exit codes; None if not all have ended within `seconds`."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
    return [process.returncode for process in processes]


def wait_any(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Whether one of them has ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while all(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def pid_of(run_dir: Path, rank: int) -> int:
    """As its own host counts."""
    pid: int = json.loads(heartbeat_path(run_dir, rank).read_text())["pid"]
    return pid


def ranks_left(hosts: Hosts) -> list[str]:
    """`node: pid` of every training process that still runs (stopped ones included)."""
    found = []
    for node in hosts.nodes:
        listed = hosts.execute(node, "ps", "-eo", "pid=,stat=,args=")
        for line in listed.splitlines():
            pid, state, arguments = line.split(None, 2)
            if _RANK.match(arguments) and "Z" not in state:
                found.append(f"{node}: {pid}")
    return found


# Faults: each is applied to the last node, which has the last rank, and undone afterwards.


@contextmanager
def rank_killed(hosts: Hosts, node: str, run_dir: Path, rank: int) -> Iterator[None]:
    hosts.execute(node, "kill", "-KILL", pid_of(run_dir, rank))
    yield


@contextmanager
def rank_stopped(hosts: Hosts, node: str, run_dir: Path, rank: int) -> Iterator[None]:
    hosts.execute(node, "kill", "-STOP", pid_of(run_dir, rank))
    yield


@contextmanager
def cable_out(hosts: Hosts, node: str, run_dir: Path, rank: int) -> Iterator[None]:
    hosts.link(node, "down")
    try:
        yield
    finally:
        hosts.link(node, "up")


@contextmanager
def rank_slowed(hosts: Hosts, node: str, run_dir: Path, rank: int) -> Iterator[None]:
    """Stopped for three quarters of the time, as a process on a throttled core would be."""
    pid, over = pid_of(run_dir, rank), threading.Event()

    def slow() -> None:
        shell = f"while kill -STOP {pid} && sleep .03 && kill -CONT {pid} && sleep .01; do :; done"
        process = subprocess.Popen(
            hosts.command(node, ["sh", "-c", shell]), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not over.wait(0.2):
            pass
        process.kill()

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def disk_full(hosts: Hosts, node: str, run_dir: Path, rank: int) -> Iterator[None]:
    """Of the file system that holds the run's directory, which is a small one."""
    filler = run_dir.parent / "filler"
    with filler.open("wb") as file:
        try:
            while file.write(bytes(1 << 16)):
                file.flush()
        except OSError:
            pass
    try:
        yield
    finally:
        filler.unlink()


FAULTS: dict[str, Callable[..., object]] = {
    "rank killed": rank_killed,
    "rank stopped": rank_stopped,
    "cable out": cable_out,
    "disk full": disk_full,
    "rank slowed": rank_slowed,
}
# After these the last node takes no part.
FEWER = ("cable out",)


@dataclass
class Seen:
    """What one fault did under one launcher."""

    fault: str
    launcher: str
    num_hosts: int  # with a rank each
    # From the fault to the launcher's end, or until the supervisor had stopped all ranks.
    exit_seconds: float | None = None
    exit_codes: list[int | None] = field(default_factory=list)  # None: still runs
    ended_seconds: float | None = None  # of several commands, the first that ended
    message: str = ""  # the line that says what happened
    left: list[str] = field(default_factory=list)  # ranks that the launcher left behind
    resumed_ranks: int = 0
    first_step_seconds: float | None = None  # from the restart
    outcome: str = ""
    transcript: str = ""
    mapped: bool = False  # which ranks are on the last host has been said when the run began

    @property
    def names(self) -> str:
        """What a line says of the last rank, to which it happened."""
        rank, host = self.num_hosts - 1, f"node{self.num_hosts}"
        naming = rf"rank {rank} .{{0,40}}\b{host}\b|host {host} \(ranks {rank}\)"
        if re.search(naming, self.transcript):
            return "rank and host"
        if not re.search(rf"Remote daemon: .* node {host}", self.transcript):
            return "nothing"
        return "host, whose rank the start of the log has" if self.mapped else "host"


def inject(
    hosts: Hosts, launcher: str, fault: str, folder: Path, config: Path, reference: Path
) -> Seen:
    """One fault during one training by one launcher, and the continuation.

    `reference` is the same run, never interrupted; `folder` is the run's, on a file system that
    this may fill.
    """
    seen = Seen(fault, launcher, len(hosts.nodes))
    run_dir, log = folder / "run", folder.parent / f"{folder.name}.log"
    arguments = [config, f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3", *WATCH]
    nodes = hosts.nodes
    if fault == "rank slowed":
        arguments.append("log.every=5")  # a straggler is judged by medians of so many steps
    if len(nodes) > 2:
        arguments.append("train.micro_batch_size=1")
    processes = launch(hosts, launcher, nodes, arguments, log)
    try:
        wait_for_step(processes, run_dir, SLOW_STEP if fault == "rank slowed" else FAULT_STEP, 300)
        before = len(log.read_text())
        on_last = rf"^(node1: )?hosts: .*\brank {len(nodes) - 1} on {nodes[-1]}$"
        seen.mapped = bool(re.search(on_last, log.read_text(), re.MULTILINE))
        begin, begin_unix = time.monotonic(), time.time()
        with FAULTS[fault](hosts, nodes[-1], run_dir, len(nodes) - 1):  # type: ignore[attr-defined]
            bound = begin + (300 if launcher == "supervise" else LAUNCHER_SECONDS)
            if wait_any(processes, bound - time.monotonic()):
                seen.ended_seconds = round(time.monotonic() - begin, 1)
            codes = wait_all(processes, bound - time.monotonic())
            seen.exit_seconds = None if codes is None else round(time.monotonic() - begin, 1)
            seen.exit_codes = [process.poll() for process in processes]
            if codes is not None:
                # A host without its cable ends what it has by itself, or does not.
                time.sleep(2)
            seen.left = ranks_left(hosts)
            said = log.read_text()[before:]
    finally:
        end(hosts, processes)
    lines = [line for line in said.splitlines() if line.strip() and not _STEP_LINE.match(line)]
    seen.transcript = "\n".join(lines)
    seen.message = message_of(lines)
    if launcher == "supervise":
        _judge_supervised(seen, run_dir, begin_unix)
    if not events(run_dir, "finished"):
        rest = nodes[:-1] if fault in FEWER else nodes
        while GLOBAL_BATCH % len(rest):
            rest = rest[:-1]
        try:
            _resume(seen, hosts, launcher, rest, arguments, run_dir, log)
        except (RuntimeError, AssertionError) as error:  # the fault itself has been measured
            seen.outcome = f"not continued: {error}"
            return seen
    seen.outcome = compare(reference, run_dir)
    return seen


def _resume(
    seen: Seen,
    hosts: Hosts,
    launcher: str,
    nodes: Sequence[str],
    arguments: Sequence[object],
    run_dir: Path,
    log: Path,
) -> None:
    resumed = len(events(run_dir, "resume"))
    begin = time.monotonic()
    more = [] if launcher == "supervise" else ["--resume", "auto"]
    processes = launch(hosts, launcher, nodes, [*arguments, *more], log)
    try:
        while len(events(run_dir, "resume")) == resumed:
            if wait_all(processes, 0.05) is not None or time.monotonic() - begin > 300:
                break
        if len(events(run_dir, "resume")) == resumed:
            raise RuntimeError("no rank resumed within 300 s")
        step = events(run_dir, "resume")[-1]["step"]
        wait_for_step(processes, run_dir, step + 1, 300)
        seen.first_step_seconds = round(time.monotonic() - begin, 1)
        seen.resumed_ranks = events(run_dir, "resume")[-1]["world_size"]
        codes = wait_all(processes, 300)
        assert codes is not None and not any(codes), f"the continuation ended with {codes}"
    finally:
        end(hosts, processes)


def _judge_supervised(seen: Seen, run_dir: Path, begin_unix: float) -> None:
    lines = supervisor_record(run_dir)
    stopped = next((line["time"] for line in lines if line["event"] == "all stopped"), None)
    if stopped is not None:
        at = datetime.datetime.fromisoformat(str(stopped)).timestamp()
        seen.exit_seconds = round(at - begin_unix, 1)
    attempts = [line for line in lines if line["event"] == "attempt"]
    first = [line for line in lines if line["event"] == "first step" and line["attempt"]]
    seen.resumed_ranks = attempts[-1]["world_size"] if len(attempts) > 1 else 0
    seen.first_step_seconds = first[0]["seconds"] if first else None
    ends = [line for line in lines if line["event"] == "end of attempt"]
    if ends and ends[0]["kind"] != "done":
        seen.message = str(ends[0]["text"])


def supervisor_record(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "supervisor.jsonl").read_text().splitlines()]


def end(hosts: Hosts, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Nothing of a launch is left: everything that was started here, and ranks left by it."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    for entry in ranks_left(hosts):
        node, _, pid = entry.partition(": ")
        hosts.execute(node, "kill", "-KILL", pid)


def compare(reference: Path, run_dir: Path) -> str:
    """How a continued run differs from one that was never interrupted."""
    if not events(run_dir, "finished"):
        return "not finished"
    launches = [*events(run_dir, "start"), *events(run_dir, "resume")]
    same_size = {line["world_size"] for line in launches} == {
        line["world_size"] for line in events(reference, "start")
    }
    if same_size and not differences(reference, run_dir):
        return "bitwise the uninterrupted run"
    theirs = {line["step"]: line["loss"] for line in metrics(reference, "train")}
    ours = {line["step"]: line["loss"] for line in metrics(run_dir, "train")}
    if theirs.keys() != ours.keys():
        return f"steps {sorted(theirs.keys() ^ ours.keys())} in one run only"
    worst = max(abs(ours[step] / theirs[step] - 1) for step in theirs)
    return f"losses within {worst:.1e} of the uninterrupted run" if worst else "the same losses"


def message_of(lines: Sequence[str]) -> str:
    """The line that says most: the supervisor's, then what a rank says of another, then others'."""
    for pattern in (
        r"supervisor: .*(rank|host)",
        r"(^|\] ?|: )error.*rank \d+ on \w+",
        r"(^|: )error: ",
        r"exits with return code|exited|non-zero|Root Cause",
    ):
        for line in lines:
            if re.search(pattern, line):
                return line.strip()[:400]
    return lines[-1].strip()[:400] if lines else ""
