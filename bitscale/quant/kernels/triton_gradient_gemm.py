"""The backward matrix products in integers: a gradient's bytes times int8 codes.

T tokens, D inputs, F outputs; M rows and N columns of a product, K what it sums, n bytes.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels import plain_backward
from bitscale.quant.kernels.tiles import Tile, gradient_bytes_tile
from bitscale.quant.kernels.triton_common import LAUNCH, rows_of
from bitscale.quant.kernels.triton_gemm import add_in_halves, store_tile, tile_of_program
from bitscale.quant.kernels.triton_gradient import (
    GradientBytes,
    feature_bytes,
    token_bytes,
    transposed,
)
from bitscale.quant.reference import Int8Rows, Ternary

TWO_TO_24 = tl.constexpr(16777216.0)


def input_grad(grad_TF: Tensor, weight: Ternary, bits: int, tile: Tile | None = None) -> Tensor:
    """Twin of `plain_backward.input_grad` with bits."""
    g_TF, w_FD = rows_of(grad_TF), rows_of(weight.codes_FD)
    T, D = g_TF.shape[0], w_FD.shape[1]
    grad_TD = g_TF.new_empty((T, D))
    if T:
        _multiply(
            token_bytes(g_TF, bits), transposed(w_FD), weight.scale, grad_TD,
            accumulate=False, tile=tile,
        )  # fmt: skip
    return grad_TD.view(*grad_TF.shape[:-1], D)


def weight_grad(
    grad_TF: Tensor,
    x: Int8Rows,
    dtype: torch.dtype,
    main_grad_FD: Tensor | None,
    bits: int,
    tile: Tile | None = None,
) -> Tensor:
    """Twin of `plain_backward.weight_grad` with bits."""
    g_TF, x_TD, r_T = rows_of(grad_TF), rows_of(x.codes_TD), x.scale_T1.flatten()
    (T, F), D, chunk = g_TF.shape, x_TD.shape[1], plain_backward.CHUNK_TOKENS
    if main_grad_FD is not None:
        assert main_grad_FD.dtype == torch.float32 and main_grad_FD.is_contiguous()
    if 0 < T <= chunk:  # one product, which adds to main_grad or rounds to `dtype` itself
        accumulate = main_grad_FD is not None
        grad_FD = g_TF.new_empty((F, D), dtype=dtype) if main_grad_FD is None else main_grad_FD
        _add_chunk(g_TF, x_TD, r_T, grad_FD, bits, accumulate=accumulate, tile=tile)
        return grad_FD
    # Chunks are added up in fp32 first: the sum of sums of the specification.
    grad_FD = g_TF.new_zeros((F, D), dtype=torch.float32)
    for first in range(0, T, chunk):
        g_part, x_part, r_part = (t[first : first + chunk] for t in (g_TF, x_TD, r_T))
        _add_chunk(g_part, x_part, r_part, grad_FD, bits, accumulate=True, tile=tile)
    return grad_FD.to(dtype) if main_grad_FD is None else main_grad_FD.add_(grad_FD)


def _add_chunk(
    g_TF: Tensor,
    x_TD: Tensor,
    r_T: Tensor,
    grad_FD: Tensor,
    bits: int,
    *,
    accumulate: bool,
    tile: Tile | None,
) -> None:
    gradient = feature_bytes(g_TF, r_T, bits)
    _multiply(gradient, transposed(x_TD), None, grad_FD, accumulate=accumulate, tile=tile)


def _multiply(
    gradient: GradientBytes,
    codes_NK: Tensor,
    scale: Tensor | None,
    out_MN: Tensor,
    *,
    accumulate: bool,
    tile: Tile | None,
) -> None:
    (M, N), (num_bytes, _, K) = out_MN.shape, gradient.bytes_nRK.shape
    tile = tile or gradient_bytes_tile(M, N, num_bytes)
    grid = (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)
    multiply_bytes[grid](
        gradient.bytes_nRK, codes_NK, gradient.step_R, scale, out_MN,
        M, N, K, gradient.bytes_nRK.stride(0),
        NUM_BYTES=num_bytes, ACCUMULATE=accumulate, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, GROUP_M=tile.group_m, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **LAUNCH,
    )  # fmt: skip


@triton.jit
def carry(high, low):
    """(h, l) with 256 h + l = 256 · high + low and l in [0, 256)."""
    return high + (low >> 8), low & 255


@triton.jit
def combine(sums_0, sums_1, sums_2, NUM_BYTES: tl.constexpr):
    """Σ sums_i · 256^(n−1−i), rounded to fp32 once.

    |sums| <= 2^30 (65,536 · 128 · 128, or F · 128), so that a sum plus the carry of another, at
    most 2^23, is an int32. The carries make of the whole Z = 2^24 · high + low, 0 <= low < 2^24;
    |Z| < 2^39 with 2 bytes and 2^47 with 3, so |high| < 2^24. Integers up to 2^24 are fp32 numbers,
    and so is 2^24 · high: the only rounding is that of their sum.
    """
    if NUM_BYTES == 1:
        total = sums_0.to(tl.float32)
    else:
        if NUM_BYTES == 2:
            high, low = carry(sums_0, sums_1)
            high, low = high >> 16, ((high & 0xFFFF) << 8) | low
        else:
            middle, low = carry(sums_1, sums_2)
            high, middle = carry(sums_0, middle)
            high, low = high >> 8, ((high & 0xFF) << 16) | (middle << 8) | low
        total = high.to(tl.float32) * TWO_TO_24 + low.to(tl.float32)
    return total


@triton.jit
def multiply_bytes(
    a_nMK, b_NK, step_M, scale, out_MN, M, N, K, plane,
    NUM_BYTES: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out = (Σ_i 256^(n−1−i) a_i @ bᵀ) · step · scale, or out += that; `scale` may be None.

    Every tile lies within the padded operands. The bytes share a tile of b.
    """
    block_m, block_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    k = tl.arange(0, BLOCK_K)
    a_offsets = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    b_offsets = tl.arange(0, BLOCK_N)[None, :] * K + k[:, None]
    a = a_nMK + first_m.to(tl.int64) * K
    b = b_NK + first_n.to(tl.int64) * K
    if scale is not None:
        s = tl.load(scale)  # before the loop, as in `forward`
    sums_0 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    sums_1, sums_2 = sums_0, sums_0
    for _ in range(0, K, BLOCK_K):
        b_tile = tl.load(b + b_offsets)
        sums_0 = tl.dot(tl.load(a + a_offsets), b_tile, sums_0, out_dtype=tl.int32)
        if NUM_BYTES > 1:
            a_1 = a + tl.cast(plane, tl.int64)
            sums_1 = tl.dot(tl.load(a_1 + a_offsets), b_tile, sums_1, out_dtype=tl.int32)
        if NUM_BYTES > 2:
            a_2 = a + 2 * tl.cast(plane, tl.int64)
            sums_2 = tl.dot(tl.load(a_2 + a_offsets), b_tile, sums_2, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    step = tl.load(step_M + m, mask=m < M, other=0.0)
    y = combine(sums_0, sums_1, sums_2, NUM_BYTES) * step[:, None]
    if scale is not None:
        y *= s
    if ACCUMULATE:
        add_in_halves(y, out_MN, first_m, first_n, M, N, BLOCK_M, BLOCK_N)
    else:
        store_tile(y, out_MN, m, n, M, N)
