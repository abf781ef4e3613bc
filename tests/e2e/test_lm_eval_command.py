"""lm-eval on a finished run: its own command line, two ranks, and tasks that do not exist."""

import json
import sys
from pathlib import Path

import pytest

from bitscale.cli.main import main
from runs import execute
from scored_models import write_task_files

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # lm-eval reads its index of 14,000 tasks

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {validation: ROWS}}
validation_split: validation
output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_choice: '{{c}}'
doc_to_target: '{{y}}'
metric_list: [{metric: acc}]
"""


def test_lm_evals_own_command_knows_the_class(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a task of its own in a folder of its own: no hub."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "import", "c": ["os", "sys"], "y": 1}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(TASK.replace("ROWS", str(rows)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = ["--model", "bitscale", "--model_args", f"path={finished_run}", "--device", "cpu"]
    task = ["--tasks", str(tmp_path / "tiny.yaml"), "--output_path", str(tmp_path / "out")]
    done = execute([sys.executable, "-m", "bitscale.scoring", *model, *task, "--batch_size", "2"])
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["n-samples"]["tiny"]["effective"] == 3
    assert found["config"]["model_lambda"] == 1.0


def test_two_ranks_print_and_write_what_one_does(finished_run: Path, tmp_path: Path) -> None:
    data = write_task_files(tmp_path / "data")
    options = ["--tasks", "piqa,winogrande", "--data-dir", str(data), "--device", "cpu"]
    found = []
    for tp in (1, 2):
        out = tmp_path / f"tp{tp}.json"
        launcher = ["torchrun", "--standalone", "--nproc-per-node", "2"]
        start = launcher if tp == 2 else [sys.executable]
        command = ["eval", str(finished_run), *options, "--tp", str(tp), "--out", str(out)]
        done = execute([*start, "-m", "bitscale.cli.main", *command])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| piqa") == 2  # acc and acc_norm, by rank 0 only
        (model,) = json.loads(out.read_text())["models"]
        found.append(model["tasks"])
    assert found[0] == found[1]


def test_an_unknown_task_is_named(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished_run), "--tasks", "piqua"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no task 'piqua'; `lm-eval ls tasks` lists them, and bitscale_olmo11 is" in error
