"""`bitscale plan`, the command: its tables, its JSON, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitscale.cli.main import main

pytestmark = pytest.mark.unit

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def plan_file(tmp_path: Path, tiny_config_file: Path) -> Path:
    path = tmp_path / "planned.yaml"
    text = tiny_config_file.read_text(encoding="utf-8")
    path.write_text(text.replace("num_layers: 2", "vocab_size: 96, num_layers: 2"))
    return path


def run_cli(capsys: Capture, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["plan", *args])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_prints_tables_and_writes_json(capsys: Capture, plan_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, out, err = run_cli(
        capsys, str(plan_file), "--nodes", "1", "--gpus-per-node", "2", "--gpu", "cpu",
        "--mfu", "0.25", "--json", str(file), "transition.ramp={shape: linear, over: {steps: 5}}",
    )  # fmt: skip
    assert (code, err) == (0, "")
    for text in ("memory of a rank, GiB", "ramp", "optimizer", "gradients (all-reduce)", "MFU",
                 "forward", "days", "a checkpoint"):  # fmt: skip
        assert text in out, text
    tree = json.loads(file.read_text())
    held, steps = tree["parameters"]["total"], tree["phases"]
    assert tree["checkpoint_bytes"] == 12 * held
    assert [steps[phase]["num_steps"] for phase in ("16 bit", "ternary")] == [40, 60]
    flops = steps["16 bit"]["flops_per_token"]
    model = flops["forward"]["total"] + flops["backward"]["total"]
    seconds = model * 8 * 16 * 100 / (0.25 * 2 * 0.166e12)  # at 0.25 of two cores in fp32
    assert tree["days"] == pytest.approx(seconds / 86400)
    assert tree["gpu_hours"] == pytest.approx(2 * seconds / 3600)
    parts = steps["ternary"]["memory"]
    assert parts["peak"] == max(parts["moments"].values())
    assert tree["fits"]
    assert steps["ternary"]["stage_peak_bytes"] == [parts["peak"]]


def test_search_prints_a_ranking(capsys: Capture, plan_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    code, out, err = run_cli(
        capsys, str(plan_file), "--nodes", "1", "--gpus-per-node", "2", "--search", "--top", "3",
        "--json", str(file), "train.dtype=bf16",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "admitted layouts fit; the best:\ntp  pp  dp" in out
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--gpu", "tpu"], ["--gpu 'tpu'", "use one of h200, h100, a100-80, b200, cpu"]),
        (["--nodes", "0"], ["--nodes 0", "use 1 or more"]),
        (["--mfu", "40"], ["--mfu 40 is not a share"]),
        (["--usable", "0"], ["--usable 0 is not a share"]),
        (["model.vocab_size=null"], ["model.vocab_size is null", "model.vocab_size=N"]),
        (["parallel.tp=3"], ["parallel.tp=3", "num_heads=4"]),
        (["parallel.tp=4"], ["does not divide world_size=2"]),
        (["parallel.pp=2", "engine.zero_stage=2"], ["engine.zero_stage=2", "zero_stage=1"]),
        (["train.global_batch_size=9"], ["train.global_batch_size=9", "2 data-parallel ranks"]),
        (["--search", "--usable", "1e-9"], ["layouts fits: the smallest needs", "use more or"]),
        (
            ["--search", "train.global_batch_size=1", "train.micro_batch_size=1",
             "model.num_layers=1", "model.num_heads=1", "model.num_kv_heads=1"],
            ["no layout of 2 ranks is admitted: parallel.tp=2", "num_heads=1"],
        ),
        (["parallel.tp=2", "quant.preset=twn"], ["parallel.tp=2", "quant.preset='twn'", "or tp=1"]),
        (["quant.preset=sdu"], ["quant.preset='sdu'", "plan with quant.preset=b158"]),
        (["quant.kernel=cpu"], ["quant.kernel='cpu'", "--gpu h200", "quant.kernel=auto"]),
        (
            ["engine.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
            ["zero_optimization.offload_optimizer", "leave it out"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_code_2(
    args: list[str], fragments: list[str], capsys: Capture, plan_file: Path
) -> None:
    code, out, err = run_cli(capsys, str(plan_file), "--nodes", "1", "--gpus-per-node", "2", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [text for text in fragments if text not in err] == [], err


def test_plans_can_be_made_without_torch(plan_file: Path) -> None:
    code = (
        "import sys; from bitscale.cli.main import main\n"
        f"main(['plan', {str(plan_file)!r}, '--nodes', '1', '--gpus-per-node', '2'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
