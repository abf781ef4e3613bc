"""The benchmark of linear layers runs, checks what it times, and hides nothing."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Callable[[list[str]], None]:
    return runpy.run_path(str(ROOT / "tools/bench_linear.py"))["main"]


def test_results_reasons_and_provenance(
    bench: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    names = ["linear-fp32", "linear-bf16", "fake", "onebitllms", "reference", "triton-int8"]
    options = "--device cpu --shapes 70x32x48 --repeats 2 --markdown --gradients heavy --breakdown"
    bench([*options.split(), "--peers", ",".join(names), "--json", str(path)])
    content = json.loads(path.read_text())
    assert set(content["provenance"]) >= {"device", "versions", "commit", "command", "date"}
    assert content["provenance"]["versions"]["torch"] == torch.__version__
    (measured,) = content["measured"]
    assert measured["shape"] == [70, 32, 48]
    results = {result["name"]: result for result in measured["linear"]}
    assert list(results) == names
    for name in ("linear-fp32", "linear-bf16", "fake", "reference"):
        assert results[name]["reason"] is None
        assert 0 < results[name]["forward_ms"] < 1e4
        assert 0 < results[name]["both_ms"] < 1e4
    for name in ("linear-fp32", "reference"):
        assert max(results[name][f"error_{which}"] for which in "yx") < 1e-5
    assert 1e-4 < results["linear-bf16"]["error_y"] < 1e-2
    # x in its dtype; codes and scales of x, codes and scale of w.
    assert results["linear-fp32"]["memory_mib"] == 70 * 32 * 4 / 2**20
    # x̂ and ŵ; what the detached branches computed is dropped before the end of the pass.
    assert results["fake"]["memory_mib"] == (70 * 32 + 48 * 32) * 4 / 2**20
    assert results["reference"]["memory_mib"] == (70 * (32 + 4) + 48 * 32 + 4) / 2**20
    printed = capsys.readouterr().out
    for name in ("onebitllms", "triton-int8"):
        assert results[name]["both_ms"] is None
        assert results[name]["reason"]
        assert f"- `{name}` did not run: {results[name]['reason']}" in printed
    assert "| `linear-fp32` | torch.nn.Linear | fp32 | " in printed
    assert printed.startswith("- device: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8x8"], "--shapes '8x8' is not TOKENSxINPUTSxOUTPUTS, as 2048x1024x4096"),
        (["--peers", "tinygrad"], "--peers tinygrad: use some of linear-fp32, linear-bf16, "),
    ],
)
def test_wrong_arguments_say_what_is_right(
    bench: Callable[[list[str]], None],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(arguments)
    assert message in f"{stopped.value}{capsys.readouterr().err}"
