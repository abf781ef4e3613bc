"""What the Triton kernels share: rounding, dtype names, and how they are launched."""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# The compiler must not fuse a multiplication and an addition: codes and dequantized values are
# to be bit for bit those of plain PyTorch.
LAUNCH: Final[dict[str, Any]] = {"enable_fp_fusion": False}

TL_DTYPE: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 · 2^23: fp32 there has no fractions
INT8_MAX = tl.constexpr(127.0)


@triton.jit
def round_half_even(v):
    """Nearest integer of fp32 |v| < 2^22, ties to even. (The interpreter lacks rint.)"""
    return (v + ROUND_TO_INTEGER) - ROUND_TO_INTEGER


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """fp32 -> dtype, half to even. The interpreter's own cast to bf16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        v = tl.where(v == v, rounded, bits).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def as_operand(v, dtype: tl.constexpr):
    """int8 codes or fp32 as an operand of tl.dot, rounded to `dtype`.

    The interpreter multiplies the bits of bf16 operands: there, fp32 holds the rounded values.
    """
    if INTERPRETED:  # noqa: SIM108 - one expression must have one dtype
        v = round_to(v.to(tl.float32), dtype).to(tl.float32)
    else:
        v = v.to(dtype)
    return v


@triton.jit
def lerp(start, end, strength):
    """start + λ (end − start), exactly `end` at λ = 1 (as torch.lerp)."""
    difference = end - start
    from_start = start + strength * difference
    from_end = end - difference * (1.0 - strength)
    return tl.where(strength < 0.5, from_start, from_end)


def rows_of(x_TD: Tensor) -> Tensor:
    """[T, D] with leading dimensions flattened and stride 1 within a row; copies if it must."""
    x_TD = x_TD.detach().reshape(-1, x_TD.shape[-1])
    return x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous()
