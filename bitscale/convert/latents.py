"""Latent weights that quantize to given codes and a given scale, to the bit.

Shapes: F outputs, D inputs.

Dequantized weights s · code do not: the mean of their magnitudes is s times the share of codes
that are not 0, so absmean finds .69 s for Gaussian weights. Training that starts from them would
begin with every output shrunk. Here magnitudes are s / share instead, whose mean is s.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bitscale.config.spec import CodeSpec, QuantSpec
from bitscale.convert.model_source import dequantized
from bitscale.errors import CheckpointError
from bitscale.quant.quantizer import quantize, step
from bitscale.quant.reference import Ternary

_MAX_ULPS = 16  # how far from s the mean may be aimed, where a measure rounds its own sums
_NUM_REMAINDERS = 4  # weights of code 0 that make up for rounding
_GRID = 2.0**-30  # of the exact sum that absmean is taken with (quant/quantizer.py)
_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7}


def latents_of_codes(ternary: Ternary, spec: QuantSpec, dtype: torch.dtype, name: str) -> Tensor:
    """[F, D] in `dtype`, of which `spec` makes exactly these codes and this scale.

    Raises CheckpointError, naming the matrix, if the spec's scale cannot be that of any weights
    with these codes (or has no such weights here: learned and group scales).
    """
    if spec.weight.granularity == "matrix" and spec.weight.measure != "learned":
        for latent_FD in _candidates(ternary, spec.weight, dtype):
            again = quantize(latent_FD, spec.weight)
            same_scale = step(again, spec.weight) == ternary.scale
            if same_scale and torch.equal(again.codes, ternary.codes_FD):
                return latent_FD
    raise CheckpointError(
        f"{name}: no weights were found of which {spec.weight.measure} scales (a scale per "
        f"{spec.weight.granularity}) make these codes and this scale again; start from the "
        "training checkpoint, or with another quant.preset"
    )


def _candidates(ternary: Ternary, part: CodeSpec, dtype: torch.dtype) -> Iterator[Tensor]:
    # Scales by median or maximum, or by the mean of what is not 0.
    yield dequantized(ternary, dtype)
    scale = float(ternary.scale)
    if part.eps_enters == "added":
        scale = max(scale - part.eps, 0.0) or scale
    ulp = 2.0 ** (math.floor(math.log2(scale)) - 23)
    for i in range(2 * _MAX_ULPS + 1):  # 0, 1, -1, 2, -2, ...
        offset = (i + 1) // 2 * (1 if i % 2 else -1)
        for counts_zeros in (True, False):
            yield _spread(ternary.codes_FD, scale + offset * ulp, dtype, counts_zeros)


def _spread(codes_FD: Tensor, mean: float, dtype: torch.dtype, counts_zeros: bool) -> Tensor:
    """Weights with these codes whose magnitudes have this mean, each a number of `dtype`: the
    mean of all (absmean), or of those whose code is not 0 (twn).

    All nonzero ones are one of two neighbours in `dtype`; what then still lacks, less than their
    distance, goes to weights whose code is 0 and stay far below half of the mean.
    """
    flat = codes_FD.flatten()
    nonzero = flat.nonzero().flatten()
    weights = torch.zeros(flat.numel(), dtype=torch.float64)
    if nonzero.numel():
        total = mean * (flat if counts_zeros else nonzero).numel()
        each = total / nonzero.numel()
        grid = max(2.0 ** (math.floor(math.log2(each)) - _MANTISSA_BITS[dtype]), _GRID)
        low = math.floor(each / grid) * grid
        num_high = int((total - low * nonzero.numel()) / grid)
        magnitudes = torch.full((nonzero.numel(),), low, dtype=torch.float64)
        magnitudes[:num_high] += grid
        weights[nonzero] = magnitudes * flat[nonzero]
        lacking = total - low * nonzero.numel() - grid * num_high
        for place in (flat == 0).nonzero().flatten()[: _NUM_REMAINDERS if counts_zeros else 0]:
            # Slightly less, so that rounding never takes more than there is.
            part = torch.tensor(lacking * (1 - 2.0**-7), dtype=torch.float64).to(dtype).double()
            weights[place] = part
            lacking -= float(part)
    return weights.to(dtype).view(codes_FD.shape)
