"""The guard goes back when training goes wrong; killed at any moment of that, it ends the same.

Every run is 30 steps with a checkpoint every 5 (the last two are kept) and λ's ramp from step 16.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitscale.report import write_report
from faulty_sessions import MOMENTS, Fault, Job
from runs import checkpoint_dirs, differences, environment, events, metrics

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

KILLED = -9
POISONED = 22  # a batch: that of step 22 (from 0) unless one before it is skipped


@pytest.fixture(scope="module")
def runs(
    config_file: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All jobs below, by the name of their run: (directory, exit codes of its sessions)."""
    root = tmp_path_factory.mktemp("guard")
    short = [str(config_file), "train.steps=30", "train.eval_every=10", "log.every=3"]
    skip = [*short, "transition.guard.action=skip_batch"]
    zero_3 = [*skip, "engine.zero_stage=3"]
    slower = [
        *(*short, "transition.guard.action=rollback_slower", "transition.guard.slower=3"),
        "transition.ramp.over.steps=6",
    ]
    nan, too_steep = Fault("nan", POISONED, POISONED), Fault("nan", POISONED, POISONED, 0.9)
    other_text = Fault("targets", POISONED, POISONED)
    spike = [*skip, "transition.guard.spike=0.3", "transition.guard.window=10"]
    moments = list(MOMENTS)
    trunk = finished_run / "checkpoints" / "step-00000015"
    hopeless = [*skip, "transition.guard.max_retries=2"]

    def job(name: str, *rest: Any, **more: Any) -> Job:
        return Job(str(root / name), *rest, **more)

    jobs = [
        job("skip", zero_3, 2, nan),
        job("skip-expected", zero_3, 2, amendments_of=str(root / "skip")),
        job(
            "skip-killed",
            zero_3,
            2,
            nan,
            moments[:2],
        ),
        job("slower", slower, 2, too_steep),
        job("slower-killed", slower, 2, too_steep, [moments[2], 26]),
        job("spike", spike, 1, other_text),
        job("spike-killed", spike, 1, other_text, [21, moments[3]]),
        job("hopeless", hopeless, 1, Fault("nan", POISONED, 30)),
        job("fork", [*skip, "checkpoint.every=8"], 1, Fault("nan", 15, 15), resume=str(trunk)),
    ]
    trees = [{**j._asdict(), "fault": j.fault and j.fault._asdict()} for j in jobs]
    script = Path(__file__).with_name("faulty_sessions.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(trees)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {Path(j.run_dir).name: (Path(j.run_dir), c) for j, c in zip(jobs, codes, strict=True)}


def rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    return events(run_dir, "rollback")


def test_a_poisoned_batch_is_skipped(runs: dict[str, Any]) -> None:
    run_dir, codes = runs["skip"]
    assert codes == [0], log_of(run_dir)
    (event,) = rollbacks(run_dir)
    assert (event["detected_step"], event["from_step"], event["step"]) == (23, 20, 20)
    assert event["skipped_batches"] == [POISONED] and event["slower"] == 1
    assert "the gradient norm inf at step 23" in event["reason"]
    # The run as recorded: each step once, none of them bad.
    assert [line["step"] for line in metrics(run_dir, "train")] == list(range(1, 31))
    # In process, on two ranks at ZeRO-3, nothing of the failed attempt is left: the run is that
    # which never read the batch.
    expected, codes = runs["skip-expected"]
    assert codes == [0]
    assert differences(expected, run_dir) == []


def test_a_ramp_that_was_too_steep_is_slowed_down(runs: dict[str, Any]) -> None:
    run_dir, codes = runs["slower"]
    assert codes == [0], log_of(run_dir)
    (event,) = rollbacks(run_dir)
    assert (event["detected_step"], event["from_step"], event["slower"]) == (23, 20, 3)
    strength = {line["step"] - 1: line["lambda_weight"] for line in metrics(run_dir, "train")}
    # Six steps from 16 on, planned; from 20 on each takes three.
    assert [strength[s] for s in (16, 19, 20)] == [0, 3 / 6, 4 / 6]
    assert strength[22] == pytest.approx((4 + 2 / 3) / 6)
    assert (strength[25] < 1, strength[26]) == (True, 1)


@pytest.mark.parametrize("name", ["skip", "slower", "spike"])
def test_kills_on_the_way_change_nothing(runs: dict[str, Any], name: str) -> None:
    run_dir, codes = runs[f"{name}-killed"]
    assert codes == [KILLED, KILLED, 0], log_of(run_dir)
    whole, _ = runs[name]
    assert differences(whole, run_dir) == []
    amendments = (run_dir / "amendments.json").read_text()
    assert amendments == (whole / "amendments.json").read_text()
    assert [e["number"] for e in rollbacks(run_dir)] == [1]


def test_a_spike_is_judged_by_the_steps_before(runs: dict[str, Any]) -> None:
    run_dir, codes = runs["spike"]
    assert codes == [0], log_of(run_dir)
    (event,) = rollbacks(run_dir)
    assert event["detected_step"] == 23 and event["skipped_batches"] == [POISONED]
    assert "nats above the median" in event["reason"]
    # What the checkpoints say of themselves.
    (last, amendments) = [
        json.loads((path / "meta.json").read_text())["amendments"]
        for path in checkpoint_dirs(run_dir)
    ]
    assert last == amendments == json.loads((run_dir / "amendments.json").read_text())


def test_gives_up_and_stays_given_up(runs: dict[str, Any], tmp_path: Path) -> None:
    run_dir, codes = runs["hopeless"]
    assert codes == [1]
    error = log_of(run_dir).splitlines()[-1]
    assert "the gradient norm inf at step 23; the guard has gone back 2 times" in error
    found = rollbacks(run_dir)
    # The second goes back one checkpoint further: the first had not been enough.
    assert [(e["from_step"], e["skipped_batches"]) for e in found] == [(20, [22]), (15, [23])]
    assert (run_dir / "checkpoints" / "superseded-step-00000020").is_dir()
    (summary,) = write_report([run_dir], tmp_path / "report")
    assert summary.num_rollbacks == 2
    assert "rollbacks" in (tmp_path / "report" / "report.html").read_text()


def test_a_fork_goes_back_to_its_trunk(runs: dict[str, Any], finished_run: Path) -> None:
    """Of its own checkpoints, at 16 and 24 steps, none lies before the fault of step 16."""
    run_dir, codes = runs["fork"]
    assert codes == [0], log_of(run_dir)
    (event,) = rollbacks(run_dir)
    assert (event["detected_step"], event["from_step"]) == (16, 15)
    assert [line["step"] for line in metrics(run_dir, "train")] == list(range(16, 31))
    assert (finished_run / "checkpoints" / "latest").read_text() == "step-00000040\n"


def log_of(run_dir: Path) -> str:
    return run_dir.with_name(f"{run_dir.name}.log").read_text(errors="replace")
