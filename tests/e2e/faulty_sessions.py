"""Training sessions with faults and kills, forked from a process that has imported everything.

    python faulty_sessions.py JOBS      a JSON list of `Job`s; prints their exit codes, as JSON

Faults are functions of what is trained on, so that a repeated step repeats its fault. A kill is a
SIGKILL of all ranks at a named moment, once a job; the job then begins its next session, which
resumes by itself.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitscale import guard
from bitscale.data.batches import Batches, MicroBatch
from bitscale.engine import StepResult, TrainEngine
from bitscale.model.bitlinear import bit_linears
from bitscale.recorder import Recorder
from preloaded import Session, preload

MOMENTS = {
    "before the amendment is written": (guard, "write_amendments", False),
    "after the amendment is written": (guard, "write_amendments", True),
    "after the metrics are cut": (Recorder, "rewind", True),
    "after the rollback is recorded": (guard, "record", True),
}
_FORK = multiprocessing.get_context("fork")
_TIMEOUT_SECONDS = 120.0
_NUM_IDS = 512


class Fault(NamedTuple):
    """What goes wrong with the batches `first` to `last`."""

    kind: str  # "nan": one weight gradient is NaN; "targets": they are not what follows
    first: int
    last: int
    above_strength: float = -1.0  # only where λ of weights is larger


class Job(NamedTuple):
    """One run, however many sessions it takes."""

    run_dir: str
    arguments: list[str]
    num_ranks: int
    fault: Fault | None = None
    kills: Sequence[str | int] = ()  # of MOMENTS, or the batch before which to kill
    amendments_of: str = ""  # another run's, in force from the first step on
    resume: str = "auto"


def main() -> int:
    preload()
    codes = []
    for tree in json.loads(sys.argv[1]):
        job = Job(**{**tree, "fault": Fault(**tree["fault"]) if tree.get("fault") else None})
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_run, args=(job, theirs))  # patches end with it
        process.start()
        theirs.close()
        codes.append(ours.recv())
        process.join()
    print(json.dumps(codes))
    return 0


def _run(job: Job, answer: Connection) -> None:
    run_dir = Path(job.run_dir)
    run_dir.mkdir(parents=True)
    if job.fault is not None:
        inject(job.fault)
    for kill in job.kills:
        flag = run_dir.with_name(f"{run_dir.name}-{kill}")
        if isinstance(kill, int):
            kill_before(kill, flag)
        else:
            owner, name, after = MOMENTS[kill]
            kill_at(owner, name, flag, after=after)
    if job.amendments_of:
        shutil.copy(Path(job.amendments_of) / guard.AMENDMENTS_NAME, run_dir)
    arguments = [*job.arguments, f"run.dir={run_dir}", "--resume", job.resume]
    log = run_dir.with_name(f"{run_dir.name}.log")
    codes: list[int] = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(Session(arguments, job.num_ranks, log).wait(_TIMEOUT_SECONDS))
    answer.send(codes)


def inject(fault: Fault) -> None:
    """From now on this process and those forked from it have `fault`."""
    read, step = Batches.micro_batches, TrainEngine.train_step
    index = -1

    def micro_batches(self: Batches, batch: int) -> Iterator[MicroBatch]:
        nonlocal index
        index = batch  # now, not when the first is read
        if fault.kind != "targets" or not fault.first <= batch <= fault.last:
            return read(self, batch)
        return (
            m._replace(target_ids_BS=(7 * m.target_ids_BS + 3) % _NUM_IDS)
            for m in read(self, batch)
        )

    def train_step(
        self: TrainEngine, batches: Iterable[MicroBatch], *, lr: float, weight_decay: float
    ) -> StepResult:
        layer = next(layer for _, layer in bit_linears(self.module))
        strong = layer.strength.weight > fault.above_strength
        if fault.kind != "nan" or not strong or not fault.first <= index <= fault.last:
            return step(self, batches, lr=lr, weight_decay=weight_decay)
        hook: Any = layer.weight.register_hook(lambda gradient: gradient * torch.nan)
        try:
            return step(self, batches, lr=lr, weight_decay=weight_decay)
        finally:
            hook.remove()

    Batches.micro_batches = micro_batches  # type: ignore[method-assign]
    TrainEngine.train_step = train_step  # type: ignore[method-assign]


def kill_at(owner: Any, name: str, flag: Path, *, after: bool) -> None:
    """The first call of `owner.name` ends in a kill, before or after it has done its work."""
    original: Callable[..., Any] = getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if not after:
            _kill_once(flag)
        result = original(*args, **kwargs)
        if after:
            _kill_once(flag)
        return result

    setattr(owner, name, killed)


def kill_before(batch: int, flag: Path) -> None:
    """The first time that `batch` is to be trained on ends in a kill."""
    read = Batches.micro_batches

    def micro_batches(self: Batches, index: int) -> Iterator[MicroBatch]:
        if index == batch:
            _kill_once(flag)
        return read(self, index)

    Batches.micro_batches = micro_batches  # type: ignore[method-assign]


def _kill_once(flag: Path) -> None:
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
