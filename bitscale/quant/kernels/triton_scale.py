"""The scale of a weight: mean or lower median of |w|, on the device, the same in every run.

N elements of a logical matrix; P programs. Sums are exact in any order;
the median is selected digit by digit of the bit pattern, which for |w| is in order of size.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels.table import Measure
from bitscale.quant.kernels.triton_common import LAUNCH
from bitscale.quant.quantizer import TO_GRID

_BLOCK = 2048  # elements at a time
_STEPS = 8  # blocks of a program
_SUM_BLOCK = 1024  # partial sums at a time
_BITS = 8  # of one digit
_COUNT_ROWS = 16  # programs' histograms at a time


def weight_scale(w_FD: Tensor, measure: Measure, eps: float) -> Tensor:
    """fp32 scalar: mean (summed in fp64) or lower median of |w|, at least eps; NaN surfaces."""
    w_N = w_FD.detach().contiguous().view(-1)
    return _absmean(w_N, eps) if measure == "absmean" else _absmedian(w_N, eps)


def _absmean(w_N: Tensor, eps: float) -> Tensor:
    num_programs = triton.cdiv(w_N.numel(), _BLOCK * _STEPS)
    partials_P = torch.empty(num_programs, dtype=torch.float64, device=w_N.device)
    scale = torch.empty((), dtype=torch.float32, device=w_N.device)
    abs_sum_partials[(num_programs,)](
        w_N, partials_P, w_N.numel(), BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8, **LAUNCH
    )
    mean_from_partials[(1,)](
        partials_P, scale, num_programs, w_N.numel(), eps, BLOCK=_SUM_BLOCK, num_warps=8, **LAUNCH
    )
    return scale


def _absmedian(w_N: Tensor, eps: float) -> Tensor:
    assert w_N.numel() < 2**31, "counts and ranks are int32"
    total_bits = 8 * w_N.element_size()
    bits_N = w_N.view(torch.int32 if total_bits == 32 else torch.int16)
    num_programs = triton.cdiv(w_N.numel(), _BLOCK * _STEPS)
    counts = torch.empty((num_programs, 2**_BITS), dtype=torch.int32, device=w_N.device)
    num_nans_P = torch.empty(num_programs, dtype=torch.int32, device=w_N.device)
    state = torch.empty(3, dtype=torch.int32, device=w_N.device)  # prefix, rank, NaNs
    scale = torch.empty((), dtype=torch.float32, device=w_N.device)
    for shift in range(total_bits - _BITS, -1, -_BITS):
        first, last = shift == total_bits - _BITS, shift == 0
        count_digits[(num_programs,)](
            bits_N, state, counts, num_nans_P, w_N.numel(),
            INFINITY=_INFINITY_BITS[w_N.dtype], SHIFT=shift, BITS=_BITS, FIRST=first,
            BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8, **LAUNCH,
        )  # fmt: skip
        select_digit[(1,)](
            counts, num_nans_P, state, w_N, scale, num_programs, w_N.numel(), eps,
            BITS=_BITS, FIRST=first, LAST=last, ROWS=_COUNT_ROWS, num_warps=8, **LAUNCH,
        )  # fmt: skip
    return scale


GRID = tl.constexpr(TO_GRID)
_INFINITY_BITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def abs_sum_partials(w_N, partials_P, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """partials[p] = Σ |w| over program p's BLOCK · STEPS elements, each rounded to a multiple of
    2^-30, so that no addition rounds (quantizer.py: exact_sum)."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * (BLOCK * STEPS)
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for step in range(STEPS):
        n = first + step * BLOCK + tl.arange(0, BLOCK)
        w = tl.load(w_N + n, mask=n < N, other=0.0)
        sums += tl.abs(w.to(tl.float32)).to(tl.float64) + GRID - GRID
    tl.store(partials_P + program, tl.sum(sums))


@triton.jit
def mean_from_partials(partials_P, scale, P, N, eps, BLOCK: tl.constexpr):
    """scale = max(Σ partials / N, eps); one program, so the order is fixed."""
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, P, BLOCK):
        p = first + tl.arange(0, BLOCK)
        sums += tl.load(partials_P + p, mask=p < P, other=0.0)
    mean = (tl.sum(sums) / tl.cast(N, tl.float64)).to(tl.float32)
    tl.store(scale, tl.where(mean < eps, eps, mean))  # a NaN is not below eps


@triton.jit
def count_digits(
    bits_N, state, counts, num_nans_P, N,
    INFINITY: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """counts[p] = histogram of one digit of |w| among those that share the digits found so far."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * (BLOCK * STEPS)
    histogram = tl.zeros((1 << BITS,), dtype=tl.int32)
    num_nans = 0
    if not FIRST:
        prefix = tl.load(state)
    for step in range(STEPS):
        n = first + step * BLOCK + tl.arange(0, BLOCK)
        magnitude = tl.load(bits_N + n, mask=n < N, other=0).to(tl.int32)
        magnitude &= 0x7FFFFFFF if INFINITY > 0xFFFF else 0x7FFF
        counted = n < N
        if FIRST:
            num_nans += tl.sum((magnitude > INFINITY).to(tl.int32))
        else:
            counted &= (magnitude >> (SHIFT + BITS)) == prefix
        digit = (magnitude >> SHIFT) & ((1 << BITS) - 1)
        histogram += tl.histogram(digit, 1 << BITS, mask=counted)
    tl.store(counts + (program << BITS) + tl.arange(0, 1 << BITS), histogram)
    if FIRST:
        tl.store(num_nans_P + program, num_nans)


@triton.jit
def select_digit(
    counts, num_nans_P, state, w_N, scale, P, N, eps,
    BITS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Append to the prefix the digit in which the wanted rank falls; the last digit is the scale.

    `w_N` is only there for its dtype.
    """
    digits = tl.arange(0, 1 << BITS)
    totals = tl.zeros((1 << BITS,), dtype=tl.int32)
    num_nans = 0
    for first in range(0, P, ROWS):
        p = first + tl.arange(0, ROWS)
        rows = tl.load(
            counts + (p[:, None] << BITS) + digits[None, :], mask=p[:, None] < P, other=0
        )
        totals += tl.sum(rows, axis=0)
        if FIRST:
            num_nans += tl.sum(tl.load(num_nans_P + p, mask=p < P, other=0))
    prefix, rank = 0, (N - 1) // 2  # the lower median
    if not FIRST:
        prefix, rank, num_nans = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    digit = tl.sum((tl.cumsum(totals, 0) <= rank).to(tl.int32))
    prefix = (prefix << BITS) | digit
    if LAST:
        dtype: tl.constexpr = w_N.dtype.element_ty
        if dtype == tl.float32:
            median = prefix.to(tl.float32, bitcast=True)
        else:
            median = prefix.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        median = tl.where(num_nans > 0, float("nan"), median)
        tl.store(scale, tl.where(median < eps, eps, median))
    else:
        tl.store(state, prefix)
        tl.store(state + 1, rank - tl.sum(tl.where(digits < digit, totals, 0)))
        tl.store(state + 2, num_nans)
