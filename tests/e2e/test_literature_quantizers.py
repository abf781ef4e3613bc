"""paretoq and sherry as whole runs, forked from the 16-bit trunk of another quantizer."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitscale.checkpoint import Reader
from bitscale.cli.main import main
from runs import (
    KEEP_ALL,
    NUM_STEPS,
    TRANSITION_STEP,
    differences,
    evaluate,
    execute,
    metrics,
    train,
    train_command,
)

pytestmark = pytest.mark.e2e

TRUNK_STEP = 10


def fork(config_file: Path, trunk_run: Path, run_dir: Path, *overrides: str) -> None:
    trunk = trunk_run / "checkpoints" / f"step-{TRUNK_STEP:08d}"
    train(
        *("plain", config_file, f"run.dir={run_dir}", KEEP_ALL, "train.eval_batches=0"),
        *(*overrides, "--resume", trunk, "--allow-change", "quant"),
    )


@pytest.mark.slow
def test_learned_scales(
    config_file: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, resumed, evaluated; the trunk knew nothing of scales."""
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    preset = "quant.preset=paretoq"
    fork(config_file, finished_run, whole, preset)
    trunk, ours = metrics(finished_run, "train"), metrics(whole, "train")
    in_16_bit = [line["loss"] for line in trunk[TRUNK_STEP : TRANSITION_STEP + 1]]
    assert [line["loss"] for line in ours[: len(in_16_bit)]] == in_16_bit  # to the bit
    assert ours[-1]["loss"] != trunk[-1]["loss"]
    assert ours[-1]["loss"] < ours[0]["loss"]

    before, after = (
        {n: p for n, p in Reader(path).parameters() if n.endswith(".alpha")}
        for path in (whole / "checkpoints" / f"step-{step:08d}" for step in (15, 40))
    )
    assert len(before) == len(after) == 2 * 7
    assert all(not before[name].equal(after[name]) for name in before)
    scales = [line["layers"] for line in metrics(whole, "telemetry")][-1]
    for name, layer in scales.items():
        assert layer["scale"] == pytest.approx(float(after[f"{name}.alpha"].mean()) / 1.5, rel=0.01)

    fork(config_file, finished_run, interrupted, preset, "train.stop_step=24")
    arguments = (config_file, f"run.dir={interrupted}", KEEP_ALL, "train.eval_batches=0", preset)
    train("plain", *arguments, "--resume", "auto")
    assert differences(whole, interrupted) == []

    figures = evaluate(whole, tmp_path / "eval.json")
    assert figures["loss"] == pytest.approx(metrics(whole, "valid")[-1]["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["export", str(whole), str(tmp_path / "packed")]) != 0
    assert "trains with a scale per row, not one a matrix" in capsys.readouterr().err


def test_a_trunk_without_scales_is_refused_after_the_transition(
    config_file: Path, finished_run: Path, tmp_path: Path
) -> None:
    """Nothing would ever set them."""
    later = finished_run / "checkpoints" / "step-00000020"
    arguments = (config_file, f"run.dir={tmp_path / 'run'}", "quant.preset=paretoq")
    command = train_command("plain", *arguments, "--resume", later, "--allow-change", "quant")
    done = execute(command)
    assert done.returncode == 2
    assert ".alpha has shape none there and [" in done.stderr


def test_annealed_residual_and_bias_of_dead_weights(
    config_file: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the residual lasts it belongs to the model: evaluated with it, not exported. The bias
    is exported as an ordinary one."""
    run = tmp_path / "run"
    fork(
        config_file,
        finished_run,
        run,
        "quant={preset: sherry, granularity: matrix, deadzone_bias: 0.3}",
    )
    checkpoints = run / "checkpoints"
    unfinished = checkpoints / "step-00000030"
    assert main(["export", str(unfinished), str(tmp_path / "early")]) != 0
    message = capsys.readouterr().err
    assert "is at a residual of 0." in message
    assert "train past the end of transition.residual first" in message
    last = metrics(run, "valid")[-1]
    assert last["step"] == NUM_STEPS
    assert main(["export", str(run), str(tmp_path / "packed")]) == 0
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    biases = {name: bias for name, bias in tensors.items() if name.endswith(".bias")}
    assert len(biases) == 2 * 7  # the model itself has none
    assert all(bool(bias.any()) for bias in biases.values())
    its = evaluate(run, tmp_path / "its.json")
    assert evaluate(tmp_path / "packed", tmp_path / "mine.json") == its
    assert its["loss"] == pytest.approx(last["loss"], rel=1e-5)
