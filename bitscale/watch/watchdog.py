"""Ends a rank that makes no progress, after it has said where it hangs.

A thread compares the rank's last progress with the bound of its phase. When that is over, the rank
writes the stacks of all its threads to `RUN/ranks/rank-00003.stack.txt`, names the rank that is
furthest behind, gives the other ranks a moment to do the same, and exits with code 3. Should even
this thread not run (something keeps Python's lock), the C library's timer of faulthandler writes
the stacks and exits with 1, a minute or another bound later.

SIGUSR2 makes a living rank write its stacks and go on (`bitscale status --stacks RUN`).
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO

from bitscale.heartbeat import (
    STACK_SIGNAL,
    Heartbeat,
    HeartbeatWriter,
    Phase,
    Progress,
    read_heartbeats,
    stack_path,
)
from bitscale.recorder import format_duration
from bitscale.watch.suspects import find_suspect
from bitscale.watch.whereabouts import place_of_main_thread

EXIT_HUNG = 3
# Reading a corpus or a checkpoint, building an engine and writing a checkpoint take long by nature.
_PATIENCE: dict[Phase, float] = {"start": 4.0, "save": 4.0}
_OTHERS_SECONDS = 10.0  # for the other ranks' stacks, before the launcher ends them for our exit
_TIMER_SECONDS = 60.0


class Watchdog:
    """Of the rank whose progress `heartbeats` knows."""

    def __init__(
        self, run_dir: Path, heartbeats: HeartbeatWriter, *, rank: int, hang_seconds: float
    ) -> None:
        self._run_dir, self._heartbeats, self._rank = run_dir, heartbeats, rank
        self._hang_seconds = hang_seconds
        self._poll_seconds = min(1.0, max(hang_seconds / 10, 0.05))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: IO[str] = sys.stderr

    def start(self) -> None:
        """Begin; SIGUSR2 writes stacks from now on, with `hang_seconds` 0 too."""
        self._stacks = _open_stacks(stack_path(self._run_dir, self._rank), self._rank)
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True)
        if self._hang_seconds > 0:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACK_SIGNAL)
        if self._stacks is not sys.stderr:
            self._stacks.close()

    def _watch(self) -> None:
        seen, waited_seconds, last = self._heartbeats.progress, 0.0, time.monotonic()
        while not self._stop.wait(self._poll_seconds):
            progress, now = self._heartbeats.progress, time.monotonic()
            # Time in which this thread was stopped too (SIGSTOP, a suspended job) is no hang.
            waited_seconds += min(now - last, 2 * self._poll_seconds)
            last = now
            if progress is not seen:
                seen, waited_seconds = progress, 0.0
            bound = self._hang_seconds * _PATIENCE.get(progress.phase, 1.0)
            faulthandler.dump_traceback_later(
                bound + max(_TIMER_SECONDS, bound), exit=True, file=self._stacks
            )
            if waited_seconds > bound:
                self._give_up(progress, waited_seconds)

    def _give_up(self, progress: Progress, waited_seconds: float) -> None:
        place = place_of_main_thread()
        waits = f"in {place.waiting_for}" if place.waiting_for else "not in a collective"
        suspect = find_suspect(
            read_heartbeats(self._run_dir), time.time(), own_rank=self._rank, own_place=place
        )
        blame = "" if suspect is None else f"; {suspect.text}"
        if suspect is not None and suspect.rank == self._rank:
            blame = "; the other ranks wait for this one"
        print(
            f"error on rank {self._rank} ({os.uname().nodename}, process {os.getpid()}): no "
            f"progress for {format_duration(waited_seconds)} "
            f"(watch.hang_seconds={self._hang_seconds:g}) in phase {progress.phase}, step "
            f"{progress.step:,}, {waits}, at {place.line}"
            f"{blame}; stacks of all threads: {stack_path(self._run_dir, self._rank)}; "
            "continue with --resume auto",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._heartbeats.end("hang", place)
        self._wait_for_others()
        os._exit(EXIT_HUNG)

    def _wait_for_others(self) -> None:
        """Until they have written their stacks too; on this host we make them."""
        deadline = time.monotonic() + min(_OTHERS_SECONDS, self._hang_seconds)
        while (others := self._not_ended()) and time.monotonic() < deadline:
            time.sleep(self._poll_seconds)
        asked = [process for beat in others if (process := beat.process()) is not None]
        for process in asked:
            process.send_signal(STACK_SIGNAL)
        if asked:
            time.sleep(1.0)

    def _not_ended(self) -> list[Heartbeat]:
        now = time.time()
        beats = read_heartbeats(self._run_dir)
        return [beat for beat in beats if beat.rank != self._rank and beat.seems_alive(now)]


def _open_stacks(path: Path, rank: int) -> IO[str]:
    """The file for stacks, with a line that says whose they are; stderr if it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        print(
            f"warning: {path} cannot be written ({error.strerror}): stacks go to stderr",
            file=sys.stderr,
            flush=True,
        )
        return sys.stderr
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"# rank {rank}, {os.uname().nodename}, process {os.getpid()}, since {started}\n")
    file.flush()
    return file
