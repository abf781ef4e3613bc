# ruff: noqa: E501 - prose of a Markdown page
"""Write docs/quantizers.md: every preset, its formula and source, what it changes and costs.

    python tools/document_quantizers.py
    python tools/document_quantizers.py CHECKPOINT    (prints the table of TRAINED instead)

Formulas are the docstrings of bitscale/config/presets.py. The figures are measured here, on Gaussian
matrices and on the golden vectors (tools/parity.py).
"""

import inspect
import platform
import re
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor

from bitscale.checkpoint import Reader
from bitscale.config.presets import PRESETS, preset
from bitscale.quant.learned import initial_scale
from bitscale.quant.quantizer import Codes, dequantize, quantize
from bitscale.quant.reference import blend_tokens, blend_weight

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "quantizers.md"

INTRODUCTION = """\
# Quantizers

Written by `python tools/document_quantizers.py`; a test compares the formulas.

`quant.preset` names what λ = 1 means; other keys of the section override one choice of it:

    bitscale train configs/quickstart.yaml quant.preset=hf
    bitscale train configs/quickstart.yaml quant.granularity=group quant.group_size=64

and `bitscale.bitlinearize(model, "hf")` takes the same names. A specification (`QuantSpec`,
`bitscale/config/spec.py`) is data: measure and granularity of scales, codes, rounding, where eps
enters, the form and dtype of scales and arithmetic, how the product is taken, where the bias goes,
norm, gradient, and what is added to the output. `bitscale/quant/reference.py` computes all of them.

- **λ** blends `w + λ_w (ŵ − w)` and `x + λ_a (x̂ − x)`; λ = 0 is bitwise the 16-bit linear (after
  the preset's norm, if it has one).
- **λ = 1 with `product: integer`** (b158, torchao, absmedian, twn, int2 to int4, quest) sums products of
  codes exactly in fp32, up to 2^24 / (largest product) inputs: 131,072 for ternary, 16,384 for int4;
  the result does not depend on order or sharding, nor on `torch.autocast` (the output has the input's
  dtype there, too). It has a first derivative only: `create_graph=True` is refused. The other presets, and
  0 < λ < 1, multiply floating-point tensors as their peers do.
- **Gradients** pass straight through to x and w; `quant.gradient=clip` stops those of weights beyond
  the outermost code, and `quest` those of weights and inputs further than half a level from theirs.
- **Learned scales** (`paretoq`): every layer has a parameter α, one number a row. It
  exists from the start, so that the optimizer owns it; in 16 bit its gradient is 0 and it has no weight
  decay, so it does not move. When the transition begins, α is set from the weight as it is then and its
  Adam moments to 0, whatever `transition.optimizer_state` says (the step count follows the policy). A
  16-bit trunk of another quantizer may be continued (`--allow-change quant`): it needs no α. Checkpoints hold
  it as `NAME.alpha`; `bitlinearize` adds it and `unbitlinearize` removes it.
- **Added terms**: `quant.deadzone_bias` (tequila: .001) adds that share of the weights with code 0 to
  the output, with any preset but `sdu`, `stochastic` and `quest`; the residual (sherry) is part of the
  transition, see [schedules](schedules.md). While ε > 0 the specification computes the layer, not a
  kernel.
- **Export** to the packed form is refused for what it cannot compute: codes that are not ternary,
  several scales, drawn codes, `sdu`'s division, `onebit`'s sums, and a checkpoint whose residual is not 0
  yet. A bias of dead weights becomes an ordinary bias.
- The scale belongs to a *logical* matrix: fused q/k/v or gate/up parameters get one each through
  `bitlinearize(model, fused={"*.qkv": 3, "*.gate_up": 2})`.
"""

DIFFERS = {
    "b158": "The default; the others are compared with it.",
    "hf": "Multiplies by 1 / s instead of dividing by s, takes the mean in fp32, and rounds x̂ and ŵ "
    "to bf16 before a floating-point product: codes differ only at ties; in bf16 the output carries "
    "the rounding of both factors.",
    "onebit": "Halves go up, also negative ones: −½ becomes 0 but ½ becomes 1, a bias that matters only "
    "for weights on a grid. Its export rounds to even in bf16, so that exported codes differ from "
    "trained ones. Its kernels refuse bf16 tensors under Triton 3.9 (`floor` takes fp32 and fp64 only), "
    "so parity is shown in fp32. They ran in Triton's interpreter here, not on a GPU.",
    "torchao": "eps bounds the step with which codes are made and not the one that dequantizes: tokens "
    "with max|x| < 1.27e-3 come out too small. In bf16 both scales are rounded.",
    "sdu": "Median scale; 128 instead of 127, cutting the largest x of every token; the bias is divided "
    "by q p; a norm at every λ; everything in the tensor's dtype. In bf16, w q is rounded to 8 bits "
    "before it is rounded to a code, and v + (code − v) turns the code of a weight beyond 256 scales "
    "into 0. λ blends weights and activations with one value there (set both here).",
    "absmedian": "The median's scale is smaller: fewer zeros, larger error for Gaussian weights, and "
    "indifferent to outliers.",
    "trilm": "No activation quantization; eps is added. Spectra's scale per model-parallel shard makes the "
    "model depend on the layout it was trained with: `row_shard`, `column_shard` reproduce it.",
    "twn": "A threshold and the mean of the survivors: less error, more zeros. Not idempotent either.",
    "stochastic": "Codes are drawn at every forward pass, unbiased between −s and s (in bf16, whose "
    "draws are coarse, up to .004 off) but noisier. "
    "Telemetry draws from a generator of its own. No final model follows from it: finish with "
    "another preset.",
    "weight_only": "No activation quantization.",
    "group64": "A scale for 64 weights costs .25 to .5 bits a weight, and one output row sums several scales: "
    "no integer product across groups.",
    "group128": "As group64 at half the cost.",
    "group256": "As group64 at a quarter of the cost; 256 columns are a GGUF block.",
    "int2": "4 levels and a scale a row. Two's complement: one more negative level than positive ones.",
    "int3": "8 levels.",
    "int4": "16 levels.",
    "quest": "16 levels without zero, in a rotated space: outliers spread over 128 inputs before they "
    "are quantized. 4-bit activations. Not bitwise the 16-bit linear just above λ = 0, but equal up to "
    "rounding: x H and w H are multiplied. Its authors' code is no installable package: tests check "
    "the paper's formula in float64. By hand, with that code (IST-DASLab/QuEST, c295afd, its "
    "HalfHadamardTrustQuantizer): y, dx and dw within 7e-7 in fp32 when its H is in fp32; it rounds H to "
    "bf16, 2e-4 apart.",
    "paretoq": "A parameter a row; weights beyond .99 α have no gradient. α starts at the row's maximum, "
    "which leaves most codes 0 for Gaussian rows (below: zeros and error at that start), and must "
    "shrink by training. Its code takes the gradient of α beyond .99 α as ±g where ŵ itself changes by ±2/3: "
    "here it is ŵ's own, ±2/3 g; the rest of that code (facebookresearch/ParetoQ, 655e338, compared by hand, fp32: codes equal, y, dx, dw and "
    "α's other gradients within 3e-7) agrees; in bf16 it makes codes in bf16, .05% of them others. α below eps "
    "still gets a gradient, as there. The paper itself could not be read here: the formulas are its code's.",
    "tequila": "Nothing is learned beside the weights: the bias Σ_D follows from them, and an export holds "
    "it as an ordinary bias (with `quant.granularity=matrix`, see above). λ = .001 is a constant here (`quant.deadzone_bias`). Its code "
    "(`ultraquantv2`, compared by hand): in fp32 codes equal, y, dx and dw within 3e-7; it quantizes bf16 "
    "weights in bf16, which changes .07% of the codes. Only the paper's abstract could be read here.",
    "sherry": "5 bits hold 4 codes: 1.25 bits a weight. Fewer zeros (exactly a quarter) and more error than "
    "thresholds for Gaussians. Its code evaluates without the residual at every step and takes sign(0) = "
    "0, so that a block may hold more zeros; here a held-out loss includes the residual of its step (a "
    "finished model has none) and a weight of 0 counts as positive. Compared by hand in fp32 (also with the "
    "quantizer in Tencent/AngelSlim, 67394ce): codes "
    "equal, y, dx and dw within 3e-7, ε within 2e-16 over its 22,111 steps. Only the paper's abstract could be "
    "read here.",
}


def sections() -> str:
    """Formula, source and difference of every preset, in Markdown."""
    parts = []
    for name, make in PRESETS.items():
        text = re.sub(r"\s+", " ", inspect.cleandoc(make.__doc__ or "")).replace(
            " Source:", "\n\nSource:"
        )
        parts.append(f"### `{name}`\n\n{text}\n\n{DIFFERS[name]}\n")
    return "\n".join(parts)


def costs() -> str:
    """The table of measured costs; Gaussian columns with seed 0."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)  # of stochastic rounding; that of w would correlate with it
    w = torch.randn(1024, 1024, generator=generator)
    x = torch.randn(256, 1024, generator=generator)
    rows = [
        "| preset | levels | codes w ≠ b158 | the same, bf16 w | codes x ≠ b158 | the same, bf16 x | zeros "
        "| MSE / σ² | error of y |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PRESETS:
        weights, tokens = compare_codes(name, w, x)
        weights_bf16, tokens_bf16 = compare_codes(name, w.bfloat16(), x.bfloat16())
        zeros = float((codes_of(name, w).codes == 0).float().mean())
        levels = preset(name).weight.num_levels
        codes = f"{weights} | {weights_bf16} | {tokens} | {tokens_bf16}"
        errors = f"{mse(name, w):.3f} | {output_error(name, x, w):.3f}"
        rows.append(f"| `{name}` | {levels} | {codes} | {zeros:.3f} | {errors} |")
    return "\n".join(rows) + "\n"


def codes_of(name: str, w: Tensor) -> Codes:
    """Codes of `w` at the transition: a learned scale has its initial value."""
    spec = preset(name)
    return quantize(w, spec.weight, alpha_F=initial_scale(w) if spec.learns_scale else None)


def compare_codes(name: str, w: Tensor, x: Tensor) -> tuple[str, str]:
    """Shares of codes that differ from b158's, of weights and of activations."""
    spec, base = preset(name), preset("b158")
    weights = "-"
    if spec.weight.is_ternary:
        ours = codes_of(name, w).codes != quantize(w, base.weight).codes
        weights = f"{float(ours.float().mean()):.2%}"
    if spec.activation is None or base.activation is None or spec.activation.code_max != 127:
        return weights, "-"
    differ = quantize(x, spec.activation).codes != quantize(x, base.activation).codes
    return weights, f"{float(differ.float().mean()):.2%}"


def mse(name: str, w: Tensor) -> float:
    """Mean squared error of ŵ over the variance of w."""
    residual = w - dequantize(codes_of(name, w), preset(name).weight)
    return float(residual.double().square().mean() / w.double().square().mean())


def output_error(name: str, x: Tensor, w: Tensor) -> float:
    """|x̂ ŵᵀ − x wᵀ| / |x wᵀ|, Frobenius, without the preset's norm and added terms."""
    spec, y = preset(name), x @ w.T
    alpha = initial_scale(w) if spec.learns_scale else None
    y_hat = blend_tokens(x, 1.0, spec) @ blend_weight(w, 1.0, spec, alpha).T
    return float((y_hat - y).norm() / y.norm())


def trained_costs(checkpoint: Path) -> str:
    """The table of costs on the linear layers' weights of a checkpoint, all layers together."""
    reader = Reader(checkpoint)
    layers = [w for name, w in reader.parameters() if name.startswith("layers.") and w.dim() == 2]
    power = sum(float(w.double().square().sum()) for w in layers)
    numel = sum(w.numel() for w in layers)
    rows = ["| preset | codes w ≠ b158 | zeros | MSE / σ² |", "|---|---|---|---|"]
    torch.manual_seed(1)
    for name in PRESETS:
        part = preset(name).weight
        if any(w.shape[1] % (part.group_size or 1) for w in layers):
            rows.append(f"| `{name}` | does not divide the inputs | | |")
            continue
        codes = [codes_of(name, w) for w in layers]
        base = [quantize(w, preset("b158").weight).codes for w in layers]
        differ = sum(int((c.codes != b).sum()) for c, b in zip(codes, base, strict=True))
        zeros = sum(int((c.codes == 0).sum()) for c in codes) / numel
        error = sum(
            float((w - dequantize(c, part)).double().square().sum())
            for w, c in zip(layers, codes, strict=True)
        )
        shown = f"{differ / numel:.2%}" if part.is_ternary else "-"
        rows.append(f"| `{name}` | {shown} | {zeros:.3f} | {error / power:.3f} |")
    return "\n".join(rows) + "\n"


def render() -> str:
    """The whole document."""
    parity = runpy.run_path(str(ROOT / "tools" / "parity.py"))
    return "\n".join(
        [
            INTRODUCTION,
            "## Presets\n",
            sections(),
            COSTS_INTRODUCTION.format(torch=torch.__version__, python=platform.python_version()),
            costs(),
            TRAINED,
            PARITY_INTRODUCTION,
            parity["table"](),
        ]
    )


COSTS_INTRODUCTION = """\
## What they cost

Measured on N(0, 1) matrices, w [1024, 1024] and x [256, 1024], seed 0 (torch {torch}, Python {python};
they are counts and errors, not times). *Codes ≠ b158* counts ternary presets only, from the same
fp32 or bf16 tensors; `sdu` and `stochastic` are compared without the norm, `quest` without its rotation
(which leaves Gaussians as they are), `paretoq` at the scales that it starts with. *Error of y* is |x̂ ŵᵀ − x wᵀ| / |x wᵀ|. What a preset costs a
*trained* model is not measured here; it is a question for a sweep: the weights adapt to the quantizer, and an error here does not order losses.
"""

TRAINED = """\
## What they cost on trained weights

The same on the 28 linear layers of a 1.05M-parameter decoder (width 128) that was trained in 16 bit for 80 steps
(655k tokens of the novels of [first runs](results/first-runs.md), `configs/first-runs.yaml` with
`transition.at=null`): the weights that a transition at 20% would find. Errors and squares are summed over all layers.
For thresholds they hardly differ from those of Gaussians (b158 .270 instead of .263). `paretoq` errs less
than above because its rows are shorter: the largest of 128 or 384 weights is nearer to the others than that of 1,024.

| preset | codes w ≠ b158 | zeros | MSE / σ² |
|---|---|---|---|
| `b158` | 0.00% | 0.309 | 0.270 |
| `hf` | 0.00% | 0.309 | 0.270 |
| `onebit` | 0.00% | 0.309 | 0.270 |
| `torchao` | 0.00% | 0.309 | 0.270 |
| `sdu` | 4.63% | 0.263 | 0.326 |
| `absmedian` | 4.63% | 0.263 | 0.326 |
| `trilm` | 0.01% | 0.309 | 0.270 |
| `twn` | 14.17% | 0.451 | 0.197 |
| `stochastic` | 12.98% | 0.258 | 0.344 |
| `weight_only` | 0.00% | 0.309 | 0.270 |
| `group64` | 4.01% | 0.299 | 0.248 |
| `group128` | 3.66% | 0.300 | 0.250 |
| `group256` | does not divide the inputs | | |
| `int2` | - | 0.390 | 0.145 |
| `int3` | - | 0.228 | 0.039 |
| `int4` | - | 0.129 | 0.012 |
| `quest` | - | 0.000 | 0.011 |
| `paretoq` | 33.49% | 0.644 | 0.301 |
| `tequila` | 3.66% | 0.300 | 0.250 |
| `sherry` | 17.69% | 0.250 | 0.272 |
"""

PARITY_INTRODUCTION = """\
## Parity with the peers

Vectors made by running each peer (`tools/make_golden.py`, versions in `tests/golden/provenance.json`)
on seeded inputs: Gaussian, odd sizes, a batch, ties everywhere, zeros, outliers, values around and
below eps; fp32 and bf16. Differences are the largest absolute one over the largest value of the peer;
0 is bitwise equality, here with the 2 threads of the golden run; another number of threads sums in another
order, and fp32 figures of 0 become up to 2e-7. `tests/unit/test_golden.py` holds codes to equality and the
others to one rounding of the dtype, with any number. torchao in bf16 rounds the integer sum and both
products, where bitscale rounds once. `python tools/parity.py` prints this table.
"""


def main() -> None:
    if len(sys.argv) > 1:
        print(trained_costs(Path(sys.argv[1])))
        return
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
