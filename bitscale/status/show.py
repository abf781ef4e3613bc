"""Runs as text and as JSON."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from bitscale.recorder import format_count, format_duration, format_share
from bitscale.status.read import RankStatus, RunStatus

_SHOWN_RANKS = 16
_NOTHING = "-"


def show_status(run: RunStatus, *, all_ranks: bool = False) -> str:
    """One run: what it does, how well, how fast, and each rank (the most suspicious first)."""
    state = f"{run.state} ({run.why})" if run.why else run.state
    lines = [f"{run.run_dir}: {state}"]
    rows = [
        ("step", _steps(run)),
        ("loss", _with(run.loss, ".4f") + _valid(run)),
        ("λ", _strength(run)),
        ("speed", _speed(run)),
        ("checkpoint", run.checkpoint or "none yet"),
        ("started", _started(run)),
    ]
    if run.slowest_rank is not None:
        rows.append(("slowest", f"rank {run.slowest_rank}, {run.slowdown:.2f}x the others' work"))
    if run.straggler is not None:
        rows.append(("straggler", run.straggler))
    lines += [f"  {name:<11}{text}" for name, text in rows]
    shown = sorted(run.ranks, key=_suspicion)
    left = 0
    if not all_ranks and len(shown) > _SHOWN_RANKS:
        left, shown = len(shown) - _SHOWN_RANKS, shown[:_SHOWN_RANKS]
    head = ("rank", "host", "pid", "state", "phase", "step", "progress", "heartbeat", "doing")
    if shown:
        lines += ["", *table(head, [_rank_row(rank) for rank in shown], right=(0, 2, 5, 6, 7))]
    if left:
        lines.append(f"and {left} more (--all shows them)")
    return "\n".join(lines)


def show_runs(runs: Sequence[RunStatus]) -> str:
    """One line a run."""
    head = ("run", "state", "step", "λ", "loss", "valid", "tok/s", "ETA", "ranks", "started")
    rows = [
        (
            run.run_dir,
            run.state,
            _steps(run),
            _strength(run),
            _with(run.loss, ".4f"),
            _with(run.valid_loss, ".4f"),
            _NOTHING if run.tokens_per_second is None else format_count(run.tokens_per_second),
            _NOTHING if run.eta_seconds is None else format_duration(run.eta_seconds),
            str(len(run.ranks) or _NOTHING),
            _when(run.begun),
        )
        for run in runs
    ]
    return "\n".join(table(head, rows, right=(2, 4, 5, 6, 7, 8)))


def as_json(run: RunStatus) -> dict[str, Any]:
    """The fields of `RunStatus`; what is not finite is null, as JSON has no NaN."""
    fields = dataclasses.asdict(run)
    return {key: _finite(value) for key, value in fields.items()}


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> list[str]:
    """Lines with columns as wide as they need be; `right` are aligned there."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _suspicion(rank: RankStatus) -> tuple[bool, int, bool, float]:
    return (
        rank.state in ("alive", "done"),
        rank.step,
        rank.waiting_for is not None,
        -rank.progress_seconds,
    )


def _rank_row(rank: RankStatus) -> tuple[str, ...]:
    if rank.state == "missing":
        return (str(rank.rank), _NOTHING, _NOTHING, rank.state, *[_NOTHING] * 5)
    doing = rank.place
    if rank.waiting_for is not None:
        doing = f"{rank.waiting_for} at {rank.place}"
    return (
        str(rank.rank),
        rank.host,
        str(rank.pid),
        rank.state if not rank.failure else f"failed ({rank.failure})",
        rank.phase,
        f"{rank.step:,}",
        f"{format_duration(rank.progress_seconds)} ago",
        f"{format_duration(rank.heartbeat_seconds)} ago",
        doing or _NOTHING,
    )


def _steps(run: RunStatus) -> str:
    if run.step is None:
        return _NOTHING
    if not run.num_steps:
        return f"{run.step:,}"
    return f"{run.step:,}/{run.num_steps:,}"


def _valid(run: RunStatus) -> str:
    return "" if run.valid_loss is None else f", valid {run.valid_loss:.4f}"


def _strength(run: RunStatus) -> str:
    if run.lambda_weight is None or run.lambda_phase is None:
        return _NOTHING
    if run.lambda_phase == "ramp":
        return f"ramp {format_share(run.lambda_weight)}"
    return run.lambda_phase


def _speed(run: RunStatus) -> str:
    if run.tokens_per_second is None:
        return _NOTHING
    eta = "" if run.eta_seconds is None else f", ETA {format_duration(run.eta_seconds)}"
    return f"{format_count(run.tokens_per_second)} tok/s{eta}"


def _started(run: RunStatus) -> str:
    if run.started is None:
        return _NOTHING
    again = f", attempt {run.attempt}" if run.attempt else ""
    ranks = f", {len(run.ranks)} ranks" if len(run.ranks) > 1 else ""
    return f"{_when(run.started)}{again}{ranks}"


def _when(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return _NOTHING
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_seconds))


def _with(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
