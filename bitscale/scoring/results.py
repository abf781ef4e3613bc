"""What several models scored: one JSON document with its provenance, and tables to compare them."""

import hashlib
import importlib.metadata
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitscale.checkpoint import resolve
from bitscale.convert import ModelSource
from bitscale.errors import DataError
from bitscale.run import versions
from bitscale.scoring.held_out import HeldOut
from bitscale.scoring.tasks import TaskScore, mean_stderr
from bitscale.source_commit import source_commit

FORMAT = "bitscale-eval-1"


@dataclass(frozen=True)
class Scores:
    """One model's."""

    name: str  # as it was asked for
    source: ModelSource
    held_out: HeldOut | None
    tasks: Mapping[str, TaskScore]


def document(scores: Sequence[Scores], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results as JSON types; figures that are not finite are null."""
    packages = {**versions(), **_version_of("lm-eval")}
    first, *others = scores
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["bitscale", *sys.argv[1:]]),
        "commit": source_commit() or None,
        "versions": packages,
        "settings": dict(settings),
        "models": [_model(first, None), *(_model(each, first) for each in others)],
    }


def _model(scores: Scores, first: Scores | None) -> dict[str, Any]:
    source = scores.source
    content: dict[str, Any] = {
        "model": scores.name,
        "path": str(source.path),
        "form": source.form,
        "step": source.step,
        "tokens": source.tokens,
        "lambda_weight": source.strength.weight,
        "lambda_activation": source.strength.activation,
        "dtype": source.dtype,
        "num_parameters": source.num_parameters,
        "config_hash": source.config_hash,
        "digest": digest(source.path),
        "tokenizer_sha256": source.tokenizer_sha256,
        "trained_with": dict(source.versions),
    }
    if scores.held_out is not None:
        content["held_out"] = _held_out(scores.held_out, None if first is None else first.held_out)
    if scores.tasks:
        content["tasks"] = {
            name: _task(task, None if first is None else first.tasks[name])
            for name, task in scores.tasks.items()
        }
    return content


def _held_out(held_out: HeldOut, first: HeldOut | None) -> dict[str, Any]:
    difference = None if first is None else held_out.difference(first)
    return {
        "loss": held_out.nats_per_token,
        "stderr": _finite(held_out.stderr),
        "perplexity": held_out.perplexity,
        "bits_per_byte": held_out.bits_per_byte,
        "bits_per_byte_stderr": _finite(held_out.stderr * held_out.bits_per_byte_of_nat),
        "num_tokens": held_out.num_tokens,
        "num_windows": len(held_out.nats_W),
        "num_bytes": round(held_out.num_bytes, 1),
        "minus_first": _difference(difference),
    }


def _task(task: TaskScore, first: TaskScore | None) -> dict[str, Any]:
    return {
        "version": task.version,
        "n": task.num_items,
        "data_sha256": task.data_sha256,
        "metrics": {
            metric: {
                "value": value,
                "stderr": _finite(task.stderrs[metric]),
                "minus_first": _difference(
                    None if first is None else task.difference(first, metric)
                ),
            }
            for metric, value in task.values.items()
        },
    }


def _difference(found: tuple[float, float] | None) -> dict[str, float | None] | None:
    return None if found is None else {"value": found[0], "stderr": _finite(found[1])}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def digest(path: Path) -> str:
    """SHA-256 over a model's files: of the list "SHA-256, name" of each, sorted, as sha256sum.

    A checkpoint's meta.json names the digests of all its files: its own SHA-256 stands for them.
    """
    if path.is_file():
        return _sha256(path)
    if (path / "config.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = "".join(f"{_sha256(file)}  {file.relative_to(path)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    return _sha256(resolve(path) / "meta.json")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version_of(package: str) -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def refuse_unwritable(path: Path) -> None:
    """DataError if nothing can be written at `path`: known before hours of work, not after."""
    if path.is_dir():
        raise DataError(f"--out {path} is a directory; name a file, such as {path / 'eval.json'}")
    staging = _staging(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.touch()
        staging.unlink(missing_ok=True)  # every rank tries
    except OSError as error:
        raise DataError(
            f"--out {path} cannot be written: {error.strerror}; name another place"
        ) from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """The whole file or none of it."""
    staging = _staging(path)
    staging.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    staging.replace(path)


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def held_out_table(scores: Sequence[Scores]) -> str:
    """A line a model; ± are standard errors over windows, Δ paired differences from the first."""
    figures = ["nats/token", "perplexity", "bits/byte", "Δ nats/token"]
    rows = [["model", "step", "λ", "tokens", *figures]]
    first = scores[0].held_out
    for each in scores:
        found = each.held_out
        assert found is not None and first is not None
        scale = found.bits_per_byte_of_nat
        rows.append(
            [
                each.name,
                f"{each.source.step:,}",
                f"{each.source.strength.weight:g}/{each.source.strength.activation:g}",
                f"{found.num_tokens:,}",
                _shown(found.nats_per_token, found.stderr),
                f"{found.perplexity:.2f}",
                _shown(found.bits_per_byte, found.stderr * scale),
                "" if each is scores[0] else _shown_difference(found.difference(first)),
            ]
        )
    return _table(rows)


def task_table(scores: Sequence[Scores]) -> str:
    """A line a metric, a column a model, and Δ, paired over items, for all but the first."""
    first, *others = scores
    header = ["task", "metric", "n", first.name]
    rows = [[*header, *(text for each in others for text in (each.name, "Δ"))]]
    for name, task in first.tasks.items():
        for metric, value in task.values.items():
            row = [name, metric, str(task.num_items), _shown(value, task.stderrs[metric])]
            for each in others:
                its = each.tasks[name]
                row.append(_shown(its.values[metric], its.stderrs[metric]))
                row.append(_shown_difference(its.difference(task, metric)))
            rows.append(row)
    if len(first.tasks) > 1:
        rows.append(_mean_row(first, others))
    return _table(rows)


def _mean_row(first: Scores, others: Sequence[Scores]) -> list[str]:
    """Mean accuracy over tasks, whatever their sizes; tasks are independent."""
    tasks = [name for name, task in first.tasks.items() if "acc" in task.items]
    row = ["mean", "acc", str(len(tasks))]
    for each in (first, *others):
        row.append(_shown(*_mean([mean_stderr(each.tasks[name].items["acc"]) for name in tasks])))
        if each is not first:
            found = [each.tasks[name].difference(first.tasks[name], "acc") for name in tasks]
            paired = [pair for pair in found if pair is not None]
            row.append(_shown_difference(_mean(paired) if len(paired) == len(tasks) else None))
    return row


def _mean(figures: Sequence[tuple[float, float]]) -> tuple[float, float]:
    num = max(len(figures), 1)
    mean = sum(value for value, _ in figures) / num
    return mean, math.sqrt(sum(stderr**2 for _, stderr in figures)) / num


def _shown(value: float, stderr: float) -> str:
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if math.isfinite(stderr) else "")


def _shown_difference(found: tuple[float, float] | None) -> str:
    if found is None:
        return "not paired"
    value, stderr = found
    return f"{value:+.4f}" + (f" ± {stderr:.4f}" if math.isfinite(stderr) else "")


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned for reading as it is."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    padded = [[text.ljust(n) for text, n in zip(row, widths, strict=True)] for row in rows]
    header, *lines = ["| " + " | ".join(row) + " |" for row in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([header, rule, *lines])
