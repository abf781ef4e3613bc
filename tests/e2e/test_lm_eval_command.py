"""lm-eval's own command line on a finished run, and what it says of tasks that do not exist."""

import json
import sys
from pathlib import Path

import pytest

from bitscale.cli.main import main
from runs import execute

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


def test_an_unknown_task_is_named(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished_run), "--tasks", "piqua"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has no task 'piqua'; `lm-eval ls tasks` lists them, and bitscale_olmo11 is" in error
