"""A published model as the trunk of a run: Hugging Face directory -> checkpoint -> training."""

from pathlib import Path

import pytest

from bitscale.cli.main import main
from runs import checkpoint_dirs, evaluate, metrics, train

pytestmark = pytest.mark.e2e


def test_training_goes_on_from_a_hugging_face_directory(
    config_file: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A 16-bit model of ten steps goes out, comes in, evaluates as before, and turns ternary."""
    trunk = checkpoint_dirs(finished_run)[1]
    assert trunk.name == "step-00000010"
    hf, imported = tmp_path / "hf", tmp_path / "imported"
    assert main(["export", str(trunk), str(hf), "--format", "hf"]) == 0
    assert main(["import", str(hf), str(imported), "--config", str(config_file)]) == 0
    assert "llama, 16- or 32-bit weights" in capsys.readouterr().out
    losses = [evaluate(model, tmp_path / "eval.json")["loss"] for model in (trunk, imported)]
    assert losses[0] == losses[1]

    run_dir = tmp_path / "run"
    overrides = ["transition.at.step=2", "transition.ramp={shape: none, over: {steps: 0}}"]
    stop = ["train.stop_step=4", "train.eval_every=0"]
    train("plain", config_file, f"run.dir={run_dir}", *overrides, *stop, "--resume", imported)
    lines = metrics(run_dir, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lambda_weight"] for line in lines] == [0.0, 0.0, 1.0, 1.0]
    began = metrics(finished_run, "train")
    # Trained for ten steps already, on the same first batch.
    assert lines[0]["loss"] < began[0]["loss"] - 0.3
    assert main(["export", str(run_dir), str(tmp_path / "packed")]) == 0
    assert main(["verify", str(run_dir), str(tmp_path / "packed"), "--tokens", "64"]) == 0
