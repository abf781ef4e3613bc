"""Kill a run with SIGKILL at chosen moments, resume it, and say where each kill really hit.

A kill is aimed (`Aim`), and afterwards classified by what the dead run left on disk
(`KillPoint`): the aim says what was tried, the kill point what was tested.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from bitscale.recorder import read_lines
from runs import EVAL_EVERY, NUM_STEPS

MOMENTS = ("start-up", "step", "evaluation", "save", "publication", "pruning")
_POLL_SECONDS = 0.0002
_TIMEOUT_SECONDS = 120.0


class Process(Protocol):
    """What is used of subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Aim(NamedTuple):
    """When to kill: at `moment`, not before `step` is done, and `delay_seconds` after that."""

    moment: str  # of MOMENTS
    step: int
    delay_seconds: float
    one_rank: bool = False  # kill one rank only, and leave the rest to the launcher


class KillPoint(NamedTuple):
    """Where a kill hit, judged from the files that it left."""

    moment: str  # of MOMENTS
    phase: str  # of the last recorded step: "16 bit", "ramp" or "ternary"; "" at start-up
    step: int  # last recorded step
    one_rank: bool


def random_aims(
    rng: random.Random, count: int, startup_seconds: float, *, several_ranks: bool
) -> list[Aim]:
    """Aims at rising steps, so that several kills hit one run."""
    aims = []
    for step in sorted(rng.randrange(1, NUM_STEPS - 1) for _ in range(count)):
        moment = rng.choices(MOMENTS, weights=(3, 4, 2, 4, 4, 2))[0]
        longest = {"start-up": startup_seconds, "step": 0.03, "evaluation": 0.004, "save": 0.02}
        delay = rng.uniform(0.0, longest.get(moment, 0.0005))
        aims.append(Aim(moment, step, delay, one_rank=several_ranks and rng.random() < 0.25))
    return aims


def run_with_kills(
    begin: Callable[[], Process], run_dir: Path, log: Path, aims: Sequence[Aim]
) -> list[KillPoint]:
    """Begin a session, kill it at each aim, begin the next, and let the last one finish.

    `begin` starts a training that resumes by itself (--resume auto) and writes to `log`. A
    session that ends before its aim comes about gives no kill point. Raises AssertionError with
    the log if a session fails.
    """
    points = []
    for aim in aims:
        before = _Left.behind(run_dir)
        process = begin()
        if _wait_until(_trigger(aim, run_dir, before), process):
            time.sleep(aim.delay_seconds)
        if process.poll() is None:
            kill(process, one_rank=aim.one_rank)
            points.append(_judge(run_dir, before, aim.one_rank))
        else:
            assert process.returncode == 0, log.read_text(errors="replace")
    assert begin().wait(_TIMEOUT_SECONDS) == 0, log.read_text(errors="replace")
    return points


def wait_for_step(process: Process, run_dir: Path, step: int) -> None:
    """Return as soon as `process`, just started, has recorded `step`."""
    before = _Left.behind(run_dir)
    assert _wait_until(lambda: _reached(run_dir, before, step), process), "the run ended before"


def kill(process: Process, *, one_rank: bool = False) -> None:
    """SIGKILL `process` and all its descendants, and wait until none is left.

    torchrun gives each rank a session of its own, so a process group would not reach them.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    if not one_rank:
        process.kill()
    for member in family[-1:] if one_rank else family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(_TIMEOUT_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=_TIMEOUT_SECONDS)
    assert not alive, alive


class _Left(NamedTuple):
    """What a session finds, to tell its own traces from its predecessors'."""

    metrics_inode: int  # 0: no metrics yet; every session replaces the file or makes it
    staging: frozenset[tuple[str, int]]  # unfinished checkpoint directories, see `_staging`

    @classmethod
    def behind(cls, run_dir: Path) -> "_Left":
        return cls(_inode(run_dir / "metrics.jsonl"), frozenset(_staging(run_dir)))


def _trigger(aim: Aim, run_dir: Path, before: _Left) -> Callable[[], bool]:
    checkpoints = run_dir / "checkpoints"
    match aim.moment:
        case "start-up":
            return lambda: True
        case "save":
            return lambda: (
                _reached(run_dir, before, aim.step)
                and any(name.endswith(".partial") for name, _ in _staging(run_dir) - before.staging)
            )
        case "publication":
            return lambda: _reached(run_dir, before, aim.step) and _unpublished(checkpoints)
        case "pruning":
            return lambda: any(
                name.endswith(".deleted") for name, _ in _staging(run_dir) - before.staging
            )
        case "evaluation":
            return lambda: (
                _reached(run_dir, before, aim.step)
                and _last_train(run_dir).get("step", 1) % EVAL_EVERY == 0
            )
    return lambda: _reached(run_dir, before, aim.step)


def _wait_until(trigger: Callable[[], bool], process: Process) -> bool:
    """True when `trigger` comes about, False if `process` ends first."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while process.poll() is None:
        if trigger():
            return True
        assert time.monotonic() < deadline, "neither the moment nor the end of the run came"
        time.sleep(_POLL_SECONDS)
    return False


def _judge(run_dir: Path, before: _Left, one_rank: bool) -> KillPoint:
    last = _last_train(run_dir)
    step = last.get("step", 0)
    if not _reached(run_dir, before, 0) or step <= _first_step(run_dir):
        return KillPoint("start-up", "", step, one_rank)
    strength = last["lambda_weight"]
    phase = "16 bit" if strength == 0 else "ternary" if strength == 1 else "ramp"
    fresh = [name for name, _ in _staging(run_dir) - before.staging]
    if any(name.endswith(".partial") for name in fresh):
        moment = "save"
    elif _unpublished(run_dir / "checkpoints"):
        moment = "publication"
    elif any(name.endswith(".deleted") for name in fresh):
        moment = "pruning"
    elif step % EVAL_EVERY == 0 and not _has_valid(run_dir, step):
        moment = "evaluation"
    else:
        moment = "step"
    return KillPoint(moment, phase, step, one_rank)


def _reached(run_dir: Path, before: _Left, step: int) -> bool:
    """Whether this session (not its predecessor) has recorded `step`."""
    if _inode(run_dir / "metrics.jsonl") in (0, before.metrics_inode):
        return False
    return bool(_last_train(run_dir).get("step", 0) >= step)


def _last_train(run_dir: Path) -> dict[str, Any]:
    """The last complete train line; {} if there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            tail = file.read()
    except FileNotFoundError:
        return {}
    for line in reversed(tail.split(b"\n")[:-1]):
        if line.startswith(b'{"kind": "train"'):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def _first_step(run_dir: Path) -> int:
    """The step from which the last session that got so far continued."""
    starts = [line for line in _lines(run_dir) if line.get("event") in ("start", "resume")]
    step: int = starts[-1]["step"] if starts else 0
    return step


def _has_valid(run_dir: Path, step: int) -> bool:
    return any(line["kind"] == "valid" and line["step"] == step for line in _lines(run_dir))


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl but a torn last one."""
    return [line for _, _, line in read_lines(run_dir / "metrics.jsonl")]


def _unpublished(checkpoints: Path) -> bool:
    """Whether a whole checkpoint is newer than the one that `latest` names."""
    names = sorted(path.name for path in checkpoints.glob("step-*"))
    if not names:
        return False
    try:
        return (checkpoints / "latest").read_text().strip() < names[-1]
    except FileNotFoundError:
        return True


def _staging(run_dir: Path) -> set[tuple[str, int]]:
    """(name, time of change) of directories being written (.partial) or deleted (.deleted)."""
    found = set()
    for path in (run_dir / "checkpoints").glob(".step-*"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
