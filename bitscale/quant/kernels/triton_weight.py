"""Weights, once per optimizer step: ternary codes, or the blend for λ < 1.

N elements of a logical matrix.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels.table import Measure
from bitscale.quant.kernels.triton_common import LAUNCH, lerp, round_to
from bitscale.quant.kernels.triton_scale import weight_scale
from bitscale.quant.reference import Ternary

_BLOCK = 4096


def ternarize(w_FD: Tensor, measure: Measure, eps: float) -> Ternary:
    """Twin of `plain.ternarize`."""
    w_FD = w_FD.detach().contiguous()
    scale = weight_scale(w_FD, measure, eps)
    codes_FD = torch.empty_like(w_FD, dtype=torch.int8)
    grid = (triton.cdiv(w_FD.numel(), _BLOCK),)
    ternary_codes[grid](w_FD, scale, codes_FD, w_FD.numel(), BLOCK=_BLOCK, num_warps=8, **LAUNCH)
    return Ternary(codes_FD, scale)


def blend_weight(w_FD: Tensor, measure: Measure, eps: float, strength: float) -> Tensor:
    """Twin of `plain.blend_weight`."""
    w_FD = w_FD.detach().contiguous()
    scale = weight_scale(w_FD, measure, eps)
    blended_FD = torch.empty_like(w_FD)
    grid = (triton.cdiv(w_FD.numel(), _BLOCK),)
    blend_ternary[grid](
        w_FD, scale, blended_FD, w_FD.numel(), strength, BLOCK=_BLOCK, num_warps=8, **LAUNCH
    )
    return blended_FD


@triton.jit
def ternary_code(w, scale):
    """clip(round(w / scale), −1, 1) as fp32, without dividing; NaN and inf / inf give 0.

    With s = scale: 2|w| is exact, and if it exceeds s it is at least s + ulp(s), so the quotient is
    at least 1/2 + ulp(s) / 2s > 1/2 + 2^-25: above the midpoint from which fp32 rounds away from
    1/2. Otherwise it is at most 1/2, which rounds to 0.
    """
    magnitude_is_large = (2.0 * tl.abs(w)) > scale
    return tl.where(magnitude_is_large, tl.where(w < 0.0, -1.0, 1.0), 0.0)


@triton.jit
def ternary_codes(w_N, scale, codes_N, N, BLOCK: tl.constexpr):
    """int8 codes of w by the scalar at `scale`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(codes_N + n, ternary_code(w, tl.load(scale)).to(tl.int8), mask=n < N)


@triton.jit
def blend_ternary(w_N, scale, blended_N, N, strength, BLOCK: tl.constexpr):
    """w + λ (s · code − w)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_N + n, mask=n < N, other=0.0).to(tl.float32)
    s = tl.load(scale)
    blended = lerp(w, ternary_code(w, s) * s, strength)
    tl.store(blended_N + n, round_to(blended, blended_N.dtype.element_ty), mask=n < N)
