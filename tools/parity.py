"""Compare every preset with the golden vectors of the implementation that it reproduces.

    python tools/parity.py            # the table of docs/quantizers.md

Differences are the largest absolute one over the largest magnitude of the peer's tensor.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitscale.config.presets import preset
from bitscale.config.spec import CodeSpec, QuantSpec
from bitscale.quant.quantizer import quantize
from bitscale.quant.reference import bit_linear
from bitscale.quant.schedule import TERNARY, Strength

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_THREADS = 2  # of the golden run: another number sums in another order


class Parity(NamedTuple):
    """One preset against one peer, over cases of one dtype."""

    codes_x: float | None  # share of equal codes; None where the peer has none
    codes_w: float
    output: float | None  # largest relative difference
    gradient: float | None
    num_cases: int


def specs() -> dict[str, tuple[str, QuantSpec, Strength]]:
    """{golden file: (what reproduces it, specification, λ)}."""
    sdu = preset("sdu")
    native = CodeSpec(measure="absmean", scale_form="multiply", arithmetic="native")

    def of_bits(measure: str, bits: int) -> CodeSpec:
        half = 2 ** (bits - 1)
        return replace(
            sdu.weight, measure=measure, numerator=float(half), code_min=-half, code_max=half - 1
        )

    mean = replace(sdu, weight=replace(sdu.weight, measure="absmean"), norm="none")
    return {
        "hf": ("`hf`", preset("hf"), TERNARY),
        "onebit": ("`onebit`", preset("onebit"), TERNARY),
        "onebit_export": (
            "`hf` with arithmetic native",
            QuantSpec(native, None, product="dequantized"),
            TERNARY,
        ),
        "torchao": ("`torchao`", preset("torchao"), TERNARY),
        "sdu": ("`sdu`", sdu, TERNARY),
        "sdu_blend": ("`sdu`, λ = 0.3", sdu, Strength(0.3, 0.3)),
        "sdu_absmean": ("`sdu` with absmean, no norm", mean, TERNARY),
        "sdu_2bit": ("`sdu`, codes −2..1", replace(sdu, weight=of_bits("absmean", 2)), TERNARY),
        "sdu_3bit": (
            "`sdu`, codes −4..3, absmax",
            replace(sdu, weight=of_bits("absmax", 3)),
            TERNARY,
        ),
        "sdu_4bit": (
            "`sdu`, codes −8..7, absmax, weight only",
            replace(sdu, weight=of_bits("absmax", 4), activation=None, norm="none"),
            TERNARY,
        ),
        "stochastic": ("`stochastic`", preset("stochastic"), TERNARY),
    }


def ours(case: str, spec: QuantSpec, strength: Strength) -> dict[str, Tensor]:
    """The tensors of `tools/make_golden.py`, computed by bitscale."""
    tensors = inputs(case)
    x, w, bias = (t.clone().requires_grad_() for t in tensors[:3])
    torch.manual_seed(0)  # of stochastic rounding
    y = bit_linear(x, w, bias, strength, spec)
    y.backward(tensors[3])
    result = {"y": y.detach()}
    for name, leaf in (("x", x), ("w", w), ("bias", bias)):
        assert leaf.grad is not None
        result[f"grad_{name}"] = leaf.grad
    torch.manual_seed(0)
    result["codes_w"] = quantize(w, spec.weight).codes
    if spec.activation is not None:
        normed = x.detach()
        if spec.norm == "layernorm":
            normed = torch.nn.functional.layer_norm(normed, normed.shape[-1:])
        codes = quantize(normed.flatten(0, -2), spec.activation).codes
        result["codes_x"] = codes.view(x.shape)
    return result


def inputs(case: str) -> tuple[Tensor, ...]:
    """x, w, bias and the output's gradient of a case."""
    return tuple(_make_golden()["inputs"](case))


def _make_golden() -> dict[str, object]:
    if not _CACHE:
        _CACHE.update(runpy.run_path(str(ROOT / "tools" / "make_golden.py")))
    return _CACHE


_CACHE: dict[str, object] = {}


def relative_difference(got: Tensor, want: Tensor) -> float:
    largest = float(want.double().abs().max())
    return float((got.double() - want.double()).abs().max()) / (largest or 1.0)


def compare(peer: str, cases: list[str]) -> Parity:
    """`cases` of a golden file against the preset; see Parity."""
    _, spec, strength = specs()[peer]
    golden = load_file(GOLDEN / f"{peer}.safetensors")
    equal = {"codes_x": [0, 0], "codes_w": [0, 0]}
    output, gradient, has_output = 0.0, 0.0, False
    for case in cases:
        mine = ours(case, spec, strength)
        for key, want in golden.items():
            kind, _, name = key.partition("/")
            if kind != case:
                continue
            if name in equal:
                equal[name][0] += int((mine[name] == want).sum())
                equal[name][1] += want.numel()
                continue
            has_output = True
            difference = relative_difference(mine[name], want)
            if name == "y":
                output = max(output, difference)
            else:
                gradient = max(gradient, difference)
    same, total = equal["codes_x"]
    return Parity(
        same / total if total else None,
        equal["codes_w"][0] / equal["codes_w"][1],
        output if has_output else None,
        gradient if has_output else None,
        len(cases),
    )


def cases_of(peer: str) -> dict[str, list[str]]:
    """{dtype: cases} in a golden file."""
    keys = load_file(GOLDEN / f"{peer}.safetensors")
    names = sorted({key.partition("/")[0] for key in keys})
    split = {
        "fp32": [name for name in names if not name.endswith("_bf16")],
        "bf16": [name for name in names if name.endswith("_bf16")],
    }
    return {dtype: cases for dtype, cases in split.items() if cases}


def table() -> str:
    """The parity table in Markdown, with the golden run's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(GOLDEN_THREADS)
    try:
        return _table()
    finally:
        torch.set_num_threads(before)


def _table() -> str:
    rows = [
        "| bitscale | golden file | dtype | cases | equal codes x | equal codes w | output "
        "| gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for peer, (title, _, _) in specs().items():
        for dtype, cases in cases_of(peer).items():
            parity = compare(peer, cases)
            cells = [
                f"{title} | {peer} | {dtype} | {parity.num_cases}",
                "-" if parity.codes_x is None else f"{parity.codes_x:.2%}",
                f"{parity.codes_w:.2%}",
                "-" if parity.output is None else f"{parity.output:.1e}",
                "-" if parity.gradient is None else f"{parity.gradient:.1e}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
