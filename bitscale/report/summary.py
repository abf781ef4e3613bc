"""A run's figures: computed once, shown in summary.json, report.html and on the console."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bitscale.recorder import format_count, format_duration
from bitscale.report.read import Run
from bitscale.report.spike import Spike, Transition, find_transition, measure_spike

UNKNOWN = "–"


class Summary(NamedTuple):
    """Losses in nats per token; None is unknown, or not applicable. See docs/report.md."""

    name: str
    path: str
    config_hash: str | None
    steps: int
    planned_steps: int
    finished: bool
    tokens: int
    final_train_loss: float | None
    final_valid_loss: float | None
    best_valid_loss: float | None
    best_valid_step: int | None
    perplexity: float | None
    bits_per_byte: float | None
    transition_step: int | None
    transition_tokens: int | None
    pre_transition_loss: float | None
    peak_loss: float | None
    spike_height: float | None
    spike_noise: float | None
    tokens_to_recover: int | None
    median_tokens_per_second: float | None
    peak_gib: float | None
    wall_seconds: float | None
    num_resumes: int
    num_rollbacks: int
    num_nonfinite_steps: int


def summarize(run: Run) -> Summary:
    """Compute every figure of one run."""
    loss, valid = run.train["loss"], run.valid
    last_steps = loss[-max(1, math.ceil(0.05 * len(loss))) :]
    best = int(np.nanargmin(valid["loss"])) if np.isfinite(valid["loss"]).any() else None
    transition = find_transition(run)
    spike = measure_spike(run, transition, planned_steps(run)) if transition else None
    hashes = [line["config_hash"] for line in run.events if "config_hash" in line]
    return Summary(
        name=run.name,
        path=str(run.path),
        config_hash=str(hashes[-1]) if hashes else None,
        steps=int(run.train["step"][-1]),
        planned_steps=planned_steps(run),
        finished=_is_finished(run),
        tokens=int(run.train["tokens"][-1]),
        final_train_loss=_finite_mean(last_steps),
        final_valid_loss=_last(valid["loss"]),
        best_valid_loss=None if best is None else float(valid["loss"][best]),
        best_valid_step=None if best is None else int(valid["step"][best]),
        perplexity=_last(valid["perplexity"]),
        bits_per_byte=_last(valid["bits_per_byte"]),
        **_transition_figures(transition, spike),
        median_tokens_per_second=_finite_median(run.speed["tokens_per_second"]),
        peak_gib=_finite_max(run.speed["peak_gib"]),
        wall_seconds=wall_seconds(run),
        num_resumes=sum(line["event"] == "resume" for line in run.events),
        num_rollbacks=sum(line["event"] == "rollback" for line in run.events),
        num_nonfinite_steps=int((~np.isfinite(loss)).sum()),
    )


def planned_steps(run: Run) -> int:
    """The planned length by the latest start or resume event, else the steps done."""
    planned = [line["num_steps"] for line in run.events if "num_steps" in line]
    return int(planned[-1]) if planned else int(run.train["step"][-1])


def _is_finished(run: Run) -> bool:
    """Whether the last session came to the end; a longer run may have gone on from there."""
    lives = [line["event"] for line in run.events]
    lives = [event for event in lives if event in ("start", "resume", "finished")]
    return lives[-1:] == ["finished"]


def wall_seconds(run: Run) -> float | None:
    """Seconds between the first and the last line of each attempt, summed over the attempts.

    An attempt begins at a start or resume event; lines dropped by a resume do not count, so this
    is the time that led to the recorded steps. None if no line carries a clock.
    """
    attempts: list[list[float]] = []
    for kind, seconds in run.clock:
        if kind in ("start", "resume") or not attempts:
            attempts.append([])
        attempts[-1].append(seconds)
    return sum(max(times) - times[0] for times in attempts) if attempts else None


def _transition_figures(transition: Transition | None, spike: Spike | None) -> dict[str, Any]:
    return {
        "transition_step": transition.step if transition else None,
        "transition_tokens": transition.tokens if transition else None,
        "pre_transition_loss": spike.pre_loss if spike else None,
        "peak_loss": spike.peak_loss if spike else None,
        "spike_height": spike.height if spike else None,
        "spike_noise": spike.noise if spike and math.isfinite(spike.noise) else None,
        "tokens_to_recover": spike.tokens_to_recover if spike else None,
    }


def _finite_mean(values: np.ndarray[Any, Any]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _finite_median(values: np.ndarray[Any, Any]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _finite_max(values: np.ndarray[Any, Any]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _last(values: np.ndarray[Any, Any]) -> float | None:
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def display(summary: Summary) -> dict[str, str]:
    """The figures as people read them: label to text, a dash for what is unknown."""
    s = summary
    steps = f"{s.steps:,}" if s.steps == s.planned_steps else f"{s.steps:,}/{s.planned_steps:,}"
    recover = _text(s.tokens_to_recover, format_count)
    if s.spike_height is not None and s.tokens_to_recover is None:
        recover = "not in run" if s.finished else "not yet"
    return {
        "steps": steps,
        "tokens": format_count(s.tokens),
        "train loss": _text(s.final_train_loss, "{:.4f}".format),
        "valid loss": _text(s.final_valid_loss, "{:.4f}".format),
        "best valid": _text(s.best_valid_loss, "{:.4f}".format),
        "perplexity": _text(s.perplexity, "{:.2f}".format),
        "bits/byte": _text(s.bits_per_byte, "{:.4f}".format),
        "transition step": _text(s.transition_step, "{:,}".format),
        "transition tokens": _text(s.transition_tokens, format_count),
        "spike": _text(s.spike_height, "{:.3f}".format),
        "recovery tokens": recover,
        "tok/s": _text(s.median_tokens_per_second, format_count),
        "peak GiB": _text(s.peak_gib, "{:.2f}".format),
        "wall time": _text(s.wall_seconds, format_duration),
        "rollbacks": str(s.num_rollbacks) if s.num_rollbacks else UNKNOWN,
        "config": s.config_hash[:12] if s.config_hash else UNKNOWN,
    }


def _text(value: Any, form: Any) -> str:
    return UNKNOWN if value is None else str(form(value))


CONSOLE_LABELS = (
    *("steps", "tokens", "train loss", "valid loss", "bits/byte"),
    *("transition step", "spike", "recovery tokens", "tok/s", "wall time"),
)


def console_table(summaries: Sequence[Summary]) -> str:
    """A small table, a line a run, columns aligned."""
    rows = [["run", *CONSOLE_LABELS]]
    for summary in summaries:
        shown = display(summary)
        rows.append([summary.name, *(shown[label] for label in CONSOLE_LABELS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
