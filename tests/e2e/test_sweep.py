"""A whole sweep as a user runs it: stopped, continued, and equal to runs that share nothing."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bitscale.checkpoint import Reader
from bitscale.cli.main import main
from bitscale.config import load_config
from bitscale.fit.table import read_table
from runs import environment, metrics, start, train

pytestmark = pytest.mark.e2e

SWEEP = """\
base: base.yaml
title: a try
seeds: {values: [1]}
keep: last
set: {transition.ramp.over.steps: 4, optim.lr: "= 1e-4 * model.d_model"}
arms:
  sixteen: {transition.at: null}
  early: {transition.at.step: 8}
  late: {transition.at.step: 14}
  median: {transition.at.step: 14, quant.preset: absmedian}
  broken: {transition.at.step: 14, engine.deepspeed: {zero_optimization: {overlap_comm: maybe}}}
claims:
  - {id: a, text: Early is late, source: none, contrast: {early: 1, late: -1}, predicted: negative}
"""
BASE = """\
run: {{dir: cell}}
model: {{num_layers: 2, d_model: 32, num_heads: 2, num_kv_heads: 1, d_ff: 64}}
data: {{corpora: [{{path: {corpus}}}], seq_len: 32}}
train: {{steps: 20, global_batch_size: 4, micro_batch_size: 4, dtype: fp32, eval_batches: 2}}
optim: {{lr: 1e-3, schedule: wsd, warmup: {{steps: 4}}}}
transition: {{ramp: {{shape: linear, over: {{steps: 2}}}}}}
engine: {{device: cpu}}
log: {{every: 5, telemetry_every: 0, tensorboard: false}}
"""


def _sweep_command(folder: Path) -> list[str]:
    arguments = ["sweep", str(folder / "try.yaml"), "--out", str(folder / "out"), "--workers", "1"]
    return [sys.executable, "-m", "bitscale.cli.main", *arguments]


@pytest.fixture(scope="module")
def folder(python_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, stopped by SIGTERM when its trunk has saved, then run to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "try.yaml").write_text(SWEEP, encoding="utf-8")
    (folder / "base.yaml").write_text(BASE.format(corpus=python_corpus), encoding="utf-8")
    process = start(_sweep_command(folder), folder / "first.log")
    deadline = time.monotonic() + 400
    while not list((folder / "out").glob("runs/*/checkpoints/step-00000008")):
        assert process.poll() is None and time.monotonic() < deadline, _text(folder / "first.log")
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    # Stopped (or, on a fast machine, hardly anything was left to stop).
    assert code == 75, _text(folder / "first.log")
    assert "the same command goes on" in _text(folder / "first.log")
    return folder


def test_stopped_with_its_fork_server(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C and Slurm signal every process, here while the server imports libraries."""
    command = [*_sweep_command(folder), "--out", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    while "forkserver" not in _commands_of_children(process.pid):
        assert process.poll() is None, _text(log)
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 75, _text(log)
    assert "Traceback" not in _text(log)


def _commands_of_children(pid: int) -> str:
    found = ""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += _text(Path(f"/proc/{child}/cmdline"))
    return found


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _sweep_command(folder), env=environment(), capture_output=True, text=True, timeout=400
    )


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def test_others_go_on_when_a_cell_fails(
    folder: Path, finished: subprocess.CompletedProcess[str]
) -> None:
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "5 cells of 1 sweeps, 1 seeds: 5 runs, 3 of them forked from 1 trunks" in finished.stdout
    assert finished.stdout.count("failed; once more") == 1
    assert "failed twice: try: broken, seed 1" in finished.stderr
    assert "DeepSpeed refuses the configuration" in finished.stderr
    rows = {row["label"]: row for row in read_table(folder / "out")}
    assert {label: row["status"] for label, row in rows.items()} == {
        **dict.fromkeys(("sixteen", "early", "late", "median"), "finished"),
        "broken": "missing",
    }
    assert (
        rows["late"]["transition.at.step"] == 14
        and rows["late"]["trunk"] == (rows["sixteen"]["hash"])
    )
    assert rows["early"]["tokens"] == 20 * 4 * 32 and rows["early"]["peak_excess"] is not None
    with (folder / "out" / "RESULTS.csv").open(newline="") as file:
        texts = {row["label"]: row for row in csv.DictReader(file)}
    assert float(texts["early"]["valid_loss"]) == rows["early"]["valid_loss"]
    assert "underpowered" in finished.stdout  # one seed
    assert (folder / "out" / "figures" / "try.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("label", ["median"])  # of another quantizer than its trunk
def test_a_forked_cell_is_the_unforked_run(
    label: str, folder: Path, finished: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    row = next(row for row in read_table(folder / "out") if row["label"] == label)
    forked = folder / "out" / "runs" / row["hash"]
    (resume,) = [line for line in metrics(forked, "event") if line["event"] == "resume"]
    assert resume["step"] == 14

    overrides = [f"run.dir={tmp_path / 'run'}", "checkpoint.at=[]"]
    train("plain", forked / "config.yaml", *overrides)
    whole = [line for line in metrics(tmp_path / "run", "train") if line["step"] > 14]
    assert [line["lambda_weight"] for line in whole] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert metrics(forked, "train") == whole
    assert _losses(forked) == _losses(tmp_path / "run")
    mine, its = (
        Reader(run / "checkpoints" / "step-00000020") for run in (forked, tmp_path / "run")
    )
    for name, shape in its.meta.shapes.items():
        for part in ("master", "exp_avg", "exp_avg_sq"):
            size = torch.Size(shape).numel()
            assert torch.equal(mine.read(name, part, 0, size), its.read(name, part, 0, size)), name
    assert load_config(forked / "config.yaml").optim.lr == pytest.approx(32e-4)


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir, "valid")]


def test_running_it_again_does_nothing(
    folder: Path, finished: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folder / "out" / "runs"
    shutil.copy(folder / "try.yaml", folder / "whole.yaml")
    text = "\n".join(line for line in SWEEP.splitlines() if "broken" not in line)
    (folder / "try.yaml").write_text(text, encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert main(["sweep", str(folder / "try.yaml"), "--out", str(folder / "out")]) == 0
    assert "4 runs are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    # Kept: the last checkpoint of each; where others began is gone.
    kept = [path.name for path in runs.glob("*/checkpoints/step-*")]
    assert kept == ["step-00000020"] * 4
    stored = json.loads((folder / "out" / "sweeps" / "try.json").read_text())
    assert [row["label"] for row in stored] == ["sixteen", "early", "late", "median"]


@pytest.mark.slow
def test_jobs_of_submitit(python_corpus: Path, tmp_path: Path) -> None:
    """Its local executor runs jobs as Slurm would, in processes that it starts."""
    pytest.importorskip("submitit")
    text = "\n".join(line for line in SWEEP.splitlines() if "broken" not in line)
    (tmp_path / "try.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "base.yaml").write_text(BASE.format(corpus=python_corpus), encoding="utf-8")
    arguments = ["--backend", "slurm", "--cluster", "local", "--slurm", "timeout_min=10"]
    done = subprocess.run(
        [*_sweep_command(tmp_path), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    arrays = [int(count) for count in re.findall(r"submitted (\d+) jobs", done.stdout)]
    assert arrays[0] == 1 and sum(arrays) == 4  # the trunk, then its forks
    assert {row["status"] for row in read_table(tmp_path / "out")} == {"finished"}
