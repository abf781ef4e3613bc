"""A killed and resumed run is bitwise the uninterrupted one; tools/kill_resume.py does more."""

import json
import shutil
from pathlib import Path

import pytest

from bitscale.recorder import drop_later_lines
from kill_points import Aim, run_with_kills
from runs import KEEP_ALL, checkpoint_dirs, differences, events, metrics, start, train_command

pytestmark = pytest.mark.e2e


def test_killed_on_one_rank(config_file: Path, finished_run: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = (f"run.dir={run_dir}", KEEP_ALL, "--resume", "auto")
    aims = [
        Aim("save", 9, 0.004),
        Aim("step", 18, 0.01),
        Aim("publication", 23, 0.0),
    ]
    command = train_command("plain", config_file, *arguments)
    points = run_with_kills(lambda: start(command, log), run_dir, log, aims)
    print(points)
    assert len(points) >= 2, points  # a session may be over before its kill
    assert differences(finished_run, run_dir) == []
    assert len(events(run_dir, "transition")) == 1
    assert {line["step"] for line in events(run_dir, "finished")} == {40}


@pytest.mark.slow
def test_killed_on_two_ranks(config_file: Path, finished_run_2_ranks: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = (f"run.dir={run_dir}", KEEP_ALL, "engine.zero_stage=3", "--resume", "auto")
    aims = [Aim("save", 9, 0.004), Aim("step", 20, 0.01, one_rank=True)]
    command = train_command("torchrun", config_file, *arguments)
    points = run_with_kills(lambda: start(command, log), run_dir, log, aims)
    print(points)
    assert points
    assert differences(finished_run_2_ranks, run_dir) == []


def test_comparison_sees_one_bit(finished_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    assert differences(finished_run, copy) == []
    _change_loss(copy)
    assert len(differences(finished_run, copy)) == 1
    shard = checkpoint_dirs(copy)[-1] / "state-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert len(differences(finished_run, copy)) == 2


def test_resuming_at_the_transition_records_it_once(tmp_path: Path) -> None:
    """It is recorded before its first step: a kill after that leaves a line that comes again."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": 16}, {"kind": "event", "step": 16, "event": "checkpoint"}]
    transition = {"kind": "event", "step": 16, "event": "transition"}
    write = "".join(json.dumps(line) + "\n" for line in (*lines, transition))
    path.write_text(write)
    drop_later_lines(path, 17)
    assert path.read_text() == write
    drop_later_lines(path, 16)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines


def _change_loss(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    loss = metrics(run_dir, "train")[20]["loss"]
    changed = json.dumps(loss + 1e-6)
    path.write_text(path.read_text().replace(json.dumps(loss), changed))
