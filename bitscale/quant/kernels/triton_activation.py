"""Activations: one program a row. For codes it stays in registers between one read and one write.

T tokens, D inputs.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.errors import KernelUnavailable
from bitscale.quant.kernels.table import NormedRows
from bitscale.quant.kernels.triton_common import (
    INT8_MAX,
    LAUNCH,
    TL_DTYPE,
    lerp,
    round_half_even,
    round_to,
    rows_of,
)
from bitscale.quant.reference import Int8Rows

MAX_ROW = 32768  # elements that fit into one program's registers
_BLEND_BLOCK = 4096


def quantize_rows(x_TD: Tensor, eps: float) -> Int8Rows:
    """Twin of `plain.quantize_rows`."""
    codes_TD, scale_T1, _ = _launch_quantize(x_TD, None, None, eps)
    return Int8Rows(codes_TD, scale_T1)


def rms_norm_quantize_rows(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float
) -> NormedRows:
    """Twin of `plain.rms_norm_quantize_rows`."""
    codes_TD, scale_T1, rstd_T1 = _launch_quantize(x_TD, weight_D, norm_eps, eps)
    return NormedRows(codes_TD, scale_T1, rstd_T1)


def _launch_quantize(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(x_TD)
    T, D = rows.shape
    codes_TD = torch.empty(x_TD.shape, dtype=torch.int8, device=x_TD.device)
    scale_T1 = torch.empty((*x_TD.shape[:-1], 1), dtype=torch.float32, device=x_TD.device)
    rstd_T1 = scale_T1 if norm_eps is None else torch.empty_like(scale_T1)
    weight = rows if weight_D is None else weight_D.detach()  # never read if there is no weight
    if T:
        quantize_row[(T,)](
            rows, weight, codes_TD, scale_T1, rstd_T1, rows.stride(0), D, norm_eps or 0.0, eps,
            HAS_NORM=norm_eps is not None, HAS_WEIGHT=weight_D is not None,
            NORMED_DTYPE=TL_DTYPE[torch.promote_types(x_TD.dtype, weight.dtype)],
            **_row_options(D),
        )  # fmt: skip
    return codes_TD, scale_T1, rstd_T1


def blend_rows(x_TD: Tensor, eps: float, strength: float) -> Tensor:
    """Twin of `plain.blend_rows`."""
    rows = rows_of(x_TD)
    T, D = rows.shape
    blended_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if T:
        blend_row[(T,)](
            rows, blended_TD, rows.stride(0), D, eps, strength,
            BLOCK=_BLEND_BLOCK, num_warps=8, **LAUNCH,
        )  # fmt: skip
    return blended_TD


def _row_options(D: int) -> dict[str, int]:
    if D > MAX_ROW:
        raise KernelUnavailable(
            f"quant.kernel='triton' quantizes rows of at most {MAX_ROW} inputs and a layer has "
            f"{D}; split the matrix, or use 'reference'"
        )
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), **LAUNCH}


@triton.jit
def magnitude_bits(h):
    """int32 that orders fp32 |h| by size, with NaN above infinity: a NaN cannot get lost."""
    return h.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of_peak(peak_bits, eps):
    """fp32 max(max|h|, eps) / 127."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak < eps, eps, peak), INT8_MAX)


@triton.jit
def row_codes(h, scale):
    """clip(round(h / scale), −128, 127) as fp32; 0 where that is NaN."""
    quotient = tl.div_rn(h, tl.zeros_like(h) + scale)
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    return round_half_even(tl.minimum(tl.maximum(quotient, -128.0), INT8_MAX))


@triton.jit
def quantize_row(
    x_TD, weight_D, codes_TD, scale_T, rstd_T, x_stride, D, norm_eps, eps,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, NORMED_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """codes and scale of one row, after RMSNorm if HAS_NORM."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_TD + row * x_stride + d, mask=d < D, other=0.0)
    h = x.to(tl.float32)
    if HAS_NORM:
        mean_square = tl.div_rn(tl.sum(h * h), tl.cast(D, tl.float32))
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + norm_eps))
        tl.store(rstd_T + row, rstd)
        # Rounded where the unfused norm rounds, so that both give the same codes.
        h = round_to(h * rstd, x.dtype).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)
            h = round_to(h * weight, NORMED_DTYPE).to(tl.float32)
    scale = scale_of_peak(tl.max(magnitude_bits(h)), eps)
    tl.store(scale_T + row, scale)
    tl.store(codes_TD + row * D + d, row_codes(h, scale).to(tl.int8), mask=d < D)


@triton.jit
def blend_row(x_TD, blended_TD, x_stride, D, eps, strength, BLOCK: tl.constexpr):
    """x + λ (r · code − x) of one row, read twice: the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    x_D, blended_D = x_TD + row * x_stride, blended_TD + row * D
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(x_D + d, mask=d < D, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(x))
    scale = scale_of_peak(tl.max(largest), eps)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(x_D + d, mask=d < D, other=0.0).to(tl.float32)
        blended = lerp(x, row_codes(x, scale) * scale, strength)
        tl.store(blended_D + d, round_to(blended, blended_TD.dtype.element_ty), mask=d < D)
