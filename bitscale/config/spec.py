"""What quantization means: which codes, which scale, which arithmetic, which gradient.

A specification is inert data (no torch), so that the configuration can check it. Named ones with
their formulas and sources are in `presets.py`; `bitscale.quant` computes them.

With t a tile of the tensor (granularity), m = measure(t), n = numerator:

    divide       s = m / n,   code = clip(round(t / s)),         t̂ = s · code
    reciprocal   s = m / n,   code = clip(round(t · (1 / s))),   t̂ = s · code
    multiply     q = n / m,   code = clip(round(t · q)),         t̂ = code / q
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from bitscale.errors import ConfigError

Measure = Literal["absmean", "absmedian", "absmax", "twn", "rms", "sparse_absmean", "learned"]
Granularity = Literal["matrix", "row", "group", "row_shard", "column_shard"]
Rounding = Literal["half_even", "half_up", "half_away", "odd", "stochastic"]
EpsEnters = Literal["measure", "step", "added"]
ScaleForm = Literal["divide", "reciprocal", "multiply"]
ScaleDtype = Literal["arithmetic", "native", "native_late"]
Product = Literal["integer", "codes", "dequantized"]

# fp32 adds integers exactly up to this.
EXACT_INTEGERS = 2**24
SPARSE_BLOCK = 4  # consecutive inputs of which sparse_absmean zeroes one


@dataclass(frozen=True)
class CodeSpec:
    """How one tensor (a weight, or the rows of an activation) becomes integer codes."""

    # of |t|: mean, lower median, maximum, the mean above 0.75 · mean (twn), rms; sparse_absmean:
    # the mean without the smallest of each 4 consecutive inputs, whose code is 0 (the others' ±1);
    # learned: a parameter of the layer, one for each row
    measure: Measure
    numerator: float = 1.0  # n: the code that a value of size m gets
    code_min: int = -1
    code_max: int = 1
    granularity: Granularity = "matrix"  # of scales; row: a token, for activations
    group_size: int | None = None  # group: columns that share a scale, within a row
    num_shards: int | None = None  # row_shard, column_shard: equal blocks with a scale each
    rounding: Rounding = "half_even"  # odd: to the nearest odd integer, so that no code is 0
    eps: float = 1e-5
    # measure: m = max(m, eps); step: s = max(s, eps) where codes are made, but t̂ uses s itself;
    # added: m + eps
    eps_enters: EpsEnters = "measure"
    scale_form: ScaleForm = "divide"
    # native: s is rounded to the tensor's dtype; native_late: only after the codes are made
    scale_dtype: ScaleDtype = "arithmetic"
    arithmetic: Literal["fp32", "native"] = "fp32"  # native: in the tensor's own dtype
    statistics: Literal["fp64", "arithmetic"] = "arithmetic"  # in which sums are taken

    @property
    def num_levels(self) -> int:
        span = self.code_max - self.code_min
        return span // 2 + 1 if self.rounding == "odd" else span + 1

    @property
    def is_ternary(self) -> bool:
        return (self.code_min, self.code_max) == (-1, 1)

    @property
    def scales_rows(self) -> bool:
        """Whether every row has one scale, so that it can be applied after summing a row."""
        return self.granularity in ("matrix", "row", "row_shard")

    def __post_init__(self) -> None:
        _check_codes(self)
        _check_granularity(self)


@dataclass(frozen=True)
class QuantSpec:
    """A quantized linear layer: codes of its weight and its input, product, norm and gradient."""

    weight: CodeSpec
    activation: CodeSpec | None  # None: activations stay in 16 bit
    # integer: Σ codes in fp32, exactly, dequantized once; codes: F.linear of codes in the
    # tensor's dtype, then divided by both q; dequantized: F.linear(x̂, ŵ) in the tensor's dtype
    product: Product = "integer"
    bias: Literal["after", "before"] = "after"  # before: added to codes, so divided by q too
    norm: Literal["none", "layernorm"] = "none"  # affine-free, of the input, at every λ
    # How x̂ replaces x while gradients pass: `replaced` by its value; `added` as x + λ (x̂ − x) in
    # the tensor's dtype, which loses a code where |x| is much larger (bf16: beyond 256 codes)
    straight_through: Literal["replaced", "added"] = "replaced"
    # clip: the gradient of a weight beyond the outermost code is 0 (arXiv:1902.08153, eq. 3);
    # trust: that of a weight or an input further than s from its quantized value
    # (arXiv:2502.05003, section 3.3); lsq: that of a weight beyond 0.99 of its learned scale,
    # which gets a gradient too (quant/learned.py)
    gradient: Literal["identity", "clip", "trust", "lsq"] = "identity"
    # Width of the orthonormal Hadamard blocks that rotate x and w along the inputs before
    # they are quantized: y = (x H)^ (w H)^T. None: no rotation
    hadamard: int | None = None
    # Of the weights whose code is 0, this share is summed into the output as a bias, whatever the
    # input (arXiv:2509.23809)
    deadzone_bias: float = 0.0
    # ε at its highest: training adds ε x wᵀ to the output and anneals ε to 0 by the step
    # (arXiv:2601.07892; quant/schedule.py)
    residual: float = 0.0
    # Bits of the gradient in the backward products; None: floating point. Only where a kernel
    # computes the layer (kernel_measure)
    gradient_bits: Literal[8, 16, 24] | None = None

    @property
    def learns_scale(self) -> bool:
        """Whether the layer has a parameter α [F] beside its weight."""
        return self.weight.measure == "learned"

    def __post_init__(self) -> None:
        _check_spec(self)


def _check_codes(part: CodeSpec) -> None:
    for name, kind in (
        ("measure", Measure),
        ("granularity", Granularity),
        ("rounding", Rounding),
        ("eps_enters", EpsEnters),
        ("scale_form", ScaleForm),
        ("scale_dtype", ScaleDtype),
    ):
        if getattr(part, name) not in get_args(kind):
            raise ConfigError(
                f"quantizer {name}={getattr(part, name)!r} is unknown; use one of "
                f"{', '.join(get_args(kind))}"
            )
    if not -128 <= part.code_min < 0 < part.code_max <= 127:
        raise ConfigError(
            f"quantizer codes {part.code_min}..{part.code_max} must span 0 and fit into int8"
        )
    if part.eps <= 0 or part.numerator <= 0:
        raise ConfigError(
            f"quantizer eps={part.eps:g} and numerator={part.numerator:g} must be positive"
        )
    unrounded = part.is_ternary and part.rounding == "half_even" and part.numerator == 1
    if part.measure == "twn" and not (unrounded and part.eps_enters == "measure"):
        raise ConfigError(
            "weight_scale='twn' thresholds instead of rounding: it is ternary only, with "
            "rounding='half_even', numerator 1 and eps as the smallest scale"
        )
    if part.measure == "sparse_absmean" and not (unrounded and part.scale_form == "divide"):
        raise ConfigError(
            "measure='sparse_absmean' ranks weights instead of rounding: it is ternary only, with "
            "rounding='half_even', numerator 1 and scale_form='divide'"
        )
    if part.measure == "learned" and (
        (part.granularity, part.rounding, part.eps_enters, part.scale_form, part.arithmetic)
        != ("row", "half_even", "measure", "divide", "fp32")
    ):
        raise ConfigError(
            "measure='learned' has one scale for each row, in fp32, with eps as the smallest: it "
            "needs granularity='row', rounding='half_even', eps_enters='measure', "
            "scale_form='divide' and arithmetic='fp32'"
        )


def _check_granularity(part: CodeSpec) -> None:
    if (part.granularity == "group") != (part.group_size is not None):
        raise ConfigError(
            f"granularity={part.granularity!r} with group_size={part.group_size}: "
            "a group size is needed for 'group' and means nothing elsewhere"
        )
    sharded = part.granularity in ("row_shard", "column_shard")
    if sharded != (part.num_shards is not None):
        raise ConfigError(
            f"granularity={part.granularity!r} with num_shards={part.num_shards}: "
            "a number of shards is needed for row_shard and column_shard, and only there"
        )
    if (part.group_size or 1) < 1 or (part.num_shards or 1) < 1:
        raise ConfigError(
            f"group_size={part.group_size} and num_shards={part.num_shards}: give a positive number"
        )
    if part.measure == "sparse_absmean" and (part.group_size or 0) % SPARSE_BLOCK:
        raise ConfigError(
            f"group_size={part.group_size} would split blocks of {SPARSE_BLOCK} inputs, of which "
            f"measure='sparse_absmean' zeroes one; use a multiple of {SPARSE_BLOCK}"
        )


def _check_activation(activation: CodeSpec) -> None:
    if activation.granularity != "row":
        raise ConfigError(
            f"activations have one scale a token (granularity='row'), not "
            f"{activation.granularity!r}"
        )
    if activation.rounding == "stochastic":
        raise ConfigError(
            "rounding='stochastic' is of weights only; round activations half_even, half_up or "
            "half_away"
        )
    if activation.measure not in ("absmax", "rms"):
        raise ConfigError(
            f"activations are scaled by their absmax or rms, not {activation.measure!r}: "
            "what lies beyond another measure would be cut off"
        )


def _check_spec(spec: QuantSpec) -> None:
    weight, activation = spec.weight, spec.activation
    if activation is not None:
        _check_activation(activation)
    _check_learned(spec)
    _check_added_terms(spec)
    if spec.hadamard is not None and (spec.hadamard < 1 or spec.hadamard & (spec.hadamard - 1)):
        raise ConfigError(
            f"hadamard={spec.hadamard} is not a power of two; use one that divides the "
            "inputs, as 128"
        )
    if spec.product != "dequantized" and not weight.scales_rows:
        raise ConfigError(
            f"granularity={weight.granularity!r} gives one output several weight scales, so its "
            f"codes cannot be summed first (product={spec.product!r}); use product='dequantized'"
        )
    if spec.product == "integer":
        if activation is None:
            raise ConfigError(
                "product='integer' needs quantized activations; use product='dequantized'"
            )
        if "native" in (weight.arithmetic, activation.arithmetic) or "multiply" in (
            weight.scale_form,
            activation.scale_form,
        ):
            raise ConfigError(
                "product='integer' dequantizes once by fp32 steps: it needs arithmetic='fp32' "
                "and scale_form divide or reciprocal"
            )
        if spec.straight_through == "added":
            raise ConfigError(
                "product='integer' multiplies codes themselves: it needs "
                "straight_through='replaced'"
            )
    if spec.product == "codes":
        if spec.gradient == "trust" or spec.hadamard is not None:
            raise ConfigError(
                f"product='codes' has neither gradient='trust' nor a Hadamard rotation, not "
                f"gradient={spec.gradient!r} with hadamard={spec.hadamard}; use "
                "product='dequantized'"
            )
        parts = [part for part in (weight, activation) if part is not None]
        if any(p.scale_form != "multiply" or p.arithmetic != "native" for p in parts):
            raise ConfigError(
                "product='codes' divides by q in the tensor's dtype: it needs "
                "scale_form='multiply' and arithmetic='native'"
            )
    elif spec.bias == "before":
        raise ConfigError("bias='before' dequantization needs product='codes'")
    _check_gradient_bits(spec)


def _check_gradient_bits(spec: QuantSpec) -> None:
    if spec.gradient_bits is None:
        return
    if spec.gradient_bits not in (8, 16, 24):
        raise ConfigError(
            f"gradient_bits={spec.gradient_bits} is none of 8, 16, 24; use one of them, or leave "
            "it out for floating point"
        )
    if kernel_measure(spec) is None:
        raise ConfigError(
            f"gradient_bits={spec.gradient_bits} needs b158's codes (or absmedian's): ternary "
            "with one scale a matrix, activations of 8 bits, rounded half to even; leave it out"
        )


def kernel_measure(spec: QuantSpec) -> Literal["absmean", "absmedian"] | None:
    """The weight's measure if `bitscale.quant.kernels` computes this specification, else None.

    The kernels know ternary codes by one fp32 scale a matrix and int8 codes by one a token.
    """
    eps = spec.weight.eps
    # A median is the same in any arithmetic.
    known = (("absmean", "fp64"), ("absmedian", "arithmetic"), ("absmedian", "fp64"))
    for measure, statistics in known:
        weight = CodeSpec(measure=measure, statistics=statistics, eps=eps)  # type: ignore[arg-type]
        rows = CodeSpec("absmax", 127.0, -128, 127, granularity="row", eps=eps)
        if replace(spec, gradient_bits=None) == QuantSpec(weight=weight, activation=rows):
            return measure  # type: ignore[return-value]
    return None


def _check_learned(spec: QuantSpec) -> None:
    if spec.learns_scale != (spec.gradient == "lsq"):
        raise ConfigError(
            f"measure={spec.weight.measure!r} with gradient={spec.gradient!r}: a learned scale "
            "needs gradient='lsq', and only it has one"
        )
    if spec.learns_scale and (
        spec.product != "dequantized"
        or spec.hadamard is not None
        or spec.straight_through == "added"
    ):
        raise ConfigError(
            "measure='learned' differentiates ŵ itself: it needs product='dequantized', "
            "straight_through='replaced' and no Hadamard rotation"
        )


def _check_added_terms(spec: QuantSpec) -> None:
    for name in ("deadzone_bias", "residual"):
        if not 0.0 <= getattr(spec, name) < float("inf"):
            raise ConfigError(f"quantizer {name}={getattr(spec, name)} must be 0 or more")
    has_zero = spec.weight.rounding != "odd"
    if spec.deadzone_bias and (
        spec.product == "codes" or spec.hadamard is not None or not has_zero
    ):
        raise ConfigError(
            "deadzone_bias sums weights whose code is 0, in their own units: it needs codes with "
            "a 0, no Hadamard rotation, and product integer or dequantized"
        )


def max_exact_inputs(spec: QuantSpec) -> int:
    """Inputs up to which fp32 sums of products of codes are exact."""
    assert spec.activation is not None
    peaks = [max(-part.code_min, part.code_max) for part in (spec.weight, spec.activation)]
    return EXACT_INTEGERS // (peaks[0] * peaks[1])
