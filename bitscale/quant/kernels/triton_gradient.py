"""Gradients as signed bytes, and int8 matrices transposed: operands of the integer products.

Hopper's int8 tensor cores take operands only with the summed dimension contiguous. For dX that is
F: the gradient lies that way and the codes of the weight are transposed. For dW it is T: the kernel
that rounds the gradient writes it transposed (to transpose its bytes afterwards would move 2·n·T·F
bytes more), and the codes of x are transposed.

All are written into matrices of whole tiles, so that a product loads without masks: a row is zero
past its end, and rows past the last are left as they are.

T tokens, D inputs, F outputs. The formulas are those of `plain_backward.py`.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels import plain_backward
from bitscale.quant.kernels.triton_activation import magnitude_bits
from bitscale.quant.kernels.triton_common import LAUNCH, rows_of

_ROW_PADDING, _SUM_PADDING = 256, 128  # multiples of every tile's sides (tiles.py)
_ROW_BLOCK = 4096
_PEAK_TILE, _PEAK_STEPS = (32, 128), 8  # tokens, features; tiles of a program, along the tokens
_BYTES_TILE = (128, 64)
_TRANSPOSE_TILE = 128

SMALLEST_PEAK = tl.constexpr(plain_backward.SMALLEST_PEAK)
# Of the golden ratio, and murmur3's: those of `plain_backward.hash_noise`.
HASH_POSITION = tl.constexpr(0x9E3779B1)
HASH_FIRST = tl.constexpr(0x85EBCA6B)
HASH_SECOND = tl.constexpr(0xC2B2AE35)
TWO_TO_23 = tl.constexpr(8388608.0)  # fp32 from there to 2^24 has no fractions


class GradientBytes(NamedTuple):
    """A rounded gradient, R its rows (what shares a step), K what the product sums."""

    bytes_nRK: Tensor  # int8, most significant first, R and K padded
    step_R: Tensor  # fp32, not padded


def token_bytes(grad_TF: Tensor, bits: int) -> GradientBytes:
    """`plain_backward.quantize_gradient` of each token, for dX: R = T, K = F."""
    g_TF = rows_of(grad_TF)
    T, F = g_TF.shape
    bytes_nTF = _padded(g_TF, T, F, bits // 8)
    step_T = torch.empty(T, dtype=torch.float32, device=g_TF.device)
    row_to_bytes[(T,)](
        g_TF, bytes_nTF, step_T, F, g_TF.stride(0), *bytes_nTF.stride()[:2],
        LIMIT=_limit(bits), NUM_BYTES=bits // 8, BLOCK=_ROW_BLOCK, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return GradientBytes(bytes_nTF, step_T)


def feature_bytes(g_TF: Tensor, r_T1: Tensor, bits: int) -> GradientBytes:
    """`quantize_gradient` of each feature of g · r, for dW: R = F, K = T. g with stride 1."""
    T, F = g_TF.shape
    bytes_nFT = _padded(g_TF, F, T, bits // 8)
    step_F = torch.empty(F, dtype=torch.float32, device=g_TF.device)
    peaks_F = torch.zeros(F, dtype=torch.int32, device=g_TF.device)
    tokens, features = _PEAK_TILE
    feature_peaks[(triton.cdiv(T, tokens * _PEAK_STEPS), triton.cdiv(F, features))](
        g_TF, r_T1, peaks_F, T, F, g_TF.stride(0),
        BLOCK_T=tokens, BLOCK_F=features, STEPS=_PEAK_STEPS, num_warps=8, **LAUNCH,
    )  # fmt: skip
    tokens, features = _BYTES_TILE
    features_to_bytes[(bytes_nFT.shape[2] // tokens, triton.cdiv(F, features))](
        g_TF, r_T1, peaks_F, bytes_nFT, step_F, T, F, g_TF.stride(0), *bytes_nFT.stride()[:2],
        LIMIT=_limit(bits), NUM_BYTES=bits // 8, BLOCK_T=tokens, BLOCK_F=features,
        num_warps=8, **LAUNCH,
    )  # fmt: skip
    return GradientBytes(bytes_nFT, step_F)


def transposed(codes_RC: Tensor) -> Tensor:
    """int8 [C, R] of an int8 [R, C] with stride 1 in a row, padded."""
    R, C = codes_RC.shape
    out_CR = _padded(codes_RC, C, R, 1)[0]
    side = _TRANSPOSE_TILE
    transpose_bytes[(out_CR.shape[1] // side, triton.cdiv(C, side))](
        codes_RC, out_CR, R, C, codes_RC.stride(0), out_CR.stride(0),
        BLOCK=side, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return out_CR


def _padded(like: Tensor, rows: int, columns: int, num_bytes: int) -> Tensor:
    shape = (num_bytes, _up(rows, _ROW_PADDING), _up(columns, _SUM_PADDING))
    return torch.empty(shape, dtype=torch.int8, device=like.device)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _limit(bits: int) -> float:
    return float(127 * 256 ** (bits // 8 - 1))


@triton.jit
def gradient_step(peak_bits, LIMIT: tl.constexpr):
    """fp32 max(peak, 1e-30) / L; a NaN is not below 1e-30."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    peak = tl.where(peak < SMALLEST_PEAK, SMALLEST_PEAK, peak)
    return tl.div_rn(peak, tl.zeros_like(peak) + LIMIT)


@triton.jit
def hash_noise(g, position):
    """u in [0, 1), of fp32 g's bits and its position (modulo 2^32)."""
    word = g.to(tl.uint32, bitcast=True) ^ (position * tl.cast(HASH_POSITION, tl.uint32))
    word = (word ^ (word >> 16)) * tl.cast(HASH_FIRST, tl.uint32)
    word = (word ^ (word >> 13)) * tl.cast(HASH_SECOND, tl.uint32)
    word = word ^ (word >> 16)
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def floor(v):
    """Of fp32 |v| < 2^31. (tl.floor makes 0 of a negative denormal, by cvt.rmi.ftz.)"""
    whole = v.to(tl.int32).to(tl.float32)
    return tl.where(whole > v, whole - 1.0, whole)


@triton.jit
def gradient_code(g, step, position, LIMIT: tl.constexpr, NUM_BYTES: tl.constexpr):
    """int32 clip(g / step, rounded, −L, L), 0 where that is NaN; 8 bits round stochastically."""
    scaled = tl.div_rn(g, tl.zeros_like(g) + step)
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    if NUM_BYTES == 1:
        rounded = floor(scaled + hash_noise(g, position))
    else:
        # Half to even, as |scaled| < 2^23.
        magnitude = (tl.abs(scaled) + TWO_TO_23) - TWO_TO_23
        rounded = tl.where(scaled < 0.0, -magnitude, magnitude)
    return tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT).to(tl.int32)


@triton.jit
def store_bytes(code, target, plane, inside, NUM_BYTES: tl.constexpr):
    """code = Σ byte_i · 256^(n−1−i), byte_i to the i-th plane."""
    for low_first in tl.static_range(NUM_BYTES - 1):
        low = ((code + 128) & 255) - 128
        byte = target + (NUM_BYTES - 1 - low_first) * tl.cast(plane, tl.int64)
        tl.store(byte, low.to(tl.int8), mask=inside)
        code = (code - low) >> 8
    tl.store(target, code.to(tl.int8), mask=inside)


@triton.jit
def row_to_bytes(
    g_TF, bytes_nTF, step_T, F, g_stride, plane, stride,
    LIMIT: tl.constexpr, NUM_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bytes and step of one row, read twice: the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    g_F = g_TF + row * g_stride
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, F, BLOCK):
        f = first + tl.arange(0, BLOCK)
        g = tl.load(g_F + f, mask=f < F, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(g))
    step = gradient_step(tl.max(largest), LIMIT)
    tl.store(step_T + row, step)
    position = row.to(tl.uint32) * tl.cast(F, tl.uint32)
    for first in range(0, stride, BLOCK):
        f = first + tl.arange(0, BLOCK)
        g = tl.load(g_F + f, mask=f < F, other=0.0).to(tl.float32)
        code = gradient_code(g, step, position + f.to(tl.uint32), LIMIT, NUM_BYTES)
        store_bytes(code, bytes_nTF + row * stride + f, plane, f < stride, NUM_BYTES)


@triton.jit
def scaled_tile(g_TF, r_T, t, f, T, F, g_stride):
    """fp32 g · r, zero outside."""
    inside = (t < T)[:, None] & (f < F)[None, :]
    g = tl.load(g_TF + t.to(tl.int64)[:, None] * g_stride + f[None, :], mask=inside, other=0.0)
    return g.to(tl.float32) * tl.load(r_T + t, mask=t < T, other=0.0)[:, None]


@triton.jit
def feature_peaks(
    g_TF, r_T, peaks_F, T, F, g_stride,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """peaks = max(peaks, bits of |g · r|): integers, whose largest does not depend on an order."""
    first = tl.program_id(0) * (BLOCK_T * STEPS)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    largest = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.int32)
    for start in range(first, tl.minimum(first + BLOCK_T * STEPS, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        bits = magnitude_bits(scaled_tile(g_TF, r_T, t, f, T, F, g_stride))
        largest = tl.maximum(largest, bits)
    tl.atomic_max(peaks_F + f, tl.max(largest, axis=0), mask=f < F, sem="relaxed")


@triton.jit
def features_to_bytes(
    g_TF, r_T, peaks_F, bytes_nFT, step_F, T, F, g_stride, plane, stride,
    LIMIT: tl.constexpr, NUM_BYTES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Bytes and steps of the columns of g · r, written as rows."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    step = gradient_step(tl.load(peaks_F + f, mask=f < F, other=0), LIMIT)
    if tl.program_id(0) == 0:
        tl.store(step_F + f, step, mask=f < F)
    g = scaled_tile(g_TF, r_T, t, f, T, F, g_stride)
    position = t.to(tl.uint32)[:, None] * tl.cast(F, tl.uint32) + f.to(tl.uint32)[None, :]
    code = gradient_code(g, step[None, :], position, LIMIT, NUM_BYTES)
    target = bytes_nFT + f.to(tl.int64)[:, None] * stride + t[None, :]
    store_bytes(tl.trans(code), target, plane, (f < F)[:, None], NUM_BYTES)


@triton.jit
def transpose_bytes(in_RC, out_CR, R, C, in_stride, out_stride, BLOCK: tl.constexpr):
    """A square tile of out[c, r] = in[r, c], zero for rows r past the end."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < R)[:, None] & (c < C)[None, :]
    source = in_RC + r.to(tl.int64)[:, None] * in_stride + c[None, :]
    tile = tl.load(source, mask=inside, other=0)
    target = out_CR + c.to(tl.int64)[:, None] * out_stride + r[None, :]
    tl.store(target, tl.trans(tile), mask=(c < C)[:, None])
