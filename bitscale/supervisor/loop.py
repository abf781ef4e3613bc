"""From one attempt to the next: who takes part, when it is over, and what is written about it."""

import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitscale import run_lock
from bitscale.config import Config
from bitscale.environment import exported
from bitscale.errors import ConfigError
from bitscale.heartbeat import ATTEMPT_VARIABLE
from bitscale.hostfile import Host
from bitscale.preemption import StopRequest
from bitscale.recorder import METRICS_NAME, has_begun
from bitscale.supervisor import attempt as attempts
from bitscale.supervisor.attempt import EXIT_BAD_INPUT, EXIT_PREEMPTED, Attempt, Bounds, Failure
from bitscale.supervisor.hosts import largest_fit, why_unfit
from bitscale.supervisor.link import SshOptions

RECORD_NAME = "supervisor.jsonl"
LOCK_NAME = "supervisor.lock"
EXIT_GAVE_UP = 1
_LOCK_SECONDS = 120.0  # a file server may hold a dead host's lock for so long
_MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    hosts: list[Host]
    train_arguments: list[str]  # CONFIG and everything that follows it, without --resume
    ssh: SshOptions
    bounds: Bounds
    resume: str = "auto"  # for as long as the run has no checkpoint of its own
    max_restarts: int = 3  # in a row that bring no new checkpoint
    min_hosts: int = 1
    master_address: str | None = None  # the first host's name
    master_port: int | None = None  # one that is free there


class Record:
    """`RUN/supervisor.jsonl`: a line an event, synced, added to by every supervisor of the run."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / RECORD_NAME

    def write(self, event: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **fields}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk must not keep the ranks from being stopped
            print(f"warning: {self.path}: {error.strerror}; not recorded: {line}", file=sys.stderr)


def say(text: str) -> None:
    print(text, flush=True)


def supervise(cfg: Config, options: Options) -> int:
    """Train `cfg` on as many hosts as answer, again after every failure, until it is done.

    Returns the exit code: 0 done; 1 given up; 2 a rank refused its input; 75 stopped by a signal
    after saving.

    Raises:
        ConfigError: no number of the hosts divides the batch and the layout, another supervisor
            has this run, or there is no ssh here.
    """
    if not largest_fit(cfg, options.hosts):
        raise ConfigError(why_unfit(cfg, options.hosts))
    run_dir = Path(cfg.run.dir)
    with run_lock.hold(run_dir, name=LOCK_NAME), StopRequest(repeats_kill=False) as request:
        if shutil.which("ssh") is None:
            raise ConfigError("this host has no ssh to reach the others by; install openssh-client")
        return Supervisor(cfg, options, run_dir).run(lambda: request.received)


class Supervisor:
    """Attempts one after the other, and what is remembered from one to the next."""

    def __init__(self, cfg: Config, options: Options, run_dir: Path) -> None:
        self.cfg = cfg
        self.options = options
        self.run_dir = run_dir
        self.record = Record(run_dir)
        self.number = 0  # of the attempt
        self.barren = 0  # restarts in a row without a new checkpoint
        self.blamed = ""  # the host that the last failure named
        self.left_out: set[str] = set()  # hosts that were named twice in a row

    def run(self, stop_requested: Callable[[], bool]) -> int:
        while True:
            before = _latest_checkpoint(self.run_dir)
            failure = self._attempt(stop_requested)
            self.record.write("end of attempt", attempt=self.number, **failure._asdict())
            if failure.kind == "done":
                return self._end(0, f"done after {_times(self.number, 'restart')}")
            if failure.kind == "stopped":
                return self._end(failure.exit_code or EXIT_PREEMPTED, failure.text)
            if failure.kind == "bad input":
                return self._end(EXIT_BAD_INPUT, "not restarted: mend that, then start again")
            self._judge(failure)
            saved = _latest_checkpoint(self.run_dir)
            self.barren = 0 if saved != before else self.barren + 1
            if self.barren > self.options.max_restarts:
                tries = _times(self.options.max_restarts, "restart")
                return self._end(EXIT_GAVE_UP, f"given up: {tries} brought no new checkpoint")
            self._pause(stop_requested)
            if stop_requested():
                return self._end(EXIT_GAVE_UP, "stopped by a signal; the last checkpoint counts")
            self.number += 1

    def _attempt(self, stop_requested: Callable[[], bool]) -> Failure:
        begin = time.monotonic()
        wanted = [host for host in self.options.hosts if host.name not in self.left_out]
        attempt = attempts.connect(wanted, self.options.ssh, say)
        try:
            hosts = self._choose(attempt, wanted)
            if not hosts:
                return self._too_few(attempt)
            attempts.start(
                attempt,
                hosts,
                self.command(),
                exported(os.environ) | {ATTEMPT_VARIABLE: str(self.number)},
                self.options.master_address or hosts[0].name.rpartition("@")[2],
                self.options.master_port,
            )
            steps: list[int] = []

            def on_step(step: int) -> None:
                steps.append(step)
                if len(steps) == 2:  # the first heartbeat is of where it begins
                    seconds = round(time.monotonic() - begin, 2)
                    self.record.write("first step", attempt=self.number, step=step, seconds=seconds)

            failure = attempts.watch(
                attempt, self.run_dir, self.options.bounds, stop_requested, on_step
            )
            if failure.kind not in ("done", "stopped"):
                say(f"supervisor: {failure.text}")
            return failure
        finally:
            self._finish(attempt)

    def _choose(self, attempt: Attempt, wanted: Sequence[Host]) -> list[Host]:
        """Those of the hosts that answer on which the run fits, told; empty if they are too few."""
        for name, why in attempt.lost.items():
            say(f"supervisor: without {name}: it {why}")
        answering = [host for host in wanted if host.name not in attempt.lost]
        hosts = largest_fit(self.cfg, answering)
        if len(hosts) < self.options.min_hosts or not hosts:
            return []
        if len(hosts) < len(answering):
            spare = ", ".join(host.name for host in answering[len(hosts) :])
            say(f"supervisor: {spare} not used: {why_unfit(self.cfg, answering)}")
        self._announce(hosts, attempt.lost)
        return hosts

    def _too_few(self, attempt: Attempt) -> Failure:
        missing = "; ".join(f"{name} {why}" for name, why in attempt.lost.items())
        least = max(1, self.options.min_hosts)
        text = f"the hosts that answer cannot train on {least} or more of them: {missing}"
        say(f"supervisor: {text}")
        return Failure("host", text)

    def _finish(self, attempt: Attempt) -> None:
        """Nothing of this attempt is left anywhere when this returns, wherever it was reachable;
        where it was not, the agent has ended its ranks by then (`silence_seconds`)."""
        begin = time.monotonic()
        attempts.finish(attempt)
        for name in attempt.unkilled:
            say(f"supervisor: a rank on {name} cannot be killed; the host is left out from now on")
            self.left_out.add(name)
        silent = [name for name in attempt.lost if name in attempt.host_of.values()]
        if silent:
            seconds = self.options.ssh.silence_seconds
            say(
                f"supervisor: waiting {seconds:.0f} s, after which {', '.join(silent)} has ended "
                "its ranks by itself"
            )
            time.sleep(seconds)
        self.record.write(
            "all stopped",
            attempt=self.number,
            seconds=round(time.monotonic() - begin, 2),
            unreachable=silent,
        )

    def _announce(self, hosts: Sequence[Host], lost: dict[str, str]) -> None:
        world_size = sum(host.slots for host in hosts)
        names = [host.name for host in hosts]
        accumulate = self.cfg.train.global_batch_size // (
            self.cfg.train.micro_batch_size
            * max(1, world_size // (self.cfg.parallel.tp * self.cfg.parallel.pp))
        )
        say(
            f"supervisor: attempt {self.number}: {_times(world_size, 'rank')} on "
            f"{', '.join(names)}; the "
            f"global batch of {self.cfg.train.global_batch_size} by accumulating "
            f"{_times(accumulate, 'micro-batch', 'es')}"
        )
        self.record.write(
            "attempt",
            attempt=self.number,
            hosts={host.name: host.slots for host in hosts},
            world_size=world_size,
            accumulation=accumulate,
            unreachable=lost,
            from_checkpoint=_latest_checkpoint(self.run_dir),
        )

    def command(self) -> list[str]:
        """What a rank is started with."""
        begun = has_begun(self.run_dir / METRICS_NAME)  # then it knows what it began from
        resume = ["--resume", "auto" if begun else self.options.resume]
        module = [sys.executable, "-u", "-m", "bitscale.cli.main", "train"]
        return [*module, *self.options.train_arguments, *resume]

    def _judge(self, failure: Failure) -> None:
        """A host that two failures in a row name is left out, if others can go on without it."""
        again = bool(failure.host) and failure.host == self.blamed
        self.blamed = failure.host
        if not again:
            return
        rest = [h for h in self.options.hosts if h.name not in {*self.left_out, failure.host}]
        if len(largest_fit(self.cfg, rest)) >= max(1, self.options.min_hosts):
            self.left_out.add(failure.host)
            say(f"supervisor: {failure.host} has failed twice in a row and is left out from now on")
            self.record.write("left out", host=failure.host)

    def _pause(self, stop_requested: Callable[[], bool]) -> None:
        """Longer after each restart that brought nothing; and until rank 0's lock is free."""
        pause = min(2.0**self.barren, _MAX_PAUSE_SECONDS) if self.barren > 1 else 0.0
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline and not stop_requested():
            time.sleep(0.2)
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline and not stop_requested():
            try:
                with run_lock.hold(self.run_dir):
                    return
            except ConfigError:
                time.sleep(1.0)

    def _end(self, code: int, text: str) -> int:
        self.record.write("end", exit_code=code, text=text, restarts=self.number)
        say(f"supervisor: {text}")
        return code


def _latest_checkpoint(run_dir: Path) -> str:
    """The name of the one in force, which `bitscale train` will verify; empty before the first."""
    try:
        return (run_dir / "checkpoints" / "latest").read_text(errors="replace").strip()
    except OSError:
        return ""


def _times(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"
