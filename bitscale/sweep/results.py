"""One row a cell: what it was, and what its metrics say. docs/sweeps.md defines the columns."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitscale.config import (
    Config,
    config_hash,
    num_steps,
    quant_spec,
    tokens_per_step,
    transition_step,
)
from bitscale.data.corpus import load_corpus
from bitscale.fit.table import TABLE_NAME, Row
from bitscale.model import cost
from bitscale.recorder import METRICS_NAME
from bitscale.report.read import Run as Metrics
from bitscale.report.read import Table, read_run
from bitscale.report.spike import rolling_mean
from bitscale.report.summary import summarize
from bitscale.sweep.expand import Cell, sixteen_bit
from bitscale.sweep.store import FINISHED, Store
from bitscale.sweep.trunks import Fork, Run

# What a finished run's metrics say, losses in nats per token.
FIGURES = (
    *("valid_loss", "bits_per_byte", "train_loss", "pre_loss", "spike_height"),
    *("tokens_to_recover", "peak_excess", "mean_excess", "end_excess", "train_seconds"),
)
_EXCESS_WINDOW = 4  # steps averaged for the peak, as in docs/results/optimizer-state.md
_END_SHARE = 0.05  # of the steps, averaged at the end


def measure_cells(cells: Sequence[Cell], runs: Mapping[str, Run], store: Store) -> list[Row]:
    """A row for each cell, in their order; figures are None for what has not finished."""
    figures: dict[str, Row] = {}
    for cell in cells:
        if cell.key not in figures:
            figures[cell.key] = _measure(cell.cfg, runs[cell.key], store)
    return [
        {"sweep": cell.sweep, "label": cell.label, "seed": cell.seed}
        | {key: _plain(value) for key, value in cell.values.items()}
        | figures[cell.key]
        for cell in cells
    ]


def _measure(cfg: Config, run: Run, store: Store) -> Row:
    done = store.done(run.key) or {}
    m = cfg.model
    if m.vocab_size is None:
        m = m.model_copy(update={"vocab_size": _vocab_size(cfg.data.corpora[0].path)})
    counts, start = cost.parameters(m), transition_step(cfg)
    trunk, fork_step = run.fork or (None, None)
    row: Row = {
        "hash": run.key,
        "status": done.get("status", "missing"),
        "parameters": counts.total,
        "ternary_parameters": counts.matrices,
        "tokens": num_steps(cfg) * tokens_per_step(cfg),
        "steps": num_steps(cfg),
        "transition_fraction": None if start is None else start / num_steps(cfg),
        "weight_bits": 16.0 if start is None else weight_bits(cfg),
        "qat_fraction": 0.0 if start is None else 1 - start / num_steps(cfg),
        **dict.fromkeys(FIGURES),
        "trunk": trunk,
        "trunk_step": fork_step,
        "commit": done.get("commit"),
        "versions": done.get("versions"),
        "sweep_started": done.get("sweep_started"),
    }
    if row["status"] == FINISHED:
        row |= _figures(run, store)
        row |= _excess(run, cfg, store)
    return row


def weight_bits(cfg: Config) -> float:
    """Bits a weight at λ = 1: log2 of its number of levels."""
    return math.log2(quant_spec(cfg.quant).weight.num_levels)


@cache
def _vocab_size(path: str) -> int:
    return load_corpus(path).vocab_size


def _figures(run: Run, store: Store) -> Row:
    own = _read(store, run.key)
    trunk = None if run.fork is None else _read(store, run.fork.trunk)
    whole = own if trunk is None or run.fork is None else _joined(trunk, own, run.fork)
    summary = summarize(whole)
    return {
        "valid_loss": summary.final_valid_loss,
        "bits_per_byte": summary.bits_per_byte,
        "train_loss": summary.final_train_loss,
        "pre_loss": summary.pre_transition_loss,
        "spike_height": summary.spike_height,
        "tokens_to_recover": summary.tokens_to_recover,
        "train_seconds": _train_seconds(own),
    }


def _read(store: Store, key: str) -> Metrics:
    return read_run(store.run_dir(key) / METRICS_NAME, key)


def _joined(trunk: Metrics, own: Metrics, fork: Fork) -> Metrics:
    """The whole history of a forked run."""
    shared = trunk.train["step"] <= fork.step
    train: Table = {
        name: np.concatenate([trunk.train[name][shared], own.train[name]]) for name in own.train
    }
    return own._replace(train=train)


def _excess(run: Run, cfg: Config, store: Store) -> Row:
    """Training loss over that of the same run without its transition, over the same batches.

    Nothing if that run, a cell of its own, has not finished.
    """
    start, twin = transition_step(cfg), config_hash(sixteen_bit(cfg))
    if not start or (store.done(twin) or {}).get("status") != FINISHED:
        return {}
    own, its = _read(store, run.key), _read(store, twin)
    _, mine, other = np.intersect1d(own.train["step"], its.train["step"], return_indices=True)
    after = own.train["step"][mine] > start
    excess = (own.train["loss"][mine] - its.train["loss"][other])[after]
    if len(excess) < _EXCESS_WINDOW:
        return {}
    end = max(1, math.ceil(_END_SHARE * num_steps(cfg)))
    return {
        "peak_excess": float(rolling_mean(excess, _EXCESS_WINDOW).max()),
        "mean_excess": float(excess.mean()),
        "end_excess": float(excess[-end:].mean()),
    }


def _train_seconds(run: Metrics) -> float | None:
    """Seconds in training steps, over all sessions; the trunk's are the trunk's."""
    steps = run.speed["step"]
    if not len(steps):
        return None
    first = run.train["step"][0] - 1
    lengths = np.diff(np.concatenate([[first], steps]))
    return float((lengths * run.speed["step_seconds"]).sum())


def _plain(value: Any) -> Any:
    """As it is, or as JSON if it has parts."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def write_table(rows: Sequence[Row], directory: Path) -> None:
    """RESULTS.parquet and RESULTS.csv, each whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    path = directory / f"{TABLE_NAME}.parquet"
    staging = path.with_name(f".{path.name}.partial")
    parquet.write_table(pyarrow.table(_columns(rows)), staging)
    staging.replace(path)
    write_csv(rows, path.with_suffix(".csv"))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Numbers with all their digits; None is an empty field."""
    columns = _columns(rows)
    staging = path.with_name(f".{path.name}.partial")
    with staging.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for values in zip(*columns.values(), strict=True):
            writer.writerow(["" if value is None else value for value in values])
    staging.replace(path)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _column(values: list[Any]) -> list[Any]:
    """Of one type: numbers as they are, anything mixed as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int}:
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1:
        return values
    return [None if value is None else str(value) for value in values]
