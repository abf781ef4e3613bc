"""What a sweep says while it runs: a line for each run that ends, at times where the others are."""

import time
from collections.abc import Callable, Mapping

from bitscale.recorder import format_duration
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.trunks import Run

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Lines on stdout, with the share of the work that is done and the time that is left."""

    def __init__(
        self,
        schedule: Schedule,
        names: Mapping[str, str],
        *,
        workers: int = 1,
        write: Callable[[str], None] | None = None,
    ) -> None:
        """`names` says what a run is (label and seed), by key."""
        self._schedule, self._names, self._workers = schedule, names, workers
        self._write = write or (lambda line: print(line, flush=True))
        self._begin = self._last_line = time.monotonic()
        self._started: dict[str, tuple[float, int]] = {}  # run -> clock, step at its start
        self._done_work = 0.0
        self._told: set[str] = set()  # runs of others that were mentioned
        self._total = sum(schedule.work(run) for run in schedule.remaining())

    def say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._write(text)

    def begin(self, run: Run) -> None:
        self._started[run.key] = time.monotonic(), self._schedule.store.last_step(run.key)

    def end(self, run: Run, how: str) -> None:
        begun, _ = self._started.pop(run.key)
        if how in ("finished", "diverged"):
            self._done_work += self._schedule.work(run)
        seconds = format_duration(time.monotonic() - begun)
        count = f"[{len(self._schedule.done)}/{len(self._schedule.runs)}]"
        text = f"{count} {self._names[run.key]} ({run.key}): {how} after {seconds}{self._left()}"
        if how in ("failed", "retry"):
            again = "; once more" if how == "retry" else ""
            log = self._schedule.store.log(run.key)
            text = f"{count} {self._names[run.key]} ({run.key}): failed{again}; {log} ends with\n"
            text += "\n".join(f"    {line}" for line in self._schedule.store.log_tail(run.key, 4))
        self.say(text)

    def wait_for_others(self) -> None:
        """Say, once of each, which runs a job of an earlier command trains."""
        for key in sorted(self._schedule.elsewhere - self._told):
            self.say(f"{self._names[key]} ({key}): another job trains it; waiting for that")
        self._told |= self._schedule.elsewhere

    def tick(self) -> None:
        """Where the runs are, if nothing was said for a while."""
        if time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES or not self._started:
            return
        parts = []
        for key in self._started:
            run = self._schedule.runs[key]
            step = self._schedule.store.last_step(key)
            parts.append(f"{self._names[key]} at step {step:,} of {run.last_step:,}")
        self.say(f"    running: {'; '.join(parts)}{self._left()}")

    def _left(self) -> str:
        """', ETA ...' from the work done since the start, that of unfinished runs included."""
        done = self._done_work
        for key, (_, first) in self._started.items():
            run = self._schedule.runs[key]
            begin = run.fork.step if run.fork is not None else 0
            first = max(first, begin)
            steps = max(self._schedule.store.last_step(key) - first, 0)
            done += self._schedule.work(run) * steps / max(run.last_step - begin, 1)
        seconds = time.monotonic() - self._begin
        if not done or seconds < 1:
            return ""
        return f", ETA {format_duration((self._total - done) / done * seconds)}"
