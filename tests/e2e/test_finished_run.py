"""What can be done with a finished run: evaluate, export, report, continue, fork."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitscale.checkpoint import Reader
from bitscale.cli.main import main
from bitscale.heartbeat import RANKS_DIR
from bitscale.quant.pack import unpack_2bit
from bitscale.run_lock import LOCK_NAME
from runs import (
    KEEP_ALL,
    NUM_STEPS,
    checkpoint_dirs,
    differences,
    evaluate,
    events,
    metrics,
    train,
)

pytestmark = pytest.mark.e2e

TRUNK_STEP = 10
FORK = (
    *("transition.at.step=20", "transition.ramp.shape=none", "transition.ramp.over.steps=0"),
    *("train.dtype=fp32", "engine.zero_stage=0", "train.eval_batches=0", "data.seed=1"),
)


@pytest.fixture(scope="module")
def forked_run(
    config_file: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished run's step 10 continued elsewhere in fp32, other data, another transition."""
    run_dir = tmp_path_factory.mktemp("fork") / "run"
    trunk = finished_run / "checkpoints" / f"step-{TRUNK_STEP:08d}"
    source = ("--resume", trunk, "--allow-change", "data.seed")
    done = train("plain", config_file, f"run.dir={run_dir}", *FORK, *source)
    assert f"resumed from {trunk} at step {TRUNK_STEP}" in done.stdout
    assert f"allowed change: data.seed is 1 here and 0 in {trunk}" in done.stdout
    return run_dir


def test_fork_of_a_trunk(finished_run: Path, forked_run: Path) -> None:
    trunk, fork = metrics(finished_run, "train"), metrics(forked_run, "train")
    assert [line["step"] for line in fork] == list(range(TRUNK_STEP + 1, NUM_STEPS + 1))
    assert [line["lambda_weight"] for line in fork] == [0.0] * 10 + [1.0] * 20
    # The trunk's weights on other text: nearly its loss, but not to the bit.
    assert fork[0]["loss"] == pytest.approx(trunk[TRUNK_STEP]["loss"], abs=0.5)
    assert fork[0]["loss"] != trunk[TRUNK_STEP]["loss"]
    (resume,) = events(forked_run, "resume")
    assert resume["differences"] and events(forked_run, "start") == []
    assert [line["step"] for line in events(forked_run, "transition")] == [20]


def test_fork_with_sub_norm_from_the_transition_on(
    config_file: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other model until then; its weights begin there, the others as if nothing was new."""
    trunk = finished_run / "checkpoints" / f"step-{TRUNK_STEP:08d}"
    arguments = (config_file, f"run.dir={tmp_path / 'run'}", "--resume", trunk)
    fork = ("model.sub_norm=transition", "model.head_bits=8", "train.stop_step=14")
    fork += ("transition.at.step=12", "transition.ramp.shape=none", "transition.ramp.over.steps=0")
    fork += ("--allow-change", "model.head_bits")  # which follows λ as well
    # Another optimizer is not taken along unnoticed, and nothing is left behind.
    lion = ("optim.name=lion", "transition.optimizer_state=keep")
    assert main(["train", *map(str, arguments), *fork, *lion]) == 2
    message = capsys.readouterr().err
    assert 'optim.name is "lion" here and "adamw" in' in message
    assert "--allow-change optim.name" in message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK_NAME, RANKS_DIR}

    train("plain", *arguments, *fork)
    lines, trunk_lines = metrics(tmp_path / "run", "train"), metrics(finished_run, "train")
    assert [line["step"] for line in lines] == [11, 12, 13, 14]
    assert [line["loss"] for line in lines[:2]] == [
        line["loss"] for line in trunk_lines[TRUNK_STEP : TRUNK_STEP + 2]
    ]
    state = Reader(tmp_path / "run/checkpoints/step-00000014")
    norms = {name: state.read(name, "master", 0, 4) for name in state.meta.shapes}
    norms = {name: weight for name, weight in norms.items() if "sub_norm" in name}
    assert len(norms) == 4 and not any(weight.eq(1).any() for weight in norms.values())
    # The packed model has them, and its head of 8 bits, at λ = 1.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "packed")]) == 0
    mine, its = (evaluate(tmp_path / name, tmp_path / "eval.json") for name in ("packed", "run"))
    assert mine["loss"] == its["loss"]


def test_fork_into_a_run_is_refused(
    config_file: Path, finished_run: Path, forked_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would mix two histories in one directory."""
    arguments = ["train", str(config_file), f"run.dir={forked_run}", "--resume", str(finished_run)]
    assert main(arguments) == 2
    assert f"run.dir='{forked_run}' already holds a run" in capsys.readouterr().err


def test_fork_killed_before_its_first_checkpoint(
    config_file: Path, finished_run: Path, forked_run: Path, tmp_path: Path
) -> None:
    """--resume auto then goes back to the trunk, not to step 0."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lines = (forked_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:5]))
    arguments = (f"run.dir={run_dir}", *FORK, "--resume", "auto", "--allow-change", "data")
    train("plain", config_file, *arguments)
    assert differences(forked_run, run_dir) == []


def test_rewinding_keeps_what_it_supersedes(
    config_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    checkpoints = run_dir / "checkpoints"
    # As a kill between a save and its pruning leaves one that is not to be kept.
    shutil.copytree(checkpoints / "step-00000025", checkpoints / "step-00000024")
    arguments = (config_file, f"run.dir={run_dir}", KEEP_ALL, "log.tensorboard=true")
    done = train("plain", *arguments, "--resume", checkpoints / "step-00000030")
    assert "kept aside, as this run continues from an earlier step" in done.stdout
    assert differences(finished_run, run_dir) == []
    for name in ("step-00000035", "step-00000040"):
        assert Reader(checkpoints / f"superseded-{name}").meta.step == int(name[-2:])
    _check_scalars(run_dir)

    # A finished run has nothing left to do: exit code 0, nothing written but that it is finished.
    before = (run_dir / "metrics.jsonl").read_text()
    done = train("plain", *arguments, "--resume", "auto")
    assert f"nothing to do: the checkpoint is at step {NUM_STEPS} of {NUM_STEPS}" in done.stdout
    after = (run_dir / "metrics.jsonl").read_text()
    assert after.startswith(before)
    added = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert [line["event"] for line in added] == ["resume", "finished"]
    assert differences(finished_run, run_dir) == []


def test_tensorboard(finished_run: Path) -> None:
    _check_scalars(finished_run)


def _check_scalars(run_dir: Path) -> None:
    """TensorBoard shows the numbers of metrics.jsonl, each step once."""
    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    for kind, key in (("train", "loss"), ("train", "lambda_weight"), ("valid", "loss")):
        shown = [(scalar.step, scalar.value) for scalar in reader.Scalars(f"{kind}/{key}")]
        recorded = [(line["step"], line[key]) for line in metrics(run_dir, kind)]
        assert [step for step, _ in shown] == [step for step, _ in recorded]
        values = [value for _, value in recorded]
        assert [value for _, value in shown] == pytest.approx(values, rel=1e-6)  # fp32
    assert any(tag.startswith("ternary/layers.0") for tag in reader.Tags()["scalars"])


def test_report(finished_run: Path, forked_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    runs = [str(finished_run), str(forked_run)]
    assert main(["report", *runs, "--names", "trunk,fork", "--out", str(out)]) == 0
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "trunk" in (out / "report.html").read_text()
    summaries = json.loads((out / "summary.json").read_text())["runs"]
    assert [summary["name"] for summary in summaries] == ["trunk", "fork"]
    assert all(summary["finished"] for summary in summaries)


@pytest.mark.parametrize("name", ["finished_run", "forked_run"])
def test_packed_export_is_the_checkpoint(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Same loss to the last digit, and codes made from the checkpoint's own compute weights; the
    finished run is bf16, the forked one fp32."""
    run_dir: Path = request.getfixturevalue(name)
    packed = tmp_path / "packed"
    assert main(["export", str(run_dir), str(packed)]) == 0
    mine, its = (evaluate(model, tmp_path / "eval.json") for model in (packed, run_dir))
    assert mine == its
    if name == "forked_run":  # it evaluates on all of the split: the same figure, batched otherwise
        last = metrics(run_dir, "valid")[-1]["loss"]
        assert its["loss"] == pytest.approx(last, rel=1e-6)

    checkpoint = Reader(checkpoint_dirs(run_dir)[-1])
    dtype = torch.bfloat16 if name == "finished_run" else torch.float32
    tensors = load_file(packed / "model.safetensors")
    num_ternary = 0
    for parameter, master in checkpoint.parameters():
        weight_FD = master.to(dtype)
        if f"{parameter}_scale" not in tensors:
            assert torch.equal(tensors[parameter], weight_FD), parameter
            continue
        num_ternary += 1
        scale = weight_FD.float().abs().double().mean().float().clamp(min=1e-5)
        codes_FD = (weight_FD.float() / scale).round().clamp(-1, 1)
        assert torch.equal(tensors[f"{parameter}_scale"], scale), parameter
        assert torch.equal(unpack_2bit(tensors[parameter]).float(), codes_FD), parameter
    assert num_ternary == 2 * 7  # q, k, v, output, gate, up, down
