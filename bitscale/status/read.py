"""What state a run is in, also one that died without a word."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitscale.errors import DataError
from bitscale.heartbeat import RANKS_DIR, Heartbeat, missing_ranks, read_heartbeats
from bitscale.recorder import METRICS_NAME, format_duration
from bitscale.status.tail import Tail, read_tail

State = Literal["running", "stalled", "finished", "stopped", "failed", "killed", "unknown"]
RankState = Literal["alive", "silent", "gone", "missing", "done", "failed"]
# Without progress of any rank: what only looks like a hang passes within it.
_STEP_SECONDS = 120.0
_STEPS = 20  # or as many steps as the run has done lately
_OTHER_PHASE_SECONDS = 900.0
_SKIPPED_FOLDERS = {"checkpoints", "tensorboard", RANKS_DIR}


@dataclass(frozen=True)
class RankStatus:
    """One rank of the last launch. Times count back from now."""

    rank: int
    state: RankState
    host: str = ""
    pid: int = 0
    phase: str = ""
    step: int = 0
    progress_seconds: float = 0.0  # since phase or step changed
    heartbeat_seconds: float = 0.0  # since it wrote
    waiting_for: str | None = None
    place: str = ""
    failure: str = ""  # error, hang, peer (others were lost)


@dataclass(frozen=True)
class RunStatus:
    """A run. None: it has not said."""

    run_dir: str
    state: State
    why: str
    step: int | None
    num_steps: int | None
    loss: float | None  # of the last recorded step, nats per token
    valid_loss: float | None
    lambda_weight: float | None
    lambda_phase: Literal["16 bit", "ramp", "ternary"] | None
    tokens: int | None
    tokens_per_second: float | None
    eta_seconds: float | None  # as of now; None unless it runs
    checkpoint: str | None  # the one in force
    begun: float | None  # unix seconds of the run's first session
    started: float | None  # and of its last one
    attempt: int | None
    slowest_rank: int | None  # by its own work, in the last interval
    slowdown: float | None  # over the others' median
    straggler: str | None  # named by the run, and not over
    ranks: tuple[RankStatus, ...]


def read_status(run_dir: Path) -> RunStatus:
    """Raises DataError if there is no run in `run_dir`."""
    if not is_run(run_dir):
        raise DataError(
            f"{run_dir}: no run here, neither {METRICS_NAME} nor heartbeats in {RANKS_DIR}/; name "
            "a run directory (run.dir), or list those below a folder with `bitscale runs`"
        )
    now = time.time()
    tail, beats = read_tail(run_dir), read_heartbeats(run_dir)
    ranks = _rank_statuses(beats, now)
    state, why = _judge(tail, ranks, beats, now)
    train, speed = tail.train or {}, tail.speed or {}
    strength = train.get("lambda_weight")
    slowest, slowdown = _slowest(speed, len(ranks))
    eta = speed.get("eta_seconds")
    if state == "running" and eta is not None:
        eta = max(0.0, eta - (now - speed["unix_seconds"]))
    return RunStatus(
        run_dir=str(run_dir),
        state=state,
        why=why,
        step=train.get("step", None if tail.first is None else tail.first.get("step")),
        num_steps=(tail.begun or {}).get("num_steps"),
        loss=train.get("loss"),
        valid_loss=(tail.valid or {}).get("loss"),
        lambda_weight=strength,
        lambda_phase=_lambda_phase(strength),
        tokens=train.get("tokens"),
        tokens_per_second=speed.get("tokens_per_second"),
        eta_seconds=eta if state == "running" else None,
        checkpoint=_checkpoint(run_dir),
        begun=(tail.first or {}).get("unix_seconds"),
        started=min((beat.started for beat in beats), default=None)
        or (tail.begun or {}).get("unix_seconds"),
        attempt=beats[0].attempt if beats else None,
        slowest_rank=slowest,
        slowdown=slowdown,
        straggler=_straggler(tail),
        ranks=tuple(ranks),
    )


def find_runs(folder: Path) -> list[Path]:
    """Every run directory at or below `folder`, by name; DataError if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds runs")
    return sorted(_runs_below(folder))


def is_run(folder: Path) -> bool:
    return (folder / METRICS_NAME).is_file() or any((folder / RANKS_DIR).glob("rank-*.json"))


def _runs_below(folder: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(folder):
        if is_run(Path(path)):
            yield Path(path)
            folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        folders[:] = [name for name in folders if not name.startswith(".")]


def _rank_statuses(beats: Sequence[Heartbeat], now: float) -> list[RankStatus]:
    found = [
        RankStatus(
            rank=beat.rank,
            state=_rank_state(beat, now),
            host=beat.host,
            pid=beat.pid,
            phase=beat.phase,
            step=beat.step,
            progress_seconds=max(0.0, now - beat.phase_since),
            heartbeat_seconds=beat.age_seconds(now),
            waiting_for=beat.waiting_for,
            place=beat.place,
            failure=beat.failure,
        )
        for beat in beats
    ]
    found += [RankStatus(rank, "missing") for rank in missing_ranks(list(beats))]
    return sorted(found, key=lambda rank: rank.rank)


def _rank_state(beat: Heartbeat, now: float) -> RankState:
    if beat.phase == "done":
        return "done"
    if beat.phase == "failed":
        return "failed"
    if beat.is_local():  # where a late heartbeat is only a busy machine's, or a full disk's
        return "gone" if beat.process() is None else "alive"
    return "alive" if beat.is_fresh(now) else "silent"


def _judge(
    tail: Tail, ranks: Sequence[RankStatus], beats: Sequence[Heartbeat], now: float
) -> tuple[State, str]:
    alive = [rank for rank in ranks if rank.state == "alive"]
    if alive:
        return _judge_living(tail, ranks, alive)
    event = tail.event or {}
    if event.get("event") == "finished":
        return "finished", ""
    newest = max((beat.started for beat in beats), default=0.0)
    if event.get("event") == "preempted" and event["unix_seconds"] >= newest:
        return "stopped", "by a signal, after saving"
    if not ranks:
        return "unknown", "it writes no heartbeats (watch.heartbeat_seconds=0, or an older version)"
    failed = [rank for rank in ranks if rank.state == "failed"]
    if failed:
        return "failed", _blame(failed, ranks)
    if all(rank.state == "done" for rank in ranks):
        return "stopped", "at train.stop_step, or by a signal"
    last = format_duration(min(beat.age_seconds(now) for beat in beats))
    return "killed", f"no process is left; the last heartbeat came {last} ago"


def _blame(failed: Sequence[RankStatus], ranks: Sequence[RankStatus]) -> str:
    """The cause first, not those that only lost it."""
    died = [rank for rank in ranks if rank.state in ("gone", "silent")]
    hung = [rank for rank in failed if rank.failure == "hang"]
    idle = [rank for rank in hung if rank.waiting_for is None]
    errors = [rank for rank in failed if rank.failure == "error"]
    for what, causes in (("an error", errors), ("died", died), ("hung", idle or hung)):
        if causes:
            one = causes[0]
            more = f" and {len(causes) - 1} more" if len(causes) > 1 else ""
            return f"rank {one.rank} on {one.host}{more}: {what} at step {one.step:,}"
    return f"{len(failed)} ranks lost each other at step {failed[0].step:,}"


def _judge_living(
    tail: Tail, ranks: Sequence[RankStatus], alive: Sequence[RankStatus]
) -> tuple[State, str]:
    lost = [rank for rank in ranks if rank.state in ("gone", "silent", "failed")]
    if lost:
        one = lost[0]
        return "stalled", f"rank {one.rank} on {one.host} is {one.state} at step {one.step:,}"
    latest = min(alive, key=lambda rank: rank.progress_seconds)
    bound = _OTHER_PHASE_SECONDS
    if latest.phase == "step":
        bound = max(_STEP_SECONDS, _STEPS * (tail.speed or {}).get("step_seconds", 0.0))
    if latest.progress_seconds > bound:
        idle = [rank for rank in alive if rank.waiting_for is None] or alive
        one = min(idle, key=lambda rank: (rank.step, -rank.progress_seconds))
        since = format_duration(latest.progress_seconds)
        return "stalled", f"no progress for {since}; look at rank {one.rank} on {one.host}"
    return "running", latest.phase


def _lambda_phase(strength: float | None) -> Literal["16 bit", "ramp", "ternary"] | None:
    if strength is None:
        return None
    return "16 bit" if strength == 0 else "ternary" if strength == 1 else "ramp"


def _slowest(speed: dict[str, float], num_ranks: int) -> tuple[int | None, float | None]:
    others = speed.get("others_own_seconds", 0.0)
    if num_ranks < 2 or not others:
        return None, None
    return int(speed["slowest_rank"]), speed["slowest_own_seconds"] / others


def _straggler(tail: Tail) -> str | None:
    line = tail.straggler
    begun = (tail.begun or {}).get("unix_seconds", 0.0)
    if line is None or line["is_over"] or line["unix_seconds"] < begun:
        return None
    ratio = line["own_seconds"] / max(line["others_seconds"], 1e-9)
    return f"rank {line['ranks'][0]} on {line['host']}, {ratio:.2f}x, since step {line['step']:,}"


def _checkpoint(run_dir: Path) -> str | None:
    try:
        return (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
