"""Heartbeats: every rank says in a small file that it lives, how far it is, and what it does.

`RUN/ranks/rank-00003.json` is replaced atomically every few seconds by a thread of its own, so that
a rank whose training thread hangs still says so. Read them with `read_heartbeats`; nothing here
imports torch, so supervisors and `bitscale status` start at once.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import psutil

RANKS_DIR = "ranks"
ATTEMPT_VARIABLE = "BITSCALE_ATTEMPT"

Phase = Literal["start", "step", "evaluate", "save", "done", "failed"]
# Of a rank that failed: by an error of its own, by its watchdog, or because others were lost.
Failure = Literal["", "error", "hang", "peer"]
ENDED: tuple[Phase, ...] = ("done", "failed")
STACK_SIGNAL = signal.SIGUSR2  # makes a living rank write the stacks of its threads
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MISSED_BEATS = 3  # before a heartbeat counts as old
_GRACE_SECONDS = 2.0  # of a machine too busy to write in time
_SAME_PROCESS_SECONDS = 2.0  # the kernel counts start times in jiffies from a boot time


@dataclass(frozen=True)
class Heartbeat:
    """One rank, as it last wrote. Times are unix seconds of the rank's own clock."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    started: float  # when the process started, by the kernel: with `pid` it names one process
    time: float  # when this was written
    step: int  # optimizer steps completed, or the one begun
    phase: Phase
    phase_since: float  # when phase or step last changed: the rank's last progress
    attempt: int  # how often a supervisor or torchrun has started the run again
    interval_seconds: float = 5.0  # between two writings
    waiting_for: str | None = None  # the collective that the training thread is in
    place: str = ""  # the line of code that it is at
    failure: Failure = ""  # why the phase is "failed"

    def age_seconds(self, now: float) -> float:
        """Since it was written; 0 if the other host's clock is ahead of ours."""
        return max(0.0, now - self.time)

    @property
    def seconds_until_old(self) -> float:
        return _MISSED_BEATS * self.interval_seconds + _GRACE_SECONDS

    def is_fresh(self, now: float) -> bool:
        """Whether the rank has written lately, as a living one does."""
        return self.age_seconds(now) <= self.seconds_until_old

    def seems_alive(self, now: float) -> bool:
        """By the process, on this host; by its writing, on another."""
        if self.phase in ENDED:
            return False
        return self.is_fresh(now) and (not self.is_local() or self.process() is not None)

    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    def process(self) -> psutil.Process | None:
        """Its process, if it is on this host and still there; never one that has its pid again."""
        if not self.is_local():
            return None
        with suppress(psutil.Error):
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.started) < _SAME_PROCESS_SECONDS
            if same and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None


class Progress(NamedTuple):
    """Where the training thread is; the object changes as a whole, so that threads may read it."""

    phase: Phase
    step: int
    since: float  # unix seconds
    since_monotonic: float

    @classmethod
    def now(cls, phase: Phase, step: int) -> "Progress":
        return cls(phase, step, time.time(), time.monotonic())


class Place(NamedTuple):
    """What a thread is doing."""

    waiting_for: str | None  # a collective
    line: str  # of code


_NOWHERE = Place(None, "")


class HeartbeatWriter:
    """Writes this rank's heartbeat, every `interval_seconds` and at its first and last phase.

    Ranks other than 0 learn late whether the run directory is theirs (rank 0 holds its lock), and
    until `joined` leave another living run's file alone.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        interval_seconds: float,
        place: Callable[[], Place] = lambda: _NOWHERE,
    ) -> None:
        """`place` tells what the training thread is doing; it is called in the writing thread."""
        self.path = heartbeat_path(run_dir, rank)
        self._about = {
            "rank": rank,
            "local_rank": local_rank,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "attempt": attempt_from_environment(),
            "interval_seconds": interval_seconds,
        }
        self._interval_seconds = interval_seconds
        self._place = place
        self._progress = Progress.now("start", 0)
        self._failure: Failure = ""
        self._owned = rank == 0
        self._complained = False
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of the file's staging name
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def progress(self) -> Progress:
        return self._progress

    def start(self) -> None:
        """Begin. With an interval of 0 nothing is written, and an older file of this rank goes."""
        if self._interval_seconds <= 0:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return
        self.write()
        self._thread.start()

    def joined(self) -> None:
        """The ranks have met: the run directory is this launch's."""
        self._owned = True

    def mark(self, phase: Phase, step: int) -> None:
        """The training thread has come to `phase` of `step` (cheap: nothing is written yet)."""
        self._progress = Progress.now(phase, step)

    def end(self, failure: Failure = "", place: Place = _NOWHERE) -> None:
        """Write the last heartbeat and stop (once); without a failure the rank is done.

        `place` is where it failed.
        """
        if self._stop.is_set():
            return
        self._failure, self._place = failure, lambda: place
        self.mark("failed" if failure else "done", self._progress.step)
        self._stop.set()
        if self._interval_seconds > 0:
            self.write()

    def write(self) -> None:
        """Replace the file. A full disk or a directory that has gone is said once, and is no reason
        to end a training."""
        try:
            with self._lock:
                if self._is_anothers():
                    return
                self._owned = True
                self.path.parent.mkdir(parents=True, exist_ok=True)
                staging = self.path.with_name(f".{self.path.name}.partial")
                staging.write_text(json.dumps(self._heartbeat()) + "\n", encoding="utf-8")
                staging.replace(self.path)
        except OSError as error:
            if not self._complained:
                self._complained = True
                print(
                    f"warning: {self.path}: no heartbeat can be written ({error.strerror}); "
                    "training goes on, unseen by status and supervisors",
                    file=sys.stderr,
                    flush=True,
                )

    def _beat(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self.write()

    def _heartbeat(self) -> dict[str, object]:
        progress, place = self._progress, self._place()
        return self._about | {
            "time": time.time(),
            "step": progress.step,
            "phase": progress.phase,
            "phase_since": progress.since,
            "waiting_for": place.waiting_for,
            "place": place.line,
            "failure": self._failure,
        }

    def _is_anothers(self) -> bool:
        """Whether another run's rank, which lives, writes to this file."""
        if self._owned:
            return False
        before = _read(self.path)
        return before is not None and before.pid != os.getpid() and before.seems_alive(time.time())


def attempt_from_environment() -> int:
    """How often this run has been started again: by a supervisor of ours, or by torchrun."""
    for name in (ATTEMPT_VARIABLE, "TORCHELASTIC_RESTART_COUNT"):
        if (text := os.environ.get(name, "")).isdigit():
            return int(text)
    return 0


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / RANKS_DIR / f"rank-{rank:05d}.json"


def stack_path(run_dir: Path, rank: int) -> Path:
    """Where the rank's stacks go: when it hangs, and at SIGUSR2."""
    return run_dir / RANKS_DIR / f"rank-{rank:05d}.stack.txt"


def read_heartbeats(run_dir: Path) -> list[Heartbeat]:
    """The heartbeats of the run's last launch, by rank; [] if there are none.

    Ranks that have not written yet are missing. A file of an earlier launch does not count: one of
    another world size, or one last written before the newest rank's process was started. A file
    that cannot be read (it is being replaced on a network file system) is as good as missing.
    """
    found = [_read(path) for path in sorted((run_dir / RANKS_DIR).glob("rank-*.json"))]
    heartbeats = [heartbeat for heartbeat in found if heartbeat is not None]
    if not heartbeats:
        return []
    newest = max(heartbeats, key=lambda heartbeat: heartbeat.started)
    return [
        heartbeat
        for heartbeat in heartbeats
        if heartbeat.world_size == newest.world_size
        and heartbeat.rank < newest.world_size
        and heartbeat.time >= newest.started
    ]


def missing_ranks(heartbeats: list[Heartbeat]) -> list[int]:
    """Ranks of the launch that have never written; [] without any heartbeat."""
    if not heartbeats:
        return []
    present = {heartbeat.rank for heartbeat in heartbeats}
    return [rank for rank in range(heartbeats[0].world_size) if rank not in present]


def _read(path: Path) -> Heartbeat | None:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        known = {key: fields[key] for key in Heartbeat.__dataclass_fields__ if key in fields}
        heartbeat = Heartbeat(**known)
    except (OSError, ValueError, TypeError):
        return None
    return heartbeat if _is_sound(heartbeat) else None


def _is_sound(heartbeat: Heartbeat) -> bool:
    """What another program or a person has put there must not break a supervisor."""
    whole = (heartbeat.rank, heartbeat.local_rank, heartbeat.world_size, heartbeat.pid)
    numbers = (heartbeat.started, heartbeat.time, heartbeat.phase_since, heartbeat.interval_seconds)
    return (
        all(isinstance(number, int) and number >= 0 for number in (*whole, heartbeat.step))
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(heartbeat.host, str)
        # It goes into commands, and with the others onto terminals.
        and _HOST.fullmatch(heartbeat.host) is not None
        and f"{heartbeat.place}{heartbeat.waiting_for}".isprintable()
        and heartbeat.phase in get_args(Phase)
    )
