"""`bitscale train` with parallel.pp=2, as a user runs it; continued, evaluated and exported by one
process."""

from pathlib import Path

import pytest

from bitscale.cli.main import main
from runs import KEEP_ALL, TRANSITION_STEP, checkpoint_dirs, metrics, train

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_two_stages_train_what_one_process_trains(
    config_file: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two stages to step 30, one process from there on. Tolerances: as test_launchers."""
    run_dir = tmp_path / "run"
    arguments = [config_file, f"run.dir={run_dir}", KEEP_ALL]
    done = train("torchrun", *arguments, "parallel.pp=2", "train.stop_step=30")
    one = train("plain", *arguments, "--resume", "auto")
    parameters = [line for line in done.stdout.splitlines() if " in ternary layers)" in line]
    assert len(parameters) == 1
    counts = parameters[0].split("parameters")[0].split(": ")[1]
    assert counts in one.stdout

    for mine, its in zip(metrics(run_dir, "train"), metrics(finished_run, "train"), strict=True):
        before = mine["step"] <= TRANSITION_STEP
        assert mine["tokens"] == its["tokens"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-4 if before else 5e-3)
        if mine["step"] <= 8:  # later the norm has spikes, which enlarge rounding
            assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=3e-3)
    held_out = {line["step"]: line["loss"] for line in metrics(run_dir, "valid")}
    for line in metrics(finished_run, "valid"):
        before = line["step"] <= TRANSITION_STEP
        assert held_out[line["step"]] == pytest.approx(line["loss"], rel=1e-4 if before else 5e-3)
    readings = metrics(run_dir, "telemetry")
    for mine, its in zip(readings, metrics(finished_run, "telemetry"), strict=True):
        assert mine["layers"].keys() == its["layers"].keys()
    # A stage remembers its codes: of the first reading alone nothing is known.
    flips = [[layer["flipped"] for layer in line["layers"].values()] for line in readings]
    assert set(flips[0]) == {None} and None not in flips[1]

    saved = [path for path in checkpoint_dirs(run_dir) if path.name == "step-00000030"]
    assert main(["eval", str(saved[0])]) == 0
    assert "bits/byte" in capsys.readouterr().out
    assert main(["export", str(saved[0]), str(tmp_path / "packed")]) == 0
