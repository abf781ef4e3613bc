"""`bitscale probe` on finished runs, held to `bitscale eval`."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitscale.cli.main import main
from runs import evaluate

pytestmark = pytest.mark.e2e


def probe(run: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["probe", str(run), "--out", str(out), "--points", "3", *arguments]) == 0
    (path,) = out.glob("probe-*.json")
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".png"]
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_at_full_strength_it_is_the_evaluation(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe"
    figures = probe(finished_run, out, "--layers", "none", "--max-tokens", "0")
    evaluated = evaluate(finished_run, tmp_path / "eval.json")
    ternary = figures["loss"] + figures["curves"]["both"][-1]["rise"]
    assert ternary == pytest.approx(evaluated["loss"], rel=1e-6)
    assert figures["num_tokens"] == evaluated["num_tokens"]
    assert "trained last at λ 1/1" in capsys.readouterr().out


def test_before_the_transition_with_any_quantizer(finished_run: Path, tmp_path: Path) -> None:
    """Also one whose learned scales the checkpoint does not have."""
    trunk = finished_run / "checkpoints" / "step-00000015"
    arguments = ("--max-tokens", "1000", "--layers", "kind", "--parts", "both,weights")
    plain = probe(trunk, tmp_path / "plain", *arguments)
    assert {layer["group"] for layer in plain["layers"]} == {
        *(f"attn.{kind}" for kind in "qkvo"),
        *(f"mlp.{kind}" for kind in ("gate", "up", "down")),
    }
    learned = probe(trunk, tmp_path / "learned", *arguments, "--set", "quant.preset=paretoq")
    assert learned["loss"] == plain["loss"]
    assert learned["curves"]["weights"] != plain["curves"]["weights"]
    assert learned["proposal"]["overrides"]


def test_only_the_quantizer_may_be_another(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(finished_run), "--set", "model.d_ff=3"]) == 2
    error = capsys.readouterr().err
    assert "'model.d_ff=3': only the quantizer of a trained checkpoint can be another" in error
