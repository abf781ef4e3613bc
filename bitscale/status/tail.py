"""The first line and the last lines of a run's metrics, in a time that does not grow with it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.recorder import METRICS_NAME

_WINDOW_BYTES = 4 * 2**20  # thousands of steps, or hundreds of telemetry lines

Line = dict[str, Any]


class Tail(NamedTuple):
    """Lines as recorder.py writes them; None: there is none (within the last 4 MiB)."""

    first: Line | None  # the start of the run, or its resumption from another one
    begun: Line | None  # the last start or resumption
    event: Line | None  # the last one that began or ended the run's training
    train: Line | None
    speed: Line | None
    valid: Line | None
    straggler: Line | None


_NONE = Tail(None, None, None, None, None, None, None)
_LIFE = ("start", "resume", "preempted", "finished")


def read_tail(run_dir: Path) -> Tail:
    """What `run_dir/metrics.jsonl` says at its ends; torn lines are passed over."""
    try:
        with (run_dir / METRICS_NAME).open("rb") as file:
            first = _parse(file.readline())
            size = file.seek(0, 2)
            file.seek(max(0, size - _WINDOW_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return _NONE
    found: dict[str, Line] = {}
    for raw in reversed(lines):
        kind = _kind(raw)
        if kind in found or kind not in ("train", "speed", "valid", "event"):
            continue
        line = _parse(raw)
        if line is None:
            continue
        if kind != "event":
            found[kind] = line
            continue
        name = line.get("event")
        if name in _LIFE:
            found.setdefault("life", line)
        if name in ("start", "resume"):
            found.setdefault("begun", line)
        if name == "straggler":
            found.setdefault("straggler", line)
    return Tail(
        first,
        found.get("begun") or first,
        found.get("life") or first,
        *(found.get(name) for name in ("train", "speed", "valid", "straggler")),
    )


def _kind(raw: bytes) -> str:
    """Cheaply: the recorder writes the kind first."""
    prefix = b'{"kind": "'
    return raw[len(prefix) :].split(b'"', 1)[0].decode("utf-8", "replace")


def _parse(raw: bytes) -> Line | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
