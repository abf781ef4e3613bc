"""Every recipe of configs/recipes starts, switches and saves."""

import json
import math
import sys
from pathlib import Path

import pytest
from recipe_sessions import RECIPES

from runs import checkpoint_dirs, execute, metrics

pytestmark = pytest.mark.e2e


def test_every_recipe_trains(python_corpus: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("recipe_sessions.py")
    done = execute([sys.executable, str(script), str(python_corpus), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in codes}
    assert codes == {path.stem: 0 for path in RECIPES}, logs
    for name in codes:
        lines = metrics(tmp_path / name, "train")
        assert [line["step"] for line in lines] == [1, 2], name
        assert all(math.isfinite(line["loss"]) for line in lines), name
        assert lines[-1]["lambda_weight"] == 1.0, name
        assert [path.name for path in checkpoint_dirs(tmp_path / name)][-1] == "step-00000002"
