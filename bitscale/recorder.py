"""The run recorder: `metrics.jsonl` (the record) and TensorBoard (a view of it).

One JSON object a line, each with `kind` and `step` (optimizer steps completed, 1-based). The
kinds are `train`, `speed`, `valid`, `telemetry` and `event`; docs/report.md lists their fields.
Rank 0 writes. A killed and resumed run ends with the same `train` lines as an uninterrupted one:
resuming at step k drops every line of a later step, and floats are written with `repr`.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.errors import DataError

METRICS_NAME = "metrics.jsonl"


class TrainRecord(NamedTuple):
    """One optimizer step. `loss` is in nats per token, `tokens` counts all seen so far."""

    step: int
    tokens: int
    loss: float
    lr: float
    weight_decay: float
    lambda_weight: float
    lambda_activation: float
    grad_norm: float
    residual: float = 0.0  # ε λ_weight, the share of the 16-bit product in every layer's output


class SpeedRecord(NamedTuple):
    """One logging interval. `epochs` maps each corpus to its passes begun so far."""

    step: int
    tokens_per_second: float
    step_seconds: float
    peak_gib: float
    eta_seconds: float
    epochs: Mapping[str, float]
    # Own work, without waiting (watch/stragglers.py): who needs longest, and the others' median.
    slowest_rank: int = 0
    slowest_own_seconds: float = 0.0
    others_own_seconds: float = 0.0


class ValidRecord(NamedTuple):
    """One evaluation. `loss` is in nats per token."""

    step: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


class Recorder:
    """Append-only writer of a run's metrics; every method of a disabled one does nothing.

    Every call reaches the operating system before it returns (a killed process loses nothing);
    `flush` also reaches the disk and belongs before a checkpoint is published.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        resume_step: int | None,
        num_steps: int,
        tensorboard: bool,
        listeners: Sequence[Callable[[Sequence[Mapping[str, Any]]], None]] = (),
    ) -> None:
        """Open `run_dir/metrics.jsonl`, created for a fresh run, cut to `resume_step` otherwise.

        `num_steps` is the planned length of the run and goes into its start and resume events;
        `listeners` are given every line that is written.
        Raises DataError if a fresh run (`resume_step` None) would continue an existing file, or
        if the file to resume is malformed.
        """
        self._enabled = enabled
        self._num_steps = num_steps
        self._run_dir = run_dir
        self._with_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._listeners = listeners
        if not enabled:
            return
        path = run_dir / METRICS_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume_step is None and path.exists():
            raise DataError(
                f"{path} already exists; resume that run or choose another run directory"
            )
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        path = self._run_dir / METRICS_NAME
        if resume_step is not None and path.exists():
            drop_later_lines(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if self._with_tensorboard:
            # Lazy: TensorBoard takes a second to import and is optional.
            from torch.utils.tensorboard import SummaryWriter

            purge_step = None if resume_step is None else resume_step + 1
            directory = str(self._run_dir / "tensorboard")
            self._tensorboard = SummaryWriter(directory, purge_step=purge_step)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, as a run resumed from there does."""
        if self._enabled:
            self.close()
            self._enabled = True
            self._open(step)

    def recent_losses(self, number: int) -> list[float]:
        """The losses of the last `number` steps recorded, oldest first; [] if disabled."""
        if not self._enabled:
            return []
        lines = (line for _, _, line in read_lines(self._run_dir / METRICS_NAME))
        return list(deque((line["loss"] for line in lines if line["kind"] == "train"), number))

    def last_rollback(self) -> dict[str, Any]:
        """The event of the last rollback recorded; {} if there is none, or if disabled."""
        if not self._enabled:
            return {}
        lines = (line for _, _, line in read_lines(self._run_dir / METRICS_NAME))
        found = deque((line for line in lines if line.get("event") == "rollback"), 1)
        return found[0] if found else {}

    def train(self, records: Sequence[TrainRecord]) -> None:
        """Record optimizer steps, in order."""
        if not self._enabled:
            return
        self._write([{"kind": "train", **record._asdict()} for record in records])
        for record in records:
            self._scalars("train", record.step, record._asdict())

    def speed(self, record: SpeedRecord) -> None:
        """Record a logging interval; the line also carries the wall clock in `unix_seconds`."""
        if not self._enabled:
            return
        fields = {**record._asdict(), "epochs": dict(record.epochs)}
        self._write([{"kind": "speed", **fields, "unix_seconds": time.time()}])
        self._scalars("speed", record.step, {k: v for k, v in fields.items() if k != "epochs"})
        self._scalars("epochs", record.step, record.epochs)

    def valid(self, record: ValidRecord) -> None:
        """Record an evaluation on the validation set."""
        if not self._enabled:
            return
        self._write([{"kind": "valid", **record._asdict()}])
        self._scalars("valid", record.step, record._asdict())

    def telemetry(self, step: int, layers: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record every ternary layer's `zeros` (share), `flipped` (share or None), `scale`."""
        if not self._enabled:
            return
        plain = {name: dict(values) for name, values in layers.items()}
        self._write([{"kind": "telemetry", "step": step, "layers": plain}])
        for name, values in plain.items():
            self._scalars(f"ternary/{name}", step, values)

    def event(self, step: int, tokens: int, event: str, **details: object) -> None:
        """Record a point in the run's life, with the wall clock in `unix_seconds`.

        `event` is start, resume, transition, checkpoint, rollback, straggler, preempted, finished;
        `details` must be JSON values (the start event should carry `config_hash`).
        """
        if not self._enabled:
            return
        fields: dict[str, object] = {"kind": "event", "step": step, "tokens": tokens}
        fields |= {"event": event, "unix_seconds": time.time()}
        if event in ("start", "resume"):
            fields["num_steps"] = self._num_steps
        self._write([{**fields, **details}])

    def flush(self) -> None:
        """Put every line on disk (fsync)."""
        if not self._enabled:
            return
        with self._explained():
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if not self._enabled:
            return
        self.flush()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._enabled = False

    def _write(self, lines: Sequence[Mapping[str, object]]) -> None:
        # json writes floats with repr, and NaN or Infinity as such: both read back unchanged.
        with self._explained():
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        for listener in self._listeners:
            listener(lines)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A full disk, mostly; the half line it may leave is dropped on resumption."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._file.name}: cannot be written ({error.strerror}); make room or mend the "
                "file system, then continue with --resume auto"
            ) from error

    def _scalars(self, prefix: str, step: int, values: Mapping[str, float | None]) -> None:
        if self._tensorboard is None:
            return
        for name, value in values.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)


def has_begun(metrics: Path) -> bool:
    """Whether a run has written its first line, which says what it began from. One that was killed
    while it was set up may have left an empty file."""
    return metrics.exists() and next(read_lines(metrics), None) is not None


def read_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Line number (from 1), bytes (newline included) and object of each line of metrics.jsonl.

    A torn last line, one without newline that is not JSON (the writer was killed in it), is left
    out. Raises DataError, naming file and line, for any other malformed line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = json.loads(raw)
                well_formed = isinstance(line["kind"], str) and isinstance(line["step"], int)
            except (ValueError, TypeError, KeyError):
                well_formed = False
            if well_formed:
                yield number, raw.rstrip(b"\n") + b"\n", line
            elif raw.endswith(b"\n"):
                raise DataError(
                    f"{path}:{number}: not a JSON object with a kind and a step; "
                    "remove that line or start a new run directory"
                )


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keep the lines of steps up to `last_step`; the file is replaced atomically.

    A transition that begins at `last_step` goes too: it is recorded before the step it changes.
    Rollbacks stay: they tell what happened to the run, whichever of its steps are left.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for _, raw, line in read_lines(path):
            # A transition is recorded before its first step: at last_step it will come again.
            repeated = line.get("event") == "transition" and line["step"] == last_step
            kept = line["step"] <= last_step or line.get("event") == "rollback"
            if kept and not repeated:
                file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def progress_line(train: TrainRecord, speed: SpeedRecord, num_steps: int) -> str:
    """One line for the console: where the run is, how well and how fast.

    `step 120/1,200  1.97M tok  loss 3.412  lr 3.0e-04  λ .25/.25  |g| 0.83  21.4k tok/s
    .73 GiB  ETA 2m13s`; λ is weights/activations, and exactly 0 or 1 has no decimals.
    """
    gradient = f"{train.grad_norm:.2f}" if train.grad_norm < 1000 else f"{train.grad_norm:.1e}"
    return "  ".join(
        [
            f"step {train.step:,}/{num_steps:,}",
            f"{format_count(train.tokens)} tok",
            f"loss {train.loss:.3f}",
            f"lr {train.lr:.1e}",
            f"λ {format_share(train.lambda_weight)}/{format_share(train.lambda_activation)}",
            f"|g| {gradient}",
            f"{format_count(speed.tokens_per_second)} tok/s",
            f"{format_gib(speed.peak_gib)} GiB",
            f"ETA {format_duration(speed.eta_seconds)}",
        ]
    )


def format_count(count: float) -> str:
    """Three significant digits and a suffix: 950, 21.4k, 1.97M, 4.00B, 1.20T."""
    if not math.isfinite(count):
        return "?"
    sizes = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    # 0.9995 of a size rounds up to it: 999,900 is 1.00M, not 1000k.
    size, suffix = next((pair for pair in sizes if abs(count) >= 0.9995 * pair[0]), sizes[-1])
    scaled = count / size
    digits = 0 if not suffix else 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def format_share(share: float) -> str:
    """A number in [0, 1]: 0, .25, 1."""
    if share in (0, 1):
        return f"{share:.0f}"
    return f"{share:.2f}".removeprefix("0")


def format_gib(gib: float) -> str:
    """.73 below one GiB, 12.3 above."""
    return f"{gib:.2f}".removeprefix("0") if gib < 1 else f"{gib:.1f}"


def format_duration(seconds: float) -> str:
    """45s, 2m13s, 3h07m, 2d04h; ? when unknown."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
