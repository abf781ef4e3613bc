"""A run's figures for Prometheus: `GET /metrics`, on rank 0, only when `watch.metrics_port` is set.

Text exposition format 0.0.4. What the recorder writes is kept as it comes; heartbeats are read when
somebody asks. It answers without a password, hence the loopback address by default.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.errors import ConfigError
from bitscale.heartbeat import read_heartbeats

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_SECONDS = 10.0


class _Figure(NamedTuple):
    """A metric, and where its value stands: in the last line of a kind, under a key."""

    name: str
    kind: str
    key: str
    text: str


_FIGURES = (
    _Figure("step", "train", "step", "Optimizer steps completed."),
    _Figure("tokens", "train", "tokens", "Tokens seen."),
    _Figure("loss", "train", "loss", "Training loss of the last step, nats per token."),
    _Figure("gradient_norm", "train", "grad_norm", "Global norm before clipping."),
    _Figure("learning_rate", "train", "lr", "Learning rate."),
    _Figure("weight_decay", "train", "weight_decay", "Weight decay."),
    _Figure("lambda_weight", "train", "lambda_weight", "Ternary strength of weights, 0 to 1."),
    _Figure("lambda_activation", "train", "lambda_activation", "The same of activations."),
    _Figure("tokens_per_second", "speed", "tokens_per_second", "Over the last interval."),
    _Figure("step_seconds", "speed", "step_seconds", "Over the last interval."),
    _Figure("peak_gib", "speed", "peak_gib", "Largest memory of rank 0 so far."),
    _Figure("eta_seconds", "speed", "eta_seconds", "Until the session's last step."),
    _Figure("slowest_rank", "speed", "slowest_rank", "By its own work, without waiting."),
    _Figure("slowest_own_seconds", "speed", "slowest_own_seconds", "Its own work of a step."),
    _Figure("others_own_seconds", "speed", "others_own_seconds", "The other ranks' median."),
    _Figure("valid_loss", "valid", "loss", "Validation loss, nats per token."),
    _Figure("zeros_share", "telemetry", "zeros", "Of ternary weights, the mean over layers."),
    _Figure("checkpoint_step", "checkpoint", "step", "Of the checkpoint in force."),
    _Figure("planned_steps", "begun", "num_steps", "Of the whole run."),
)


class MetricsEndpoint:
    """Serves from its own threads until closed."""

    def __init__(self, run_dir: Path, host: str, port: int) -> None:
        """Raises ConfigError if it cannot listen there."""
        self._run_dir = run_dir
        self._lines: dict[str, Mapping[str, Any]] = {}  # the last of each kind, or event
        self._rollbacks = self._skipped_batches = 0
        try:
            self._server = ThreadingHTTPServer((host, port), partial(_Handler, self.render))
        except OSError as error:
            raise ConfigError(
                f"watch.metrics_port={port}: cannot listen on {host} ({error.strerror or error}); "
                "choose another port or watch.metrics_host, or null"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics endpoint", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def observe(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """What the recorder writes to metrics.jsonl (from the training thread)."""
        for line in lines:
            if line["kind"] == "telemetry":
                zeros = [layer["zeros"] for layer in line["layers"].values()]
                line = {"zeros": statistics.fmean(zeros)} if zeros else {}
                self._lines["telemetry"] = line
            elif line["kind"] != "event":
                self._lines[line["kind"]] = line
            elif line["event"] in ("start", "resume"):
                self._lines["begun"] = line
            elif line["event"] == "checkpoint":
                self._lines["checkpoint"] = line
            elif line["event"] == "rollback":
                self._rollbacks += 1
                self._skipped_batches += len(line["skipped_batches"])

    def render(self) -> str:
        """The answer to one request."""
        text = []
        for figure in _FIGURES:
            value = self._lines.get(figure.kind, {}).get(figure.key)
            if value is not None:
                text += _metric(figure.name, figure.text, [("", value)])
        text += _metric("rollbacks", "By the guard, in this session.", [("", self._rollbacks)])
        text += _metric(
            "skipped_batches", "Left out by the guard, so far.", [("", self._skipped_batches)]
        )
        beats, now = read_heartbeats(self._run_dir), time.time()
        labels = [f'{{rank="{beat.rank}",host="{_escape(beat.host)}"}}' for beat in beats]
        ages = [beat.age_seconds(now) for beat in beats]
        progress = [max(0.0, now - beat.phase_since) for beat in beats]
        for name, what, values in (
            ("heartbeat_age_seconds", "Since the rank wrote.", ages),
            ("progress_age_seconds", "Since the rank's phase or step changed.", progress),
            ("rank_step", "Steps completed by the rank.", [beat.step for beat in beats]),
        ):
            text += _metric(name, what, zip(labels, values, strict=True))
        return "".join(f"{line}\n" for line in text)


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_SECONDS

    def __init__(self, render: Callable[[], str], *request: Any) -> None:
        self._render = render  # before the base class, which answers in its __init__
        super().__init__(*request)

    def do_GET(self) -> None:
        if self.path.split("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self._render().encode()
        self.send_response(200)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Not between the lines of the training."""


def _metric(name: str, text: str, values: Iterable[tuple[str, float]]) -> list[str]:
    name = f"bitscale_{name}"
    samples = [f"{name}{labels} {float(value)!r}" for labels, value in values]
    samples = [sample.replace(" inf", " +Inf").replace(" -inf", " -Inf") for sample in samples]
    samples = [sample.replace(" nan", " NaN") for sample in samples]
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge", *samples] if samples else []


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
