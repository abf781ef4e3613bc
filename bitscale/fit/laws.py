"""The laws that can be fitted, each with its formula, its source, and what was assumed.

A law predicts a loss from columns of a table. Its free values are positive; the fit works on their
logarithms, with regressors divided by their geometric means, so that starts near 1 make sense.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]
Values = Mapping[str, float]


class Law(NamedTuple):
    """`predict(columns, values)` is the loss of every row."""

    name: str
    formula: str
    source: str
    columns: tuple[str, ...]  # regressors; those in `scaled` are divided by their geometric mean
    scaled: tuple[str, ...]
    # name -> (smallest, largest) start; the fit tries several points between
    starts: Mapping[str, tuple[float, float]]
    predict: Callable[[Columns, Values], Floats]
    # the values in terms of unscaled regressors, from scaled ones and the geometric means
    unscale: Callable[[Values, Values], dict[str, float]]
    response: str = "valid_loss"
    logarithmic: bool = True  # residuals of ln(loss), as in Chinchilla; False: of the loss
    assumed: str = ""  # where the exact form could not be read


def _chinchilla(c: Columns, v: Values) -> Floats:
    capacity = v["A"] * c["parameters"] ** -v["alpha"]
    data = v["B"] * c["tokens"] ** -v["beta"]
    loss: Floats = v["E"] + capacity + data
    return loss


def _chinchilla_unscaled(v: Values, means: Values) -> dict[str, float]:
    changed = {
        "A": v["A"] * means["parameters"] ** v["alpha"],
        "B": v["B"] * means["tokens"] ** v["beta"],
    }
    return {**v, **changed}


_CHINCHILLA_STARTS = {
    "E": (0.5, 3.0),
    "A": (0.1, 1.5),
    "B": (0.1, 1.5),
    "alpha": (0.2, 0.8),
    "beta": (0.2, 0.8),
}

CHINCHILLA = Law(
    name="chinchilla",
    formula="L = E + A / N^alpha + B / D^beta",
    source="arXiv:2203.15556 (Hoffmann et al.), approach 3",
    columns=("parameters", "tokens"),
    scaled=("parameters", "tokens"),
    starts=_CHINCHILLA_STARTS,
    predict=_chinchilla,
    unscale=_chinchilla_unscaled,
)


def effective_share(bits: Floats, gamma: float) -> Floats:
    """N_eff / N at `bits` a weight (arXiv:2411.04330, eq. 3, weights only)."""
    share: Floats = 1.0 - np.exp(-bits / gamma)
    return share


def _precision(c: Columns, v: Values) -> Floats:
    effective = c["parameters"] * effective_share(c["weight_bits"], v["gamma"])
    return _chinchilla({"parameters": effective, "tokens": c["tokens"]}, v)


PRECISION = Law(
    name="precision",
    formula="L = E + A / (N (1 - exp(-P / gamma)))^alpha + B / D^beta, P bits a weight",
    source="arXiv:2411.04330 (Kumar et al.), quantized training, weights only",
    columns=("parameters", "tokens", "weight_bits"),
    scaled=("parameters", "tokens"),
    starts={**_CHINCHILLA_STARTS, "gamma": (0.5, 3.0)},
    predict=_precision,
    unscale=_chinchilla_unscaled,
    assumed="activations and the key/value cache count as unquantized; ternary is P = log2 3",
)


def _floating_point(c: Columns, v: Values) -> Floats:
    penalty = c["tokens"] ** v["beta"] / c["parameters"] ** v["alpha"]
    penalty = penalty * np.log2(c["block_size"]) * v["k"]
    widths = (c["exponent_bits"] + 0.5) ** v["delta"] * (c["mantissa_bits"] + 0.5) ** v["nu"]
    loss: Floats = _chinchilla(c, v) + penalty / widths
    return loss


def _floating_point_unscaled(v: Values, means: Values) -> dict[str, float]:
    scale = means["parameters"] ** v["alpha"] / means["tokens"] ** v["beta"]
    return {**_chinchilla_unscaled(v, means), "k": v["k"] * scale}


FLOATING_POINT = Law(
    name="floating-point",
    formula="L = E + A / N^alpha + B / D^beta + k D^beta / N^alpha "
    "log2(block) / ((e + 1/2)^delta (m + 1/2)^nu), e and m bits of exponent and mantissa",
    source="arXiv:2501.02423 (Sun et al.), unified law",
    columns=("parameters", "tokens", "exponent_bits", "mantissa_bits", "block_size"),
    scaled=("parameters", "tokens"),
    starts={**_CHINCHILLA_STARTS, "k": (0.003, 0.1), "delta": (0.5, 3.0), "nu": (0.5, 3.0)},
    predict=_floating_point,
    unscale=_floating_point_unscaled,
    assumed="read in a summary of the paper, where the constant stands as an exponent of the block "
    "size inside the logarithm: the same factor, here k",
)


def _qid(c: Columns, v: Values) -> Floats:
    loss: Floats = (
        v["k"]
        * c["tokens"] ** v["beta"]
        / (c["parameters"] ** v["alpha"] * c["weight_bits"] ** v["gamma"])
    )
    return loss


def _qid_unscaled(v: Values, means: Values) -> dict[str, float]:
    scale = means["parameters"] ** v["alpha"] / means["tokens"] ** v["beta"]
    return {**v, "k": v["k"] * scale * means.get("weight_bits", 1.0) ** v["gamma"]}


QID = Law(
    name="qid",
    formula="L(quantized) - L(16 bit) = k D^beta / (N^alpha P^gamma)",
    source="arXiv:2411.17691 (Ouyang et al.), unified law",
    columns=("parameters", "tokens", "weight_bits"),
    scaled=("parameters", "tokens", "weight_bits"),
    starts={"k": (0.03, 0.5), "alpha": (0.1, 1.0), "beta": (0.1, 1.0), "gamma": (0.5, 5.0)},
    predict=_qid,
    unscale=_qid_unscaled,
    response="qid",
    logarithmic=False,
    assumed="the paper quantizes after training; here the difference is between a model trained in "
    "ternary and its 16-bit twin of the same tokens and seed",
)


def _qat_loss(c: Columns, v: Values) -> Floats:
    loss: Floats = (
        v["E"]
        + v["B"] * c["tokens"] ** -v["beta"]
        + v["phi"] * c["s_qat"] ** -v["omega"]
        + v["lambda"] * c["s_fp"] ** -v["xi"] * c["s_qat"] ** -v["rho"]
    )
    return loss


def _qat_loss_unscaled(v: Values, means: Values) -> dict[str, float]:
    cross = means["s_fp"] ** v["xi"] * means["s_qat"] ** v["rho"]
    changed = {
        "B": v["B"] * means["tokens"] ** v["beta"],
        "phi": v["phi"] * means["s_qat"] ** v["omega"],
        "lambda": v["lambda"] * cross,
    }
    return {**v, **changed}


QAT_LOSS = Law(
    name="qat-loss",
    formula="L = E + B / D^beta + phi / S_qat^omega + lambda / (S_fp^xi S_qat^rho), "
    "S = tokens of a phase / (N P / 8)",
    source="arXiv:2509.22935 (Dremov et al.), loss law",
    columns=("tokens", "s_qat", "s_fp"),
    scaled=("tokens", "s_qat", "s_fp"),
    starts={
        "E": (1.0, 3.0),
        "B": (0.1, 1.0),
        "beta": (0.2, 0.8),
        "phi": (0.02, 0.3),
        "omega": (0.3, 1.0),
        "lambda": (0.02, 0.3),
        "xi": (0.3, 1.0),
        "rho": (0.3, 1.0),
    },
    predict=_qat_loss,
    unscale=_qat_loss_unscaled,
    assumed="read in a summary of the paper; at one model size and bit width, so that factors in N "
    "and P are part of E, phi and lambda",
)

LAWS = {law.name: law for law in (CHINCHILLA, PRECISION, FLOATING_POINT, QID, QAT_LOSS)}
