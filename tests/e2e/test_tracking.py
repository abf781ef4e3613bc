"""Weights & Biases and Comet: refused without their packages, fed by DeepSpeed's monitors."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

from bitscale.cli.main import main
from bitscale.engine.monitors import _events
from runs import execute, metrics, train_command

pytestmark = pytest.mark.e2e

SERVICES = [("wandb", "wandb"), ("comet", "comet_ml")]


@pytest.mark.parametrize(("key", "module"), SERVICES)
def test_a_missing_package_is_refused_before_anything_starts(
    key: str,
    module: str,
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    arguments = ["train", str(config_file), f"run.dir={tmp_path / 'run'}", f"log.{key}.project=x"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: log.{key} needs the package {module}, which is not installed")
    assert f"set log.{key}=null" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "_module"), SERVICES)
def test_deepspeed_s_own_section_is_refused(
    key: str, _module: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config_file), f"engine.deepspeed.{key}.enabled=true"]) == 2
    expected = f"engine.deepspeed.{key} is derived from log.{key}; set that instead"
    assert expected in capsys.readouterr().err


def test_every_number_of_a_line_is_sent_by_step() -> None:
    line = {"kind": "speed", "step": 7, "step_seconds": 0.5, "epochs": {"c": 1}, "unix_seconds": 9}
    assert _events(line) == [("speed/step_seconds", 0.5, 7)]
    assert _events({"kind": "event", "step": 7, "event": "start", "unix_seconds": 9}) == []


@pytest.mark.slow
def test_wandb_offline(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs `pip install wandb`; nothing is sent anywhere."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_dir = tmp_path / "run"
    overrides = (f"run.dir={run_dir}", "log.wandb={project: bitscale-test, group: g}")
    done = execute(train_command("plain", config_file, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    sent = record.read_bytes()
    losses = [json.dumps(line["loss"]).encode() for line in metrics(run_dir, "train")]
    assert [loss for loss in losses if loss not in sent] == []
    assert b"valid/bits_per_byte" in sent and b"speed/tokens_per_second" in sent


@pytest.mark.slow
def test_comet_offline(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs `pip install comet_ml`; nothing is sent anywhere."""
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "comet"))
    run_dir = tmp_path / "run"
    overrides = (f"run.dir={run_dir}", "log.comet={project: bitscale-test, online: false}")
    done = execute(train_command("plain", config_file, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as found:
        lines = found.read("messages.json").decode().splitlines()
    sent = [json.loads(line)["payload"]["metric"] for line in lines if '"metricName"' in line]
    losses = {m["step"]: float(m["metricValue"]) for m in sent if m["metricName"] == "train/loss"}
    assert losses == {line["step"]: line["loss"] for line in metrics(run_dir, "train")}
    assert {"valid/bits_per_byte", "speed/tokens_per_second"} <= {m["metricName"] for m in sent}
