"""The Prometheus endpoint, asked over HTTP."""

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitscale.errors import ConfigError
from bitscale.heartbeat import HeartbeatWriter
from bitscale.recorder import Recorder, SpeedRecord, TrainRecord, ValidRecord
from bitscale.watch.endpoint import MetricsEndpoint

pytestmark = pytest.mark.unit


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[MetricsEndpoint]:
    found = MetricsEndpoint(tmp_path, "127.0.0.1", 0)
    yield found
    found.close()


def get(endpoint: MetricsEndpoint, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}{path}", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text: str = answer.read().decode()
        return text


def values(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_what_the_recorder_writes_can_be_scraped(tmp_path: Path, endpoint: MetricsEndpoint) -> None:
    recorder = Recorder(
        tmp_path,
        enabled=True,
        resume_step=None,
        num_steps=40,
        tensorboard=False,
        listeners=[endpoint.observe],
    )
    recorder.event(0, 0, "start")
    recorder.train([TrainRecord(3, 300, 8.5, 1e-3, 0.1, 0.25, 1.0, float("nan"))])
    recorder.speed(SpeedRecord(3, 1234.5, 0.1, 0.5, float("inf"), {"c": 0.1}, 1, 0.2, 0.1))
    recorder.valid(ValidRecord(3, 300, 7.5, 1808.0, 2.0))
    recorder.telemetry(3, {"a": {"zeros": 0.2}, "b": {"zeros": 0.4}})
    recorder.event(3, 300, "checkpoint")
    recorder.event(2, 200, "rollback", skipped_batches=[2, 1])
    recorder.close()
    beat = HeartbeatWriter(tmp_path, rank=0, local_rank=0, world_size=1, interval_seconds=5.0)
    beat.mark("step", 3)
    beat.write()
    text = get(endpoint)
    found = values(text)
    assert found["bitscale_step"] == 3
    assert found["bitscale_planned_steps"] == 40
    assert found["bitscale_loss"] == 8.5
    assert found["bitscale_learning_rate"] == 1e-3
    assert (found["bitscale_lambda_weight"], found["bitscale_lambda_activation"]) == (0.25, 1.0)
    assert found["bitscale_tokens_per_second"] == 1234.5
    assert found["bitscale_valid_loss"] == 7.5
    assert found["bitscale_zeros_share"] == pytest.approx(0.3)
    assert found["bitscale_checkpoint_step"] == 3
    assert (found["bitscale_rollbacks"], found["bitscale_skipped_batches"]) == (1, 2)
    assert "bitscale_gradient_norm NaN\n" in text
    assert "bitscale_eta_seconds +Inf\n" in text
    labels = f'{{rank="0",host="{socket.gethostname()}"}}'
    assert found[f"bitscale_rank_step{labels}"] == 3
    assert 0 <= found[f"bitscale_heartbeat_age_seconds{labels}"] < 600
    time.sleep(0.05)
    assert values(get(endpoint))[f"bitscale_heartbeat_age_seconds{labels}"] >= 0.05
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 15


def test_before_the_first_step_there_is_an_answer(endpoint: MetricsEndpoint) -> None:
    assert values(get(endpoint)) == {"bitscale_rollbacks": 0, "bitscale_skipped_batches": 0}


def test_nothing_else_is_served(endpoint: MetricsEndpoint) -> None:
    for path in ("/", "/metrics/../rank-00000.json", "/config.yaml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(endpoint, path)
        assert refused.value.code == 404
        refused.value.close()


def test_a_port_that_is_taken_is_refused_before_anything_starts(
    tmp_path: Path, endpoint: MetricsEndpoint
) -> None:
    with pytest.raises(ConfigError, match=rf"watch.metrics_port={endpoint.port}: cannot listen on"):
        MetricsEndpoint(tmp_path, "127.0.0.1", endpoint.port)
    with pytest.raises(ConfigError, match=r"choose another port or watch\.metrics_host, or null"):
        MetricsEndpoint(tmp_path, "203.0.113.1", 9400)


def test_it_listens_on_the_given_address_only(endpoint: MetricsEndpoint) -> None:
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", endpoint.port)) != 0
