"""Named quantizer specifications, each with its formula and its source.

docs/quantizers.md tells what each changes relative to `b158` and what that costs;
tests/unit/test_golden.py holds them to vectors made by running the peer.
s is the weight's step, r the token's; w_FD a logical matrix, x_D a token.
"""

from collections.abc import Callable
from dataclasses import replace

from bitscale.config.spec import CodeSpec, QuantSpec
from bitscale.errors import ConfigError

INT8_ROWS = CodeSpec(
    measure="absmax", numerator=127.0, code_min=-128, code_max=127, granularity="row"
)
ABSMEAN = CodeSpec(measure="absmean", statistics="fp64")

# Steps of the uniform quantizer of least mean squared error for a Gaussian, over its mean
# magnitude sqrt(2/π) (J. Max, Quantizing for Minimum Distortion, IRE Trans. IT-6, 1960; here for
# two's complement codes, which contain 0): tests/unit/test_presets.py finds them again.
_LEAST_ERROR_STEP = {2: 1.3139, 3: 0.7543, 4: 0.4244}


def b158() -> QuantSpec:
    """s = max(mean|w|, eps), code = clip(round(w / s), −1, 1); r = max(max|x|, eps) / 127,
    code = clip(round(x / r), −128, 127); fp32, half to even, the sum of |w| exact.
    y = r s Σ code_x code_w + bias, the sum exact.

    Source: arXiv:2402.17764, eq. 1-3; Microsoft's Training Tips, Code, FAQ (2024).
    """
    return QuantSpec(weight=ABSMEAN, activation=INT8_ROWS)


def hf() -> QuantSpec:
    """q = 1 / max(mean|w|, eps), ŵ = clip(round(w q), −1, 1) / q; p = 127 / max(max|x|, eps),
    x̂ = clip(round(x p), −128, 127) / p; fp32, then both in the tensor's dtype.
    y = linear(x̂, ŵ) + bias.

    Source: transformers 5.23 integrations/bitnet.py, AutoBitLinear with online quantization;
    the same formula as the listing in Microsoft's Training Tips, Code, FAQ.
    """
    return QuantSpec(
        weight=CodeSpec(measure="absmean", scale_form="multiply"),
        activation=replace(INT8_ROWS, scale_form="multiply"),
        product="dequantized",
    )


def onebit() -> QuantSpec:
    """As `hf`, rounding half up: floor(v + ½). 1 / mean is taken in double precision, and the
    layer multiplies x + (x̂ − x) and w + (ŵ − w).

    Source: onebitllms 0.0.4, kernels/weight_quant.py and activation_quant.py (training; its
    export rounds half to even in bf16).
    """
    return QuantSpec(
        weight=CodeSpec(
            measure="absmean", scale_form="multiply", rounding="half_up", statistics="fp64"
        ),
        activation=replace(INT8_ROWS, scale_form="multiply", rounding="half_up"),
        product="dequantized",
        straight_through="added",
    )


def torchao() -> QuantSpec:
    """s = mean|w|, code = clip(round(w / max(s, eps)), −1, 1); r = max|x| / 127 in x's dtype,
    code = clip(round(x · (1 / max(r, eps))), −128, 127); y = s r Σ code_x code_w + bias with s
    rounded to w's dtype. eps bounds only the codes' step: rows with max|x| < 127 eps shrink.

    Source: torchao 0.18 prototype/quantized_training/bitnet.py and int8.py.
    """
    return QuantSpec(
        weight=CodeSpec(measure="absmean", eps_enters="step", scale_dtype="native_late"),
        activation=replace(
            INT8_ROWS, eps_enters="step", scale_form="reciprocal", scale_dtype="native"
        ),
    )


def sdu() -> QuantSpec:
    """x ← layer_norm(x) without parameters; q = 1 / max(median|w|, eps), p = 128 / max(max|x|,
    eps); y = (linear(clip(round(x p), −128, 127), clip(round(w q), −1, 1)) + bias) / (q p), all
    in the tensor's dtype: the largest x of a token is cut to 127/128, the bias is divided, and
    codes enter as v + λ (code − v), so that in bf16 an outlier's code is lost.

    Source: PyPI bitlinear 2.4.6, class BitLinear with its defaults (arXiv:2407.09527).
    """
    native = CodeSpec(measure="absmedian", scale_form="multiply", arithmetic="native")
    return QuantSpec(
        weight=native,
        activation=replace(INT8_ROWS, numerator=128.0, scale_form="multiply", arithmetic="native"),
        product="codes",
        bias="before",
        norm="layernorm",
        straight_through="added",
    )


def absmedian() -> QuantSpec:
    """As `b158` with s = max(median|w|, eps), the lower median.

    Source: arXiv:2407.09527 (b1.58 Reloaded), in b158's arithmetic.
    """
    return QuantSpec(weight=CodeSpec(measure="absmedian"), activation=INT8_ROWS)


def trilm() -> QuantSpec:
    """ŵ = s · clip(round(w / s), −1, 1), s = mean|w| + eps; activations stay in 16 bit.

    Source: arXiv:2407.12327 (Spectra), section 2: γ = ε + mean|w|. There every model-parallel
    shard has its own s: set granularity row_shard (column-parallel layers) or column_shard
    (row-parallel ones) with num_shards.
    """
    return QuantSpec(
        weight=replace(ABSMEAN, eps_enters="added"), activation=None, product="dequantized"
    )


def twn() -> QuantSpec:
    """Δ = 0.75 mean|w|, code = sign(w) [|w| > Δ], s = mean of |w| over |w| > Δ; activations as
    `b158`.

    Source: arXiv:1605.04711 (Ternary Weight Networks), eq. 5-6, with the Gaussian's factor.
    """
    return QuantSpec(weight=CodeSpec(measure="twn", statistics="fp64"), activation=INT8_ROWS)


def stochastic() -> QuantSpec:
    """code = sign(w) with probability min(|w| / median|w|, 1), else 0, drawn at every forward
    pass from torch's generator; the rest as `sdu` without its norm.

    Source: PyPI bitlinear 2.4.6, strategy `sample`.
    """
    reference = sdu()
    return replace(reference, weight=replace(reference.weight, rounding="stochastic"), norm="none")


def weight_only() -> QuantSpec:
    """As `b158`, activations in 16 bit: y = linear(x, ŵ) + bias.

    Source: arXiv:2402.17764 without its eq. for activations.
    """
    return QuantSpec(weight=ABSMEAN, activation=None, product="dequantized")


def group64() -> QuantSpec:
    """As `b158` with a scale for every 64 columns of a row: y = linear(x̂, ŵ) + bias.

    Source: group-wise scales as in GGUF and GPTQ (arXiv:2210.17323, section 4), measure absmean.
    """
    return _grouped(64)


def group128() -> QuantSpec:
    """As `group64`, 128 columns. Source: arXiv:2210.17323, section 4."""
    return _grouped(128)


def group256() -> QuantSpec:
    """As `group64`, 256 columns: a block of GGUF's TQ1_0 and TQ2_0. Source: as `group64`."""
    return _grouped(256)


def int2() -> QuantSpec:
    """Codes −2..1 with a scale a row: s = 1.3139 max(mean|w|, eps), code = clip(round(w / s));
    the step of least error for Gaussian weights. Activations as `b158`, sums exact.

    Source: Max 1960 (see above); rows as in LLM-QAT (arXiv:2305.17888), section 2.2.
    """
    return _multi_bit(2)


def int3() -> QuantSpec:
    """As `int2`: codes −4..3, s = 0.7543 mean|w|. Source: as `int2`."""
    return _multi_bit(3)


def int4() -> QuantSpec:
    """As `int2`: codes −8..7, s = 0.4244 mean|w|. Source: as `int2`."""
    return _multi_bit(4)


def quest() -> QuantSpec:
    """x ← x H, w ← w H with orthonormal Hadamard blocks of 128 inputs; for each token and each row
    σ = rms, s = 2.51393 σ / 15, code = clip(the odd integer nearest to t / s, −15, 15), t̂ = s ·
    code: 16 levels without 0, of least error for a Gaussian. y = linear(x̂, ŵ) + bias, the sum
    exact. The gradient of t passes where |t̂ − t| <= s, then back through H.

    Source: arXiv:2502.05003 (QuEST), sections 3.2-3.3, W4A4; its code adds 1e-8 to the largest
    level, here eps is the smallest σ.
    """
    part = CodeSpec(
        measure="rms",
        numerator=15 / 2.51393,
        code_min=-15,
        code_max=15,
        granularity="row",
        rounding="odd",
    )
    return QuantSpec(weight=part, activation=part, gradient="trust", hadamard=128)


def paretoq() -> QuantSpec:
    """α one parameter for each row, max|w| of the row when the transition begins; s = max(α, eps)
    / 1.5, ŵ = s · clip(round(w / s), −1, 1): three equally wide levels within ±α. Activations stay
    in 16 bit. The gradient of w passes where |w| <= .99 α; with q = w / α that of α is g Σ grad ·
    (ŵ / α − q [|q| <= .99]) over its row, g = 1 / sqrt(number of weights).

    Source: arXiv:2502.02631 (ParetoQ), SEQ for 1.58 bit; g and the form of α's gradient from
    arXiv:1902.08153 (LSQ), section 2.2.
    """
    return QuantSpec(
        weight=CodeSpec(measure="learned", numerator=1.5, granularity="row"),
        activation=None,
        product="dequantized",
        gradient="lsq",
    )


def tequila() -> QuantSpec:
    """As `group128` with halves away from zero and activations in 16 bit, and with a bias from the
    weights D whose code is 0: y = linear(x, ŵ) + bias + .001 Σ_D w. A weight in D so gets the
    gradient of ŵ, straight through, plus .001 Σ_T grad.

    Source: arXiv:2509.23809 (Tequila); groups and .001 from its training script.
    """
    return QuantSpec(
        weight=replace(_grouped(128).weight, rounding="half_away"),
        activation=None,
        product="dequantized",
        deadzone_bias=1e-3,
    )


def sherry() -> QuantSpec:
    """Of each 4 consecutive inputs the smallest |w| (the first of equals) has code 0, the others
    sign(w), +1 for 0; s = mean of those others' |w| over 128 columns of a row, ŵ = s · code.
    Activations stay in 16 bit. Training: y = linear(x, ŵ) + bias + ε x wᵀ, ε from 0 to 1 and
    back to 0 (`transition.residual`).

    Source: arXiv:2601.07892 (Sherry: 3:4 sparsity, sparse absmean, Arenas); groups and ε from its
    training script and code.
    """
    part = CodeSpec(
        measure="sparse_absmean",
        granularity="group",
        group_size=128,
        eps_enters="step",  # nothing is divided by s, so that zeros stay zeros
        statistics="fp64",
    )
    return QuantSpec(weight=part, activation=None, product="dequantized", residual=1.0)


def _grouped(size: int) -> QuantSpec:
    return QuantSpec(
        weight=replace(ABSMEAN, granularity="group", group_size=size),
        activation=INT8_ROWS,
        product="dequantized",
    )


def _multi_bit(bits: int) -> QuantSpec:
    return QuantSpec(
        weight=with_bits(replace(ABSMEAN, granularity="row"), bits), activation=INT8_ROWS
    )


def with_bits(part: CodeSpec, bits: int) -> CodeSpec:
    """`part` with `bits`-bit two's complement codes and a step that suits its measure.

    absmax reaches the largest positive code (n = 2^(bits−1) − 1; 1 bit more than ternary would
    waste its lowest code); absmean takes the step of least error for Gaussian weights, and
    absmedian the same step through the Gaussian's ratio of median to mean, .8453.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if part.measure == "absmax":
        numerator = float(high)
    elif part.measure in ("twn", "sparse_absmean", "learned"):
        raise ConfigError(f"weight_scale={part.measure!r} is ternary: leave weight_bits out")
    else:
        numerator = (1.0 if part.measure == "absmean" else 0.8453) / _LEAST_ERROR_STEP[bits]
    return replace(part, numerator=numerator, code_min=low, code_max=high)


PRESETS: dict[str, Callable[[], QuantSpec]] = {
    make.__name__: make
    for make in (
        b158,
        hf,
        onebit,
        torchao,
        sdu,
        absmedian,
        trilm,
        twn,
        stochastic,
        weight_only,
        group64,
        group128,
        group256,
        int2,
        int3,
        int4,
        quest,
        paretoq,
        tequila,
        sherry,
    )
}


def preset(name: str) -> QuantSpec:
    """The named specification. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"quantizer preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]()
