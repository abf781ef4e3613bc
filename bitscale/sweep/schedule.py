"""What is left to do, in which order, and what follows when a run has ended.

Pure bookkeeping over the plan and the disk; back ends (local.py, slurm.py, commands.py) ask it for
tasks and tell it how they ended.
"""

import math
from collections.abc import Sequence
from typing import Any

from bitscale.config import num_steps, tokens_per_step, transition_step
from bitscale.config import to_tree as config_tree
from bitscale.errors import ConfigError
from bitscale.sweep import store as disk
from bitscale.sweep.store import DIVERGED, Store
from bitscale.sweep.trunks import Run, run_config
from bitscale.sweep.worker import FAULT, OK, STOPPED, Task

MAX_ATTEMPTS = 2
GIB = 2**30


class Schedule:
    """The runs of a plan: waiting, running, done, failed."""

    def __init__(
        self,
        runs: Sequence[Run],
        store: Store,
        provenance: dict[str, Any],
        launcher: Sequence[str] = (),
        disk_bytes: float | None = None,
    ) -> None:
        """`disk_bytes`: what all checkpoints may take at once; None: what they need.

        Raises ConfigError if a run cannot keep within it even alone.
        """
        self.store = store
        self.runs = {run.key: run for run in runs}
        self._provenance, self._launcher = provenance, tuple(launcher)
        self._failures: dict[str, int] = {}
        self._disk_bytes = disk_bytes
        self._reserved: dict[str, float] = {}  # bytes that running runs may come to take
        self.failed: dict[str, list[str]] = {}  # run -> the last lines of its log
        self.running: set[str] = set()
        self.elsewhere: set[str] = set()  # trained by a job of an earlier command
        self.done = {run.key for run in runs if self._is_done(run)}
        self._check_disk()

    def prune(self) -> None:
        """Delete checkpoints that nobody needs any more.

        For the command that trains, alone: of what other sweeps in the directory still need, a
        report on some of them knows nothing.
        """
        for run in self.runs.values():
            self._prune(run)

    def _is_done(self, run: Run) -> bool:
        """Whether nothing remains to be trained: it has ended, and whoever begins at it can."""
        reaches_end = run.last_step == num_steps(run.cfg)
        if reaches_end and not disk.adopt_finished(self.store, run, self._provenance):
            return False
        return not disk.missing_saves(self.store, run, self._needed(run))

    def _needed(self, run: Run) -> set[int]:
        """Steps of `run` at which others have yet to begin."""
        return {
            other.fork.step
            for other in self.runs.values()
            if other.fork is not None and other.fork.trunk == run.key and self._waits(other)
        }

    def _waits(self, run: Run) -> bool:
        """Whether it has neither finished nor saved anything of its own to go on from."""
        done = disk.adopt_finished(self.store, run, self._provenance)
        return not done and not self.has_own(run)

    def remaining(self) -> list[Run]:
        """Runs that are to be done and can be: without failed ones and what hangs on them."""
        return [
            run
            for run in self.runs.values()
            if run.key not in self.done and run.key not in self.failed and not self._blocked(run)
        ]

    def _blocked(self, run: Run) -> bool:
        fork = run.fork
        return (
            fork is not None and fork.trunk in self.failed and not self.store.has_checkpoint(*fork)
        )

    def blocked(self) -> list[Run]:
        return [
            run for run in self.runs.values() if run.key not in self.done and self._blocked(run)
        ]

    def next_run(self) -> Run | None:
        """The next run that can begin now: its trunk has saved where it begins."""
        free = self._free_bytes()
        for run in self.remaining():
            if run.key in self.running or self._is_elsewhere(run):
                continue
            if not self._fits(run, free):
                continue
            if run.fork is None or self.store.has_checkpoint(*run.fork) or self.has_own(run):
                return run
        return None

    def _check_disk(self) -> None:
        if self._disk_bytes is None:
            return
        needed = max(map(self._may_take, self.remaining()), default=0.0)
        if needed > self._disk_bytes:
            raise ConfigError(
                f"--disk-gib {self._disk_bytes / GIB:.3g} is too little for a run that needs "
                f"{needed / GIB:.3g} GiB for its checkpoints; raise it, or let fewer cells begin "
                "at one trunk"
            )

    def _may_take(self, run: Run) -> float:
        """Bytes: its last checkpoint and the next one; of a trunk also those at which others begin,
        and room for one of these."""
        kept = len(disk.missing_saves(self.store, run, self._needed(run)))
        return (kept + (4 if run.is_trunk else 2)) * disk.checkpoint_bytes(run)

    def _free_bytes(self) -> float:
        """Of the budget, beside what is kept and what running runs may come to take."""
        if self._disk_bytes is None:
            return math.inf
        kept = sum(self.store.saved_bytes(key) for key in self.runs if key not in self.running)
        return self._disk_bytes - kept - sum(self._reserved[key] for key in self.running)

    def _fits(self, run: Run, free: float) -> bool:
        """Whether it may begin with `free` bytes left. Forks make room: a trunk's saves go."""
        if self._disk_bytes is None:
            return True
        return self._may_take(run) - self.store.saved_bytes(run.key) <= free

    def not_begun(self) -> list[Run]:
        """Runs that could not begin, though nothing that they need has failed."""
        return [run for run in self.remaining() if run.key not in self.running]

    def _is_elsewhere(self, run: Run) -> bool:
        """Whether an earlier command's job trains it, or has ended it since it was last asked."""
        if self.store.is_in_use(run.key):
            self.elsewhere.add(run.key)
            return True
        if run.key not in self.elsewhere:
            return False
        self.elsewhere.discard(run.key)
        if not self._is_done(run):
            return False
        self.done.add(run.key)
        return True

    def has_own(self, run: Run) -> bool:
        return any((self.store.run_dir(run.key) / "checkpoints").glob("step-*/meta.json"))

    def begin(self, run: Run) -> Task:
        """The task that trains `run` from where it is; from now on it is running."""
        self._reserved[run.key] = self._may_take(run) if self._disk_bytes is not None else 0.0
        self.running.add(run.key)
        trunk = None if run.fork is None else self.runs[run.fork.trunk]
        start = disk.prepare_start(self.store, run, self._needed(run), trunk)
        directory = str(self.store.run_dir(run.key))
        return Task(
            run.key,
            config_tree(run_config(run, directory)),
            directory,
            start.resume,
            start.allow_change,
            self._launcher,
            self._provenance,
            run.last_step == num_steps(run.cfg),
        )

    def end(self, run: Run, code: int) -> str:
        """Take note of the exit code. Returns finished, diverged, stopped, retry or failed."""
        self.running.discard(run.key)
        if code == STOPPED:
            return "stopped"
        if code == FAULT:
            self._diverge_forks(run)
        if code in (OK, FAULT) and self._is_done(run):
            self.done.add(run.key)
            self._prune(run)
            if run.fork is not None:
                self._prune(self.runs[run.fork.trunk])
            return "diverged" if code == FAULT else "finished"
        self._failures[run.key] = self._failures.get(run.key, 0) + 1
        if self._failures[run.key] < MAX_ATTEMPTS:
            return "retry"
        self.failed[run.key] = self.store.log_tail(run.key)
        return "failed"

    def _diverge_forks(self, trunk: Run) -> None:
        """What was to begin after the fault would have met it, too."""
        for run in self.runs.values():
            fork = run.fork
            if fork is None or fork.trunk != trunk.key or self.store.has_checkpoint(*fork):
                continue
            if not self.has_own(run):
                message = f"its trunk {trunk.key} diverged before step {fork.step}"
                content = {"status": DIVERGED, "message": message, **self._provenance}
                self.store.finish(run.key, content)
                self.done.add(run.key)

    def _prune(self, run: Run) -> None:
        if run.key in self.done and run.key not in self.running:
            disk.prune(self.store, run, self._needed(run))

    def work(self, run: Run) -> float:
        """FLOPs, roughly, that a run takes on its own: for the ETA only."""
        begin = run.fork.step if run.fork is not None else 0
        steps = run.last_step - begin
        m = run.cfg.model
        width = m.num_layers * (4 * m.d_model**2 + 3 * m.d_model * m.d_ff) + 1e5
        start = transition_step(run.cfg)
        quantized = 0 if start is None else run.last_step - max(start, begin)
        return (steps + 0.3 * quantized) * tokens_per_step(run.cfg) * width
