"""The recipe reloaded-vision: it trains, quantizes what it says, and pairs its seeds."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from bitscale.model.bitlinear import BitConv2d, BitLinear
from bitscale.model.bitlinearize import bitlinearize

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools/reloaded_vision.py"))


def test_it_learns_and_writes_a_table(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "vision.json"
    arguments = "--models mlp --widths 32 --lr 3e-3 --seeds 2 --epochs 6 --json"
    results = recipe["main"]([*arguments.split(), str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row == {**results["rows"][0]}
    # A tenth by chance.
    assert all(min(found) > 0.7 for found in row["accuracies"].values()), row
    assert row["accuracies"]["b158"] != row["accuracies"]["fp32"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| mlp | 32 | 0.003 | 0.01 | ")


def test_the_recipe_holds_the_settings(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the options do not say otherwise: as the table of docs/recipes.md was made."""
    text = recipe["SETTINGS"].read_text()
    assert "Verbatim:" in text and "Our choice:" in text
    seen: list[Any] = []
    # runpy's functions look their names up in the module that it made.
    names = recipe["main"].__globals__
    monkeypatch.setitem(names, "measure", lambda args: seen.append(args) or {})
    monkeypatch.setitem(names, "table", str)
    recipe["main"](["--seeds", "2"])
    (args,) = seen
    assert (args.widths, args.lr, args.seeds, args.epochs) == ([64], [1e-2, 1e-3], 2, 30)


def test_every_layer_is_quantized(recipe: dict[str, Any]) -> None:
    for name, kinds in (("mlp", (BitLinear,) * 3), ("cnn", (BitConv2d, BitConv2d, BitLinear))):
        model = recipe["make_model"](name, 16)
        assert len(bitlinearize(model, "absmedian")) == 3
        found = [m for m in model if isinstance(m, BitLinear | BitConv2d)]
        assert tuple(map(type, found)) == kinds


def test_seeds_decide_split_and_result(recipe: dict[str, Any]) -> None:
    first, again, other = (recipe["digits"](seed) for seed in (0, 0, 1))
    assert torch.equal(first.test_N1HW, again.test_N1HW)
    assert not torch.equal(first.test_classes_N, other.test_classes_N)
    assert len(first.test_classes_N) == 449 and len(first.train_classes_N) == 1348
    setting = recipe["Setting"]("cnn", 8, 3e-3, 0.0)
    accuracies = [recipe["train"](setting, "b158", 0, 1, 64) for _ in range(2)]
    assert accuracies[0] == accuracies[1]
