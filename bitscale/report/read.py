"""Runs as arrays: reads what `bitscale.recorder` writes, live runs included."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitscale.errors import DataError
from bitscale.recorder import METRICS_NAME, read_lines

Floats = NDArray[np.float64]
Table = dict[str, Floats]

TRAIN_FIELDS = (
    *("step", "tokens", "loss", "lr", "weight_decay"),
    *("lambda_weight", "lambda_activation", "grad_norm"),
)
SPEED_FIELDS = ("step", "tokens_per_second", "step_seconds", "peak_gib")
VALID_FIELDS = ("step", "tokens", "loss", "perplexity", "bits_per_byte")


class Telemetry(NamedTuple):
    """Ternary codes over time: for each row of `step`, (min, median, max) over the layers."""

    step: Floats
    zeros: Floats  # [rows, 3], shares
    flipped: Floats  # [rows, 3], shares; NaN where no earlier interval exists


class Run(NamedTuple):
    """One run's metrics. Tables map a field to a float64 array; null is NaN."""

    name: str
    path: Path
    train: Table
    speed: Table
    valid: Table
    telemetry: Telemetry
    events: tuple[dict[str, Any], ...]
    clock: tuple[tuple[str, float], ...]  # (event or "speed", Unix seconds) in file order


def read_runs(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read run directories or metrics.jsonl files; a run is named after its directory.

    Raises DataError for a missing, empty or malformed run, and for names that do not fit.
    """
    files = [_metrics_file(path) for path in paths]
    if names is None:
        names = [file.resolve().parent.name for file in files]
    if len(names) != len(files):
        raise DataError(f"--names gives {len(names)} names for {len(files)} runs; give one each")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"two runs are named '{repeated[0]}'; tell them apart with --names a,b")
    return [read_run(file, name) for file, name in zip(files, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Read one metrics.jsonl. Raises DataError if it has no training step or a bad line."""
    rows: dict[str, list[list[float]]] = {"train": [], "speed": [], "valid": []}
    fields = {"train": TRAIN_FIELDS, "speed": SPEED_FIELDS, "valid": VALID_FIELDS}
    layers: list[tuple[float, dict[str, dict[str, float | None]]]] = []
    events: list[dict[str, Any]] = []
    clock: list[tuple[str, float]] = []
    for number, _, line in read_lines(path):
        kind = line["kind"]
        try:
            if kind in rows:
                rows[kind].append([_number(line[field]) for field in fields[kind]])
            elif kind == "telemetry":
                layers.append((line["step"], line["layers"]))
            elif kind == "event":
                events.append({"event": line["event"], "tokens": line["tokens"], **line})
            if "unix_seconds" in line:
                clock.append((line.get("event", kind), _number(line["unix_seconds"])))
        except KeyError as error:
            raise DataError(
                f"{path}:{number}: {kind} line without {error}; was it written by hand?"
            ) from None
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: bad {kind} line: {error}; remove it") from None
        if kind == "train" and len(rows[kind]) > 1 and rows[kind][-1][0] <= rows[kind][-2][0]:
            raise DataError(
                f"{path}:{number}: train step {line['step']} does not follow step "
                f"{rows[kind][-2][0]:.0f}; two runs wrote to this file, keep one"
            )
    if not rows["train"]:
        raise DataError(f"{path} has no training step yet; wait for the first logging interval")
    tables = {kind: _table(rows[kind], fields[kind]) for kind in rows}
    spread = _spread_over_layers(layers)
    return Run(name, path, **tables, telemetry=spread, events=tuple(events), clock=tuple(clock))


def _metrics_file(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist; give a run directory or its {METRICS_NAME}")
    if path.is_file():
        return path
    if not (path / METRICS_NAME).is_file():
        raise DataError(f"{path} has no {METRICS_NAME}; is it a run directory (run.dir)?")
    return path / METRICS_NAME


def _number(value: Any) -> float:
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _table(rows: list[list[float]], fields: Sequence[str]) -> Table:
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), len(fields))
    return {field: columns[:, i] for i, field in enumerate(fields)}


def _spread_over_layers(
    lines: list[tuple[float, dict[str, dict[str, float | None]]]],
) -> Telemetry:
    """(min, median, max) over the layers that have a value, NaN where none has."""
    lines = [(step, layers) for step, layers in lines if layers]
    spreads: dict[str, Floats] = {}
    for field in ("zeros", "flipped"):
        spread = np.full((len(lines), 3), np.nan)
        for row, (_, layers) in enumerate(lines):
            values = [v for layer in layers.values() if (v := layer.get(field)) is not None]
            if values:
                spread[row] = min(values), np.median(values), max(values)
        spreads[field] = spread
    return Telemetry(np.array([step for step, _ in lines], dtype=np.float64), **spreads)
