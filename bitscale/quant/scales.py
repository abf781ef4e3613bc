"""Statistics of matrices and rows that are spread over the ranks of a group, exactly.

A scale belongs to a logical matrix, whatever part of it a rank holds: sums are exact in any order
(`exact_sum`) and medians are selected from added histograms, so that every layout computes the same
bits. One collective serves all the matrices of a step (absmedian: one for each byte of an element).

Shapes: F rows, D columns of a shard; M logical matrices in it; T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bitscale.quant.kernels.table import Measure
from bitscale.quant.quantizer import exact_sum
from bitscale.quant.reference import ACTIVATION_MAX, Int8Rows, Ternary

_DIGIT_BITS = 8
_NUM_DIGITS = 2**_DIGIT_BITS
_INFINITY_BITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


class Shard(NamedTuple):
    """This rank's part of one or more logical matrices."""

    weight_FD: Tensor
    matrix_F: Tensor | None = None  # int64: which of M matrices a row belongs to; None: of one
    num_matrices: int = 1


def group_scales(
    shards: Sequence[Shard], measure: Measure, eps: float, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """fp32 [M] of each shard: max(measure of |w| over the whole matrix, eps), on every rank.

    The shards are of one dtype and on one device; a collective over `group` (None: one rank).
    """
    if not shards:
        return []
    measures_M = _absmeans(shards, group) if measure == "absmean" else _absmedians(shards, group)
    # clamp() lets a NaN through, which must stay visible.
    scales_M = measures_M.float().clamp(min=eps)
    return list(torch.split(scales_M, [shard.num_matrices for shard in shards]))


def _absmeans(shards: Sequence[Shard], group: dist.ProcessGroup | None) -> Tensor:
    """fp64 means of |w|, [ΣM]."""
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for weight_FD, matrix_F, num_matrices in shards:
        sums_F = exact_sum(weight_FD.detach().abs()).squeeze(-1)
        counts_F = torch.full_like(sums_F, weight_FD.shape[1])
        for values_F, out in ((sums_F, sums), (counts_F, counts)):
            total_M = values_F.new_zeros(num_matrices)
            index_F = (
                torch.zeros_like(values_F, dtype=torch.int64) if matrix_F is None else matrix_F
            )
            out.append(total_M.index_add_(0, index_F, values_F))
    totals = torch.stack([torch.cat(sums), torch.cat(counts)])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals[0] / totals[1]


def _absmedians(shards: Sequence[Shard], group: dist.ProcessGroup | None) -> Tensor:
    """fp32 lower medians of |w|, [ΣM], digit by digit of the bit pattern, which orders |w|."""
    dtype = shards[0].weight_FD.dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    total_bits = 8 * shards[0].weight_FD.element_size()
    magnitudes, matrices, first = [], [], 0
    for weight_FD, matrix_F, num_matrices in shards:
        bits_FD = weight_FD.detach().abs().contiguous().view(integer).long()
        index_F = torch.zeros_like(bits_FD[:, 0]) if matrix_F is None else matrix_F
        magnitudes.append(bits_FD)
        matrices.append((index_F + first)[:, None].expand_as(bits_FD))
        first += num_matrices
    prefix_M = torch.zeros(first, dtype=torch.int64, device=magnitudes[0].device)
    rank_M = num_nans_M = None
    for shift in range(total_bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        # The last column counts NaNs, which lie above infinity.
        counts = torch.zeros(first * (_NUM_DIGITS + 1), dtype=torch.int64, device=prefix_M.device)
        for bits_FD, index_FD in zip(magnitudes, matrices, strict=True):
            is_counted = (bits_FD >> (shift + _DIGIT_BITS)) == prefix_M[index_FD]
            slot_FD = index_FD * (_NUM_DIGITS + 1)
            digit_FD = (bits_FD >> shift) & (_NUM_DIGITS - 1)
            counts.scatter_add_(0, (slot_FD + digit_FD).flatten(), is_counted.flatten().long())
            is_nan = bits_FD > _INFINITY_BITS[dtype]
            counts.scatter_add_(0, (slot_FD + _NUM_DIGITS).flatten(), is_nan.flatten().long())
        if group is not None:
            dist.all_reduce(counts, group=group)
        counts = counts.view(first, _NUM_DIGITS + 1)
        histogram, num_nans_M = counts[:, :_NUM_DIGITS], counts[:, _NUM_DIGITS]
        if rank_M is None:
            rank_M = (histogram.sum(dim=1) - 1) // 2
        below = histogram.cumsum(dim=1)
        digit_M = (below <= rank_M[:, None]).sum(dim=1)
        padded = torch.cat([torch.zeros_like(below[:, :1]), below], dim=1)
        rank_M = rank_M - padded.gather(1, digit_M[:, None]).squeeze(1)
        prefix_M = (prefix_M << _DIGIT_BITS) | digit_M
    assert num_nans_M is not None
    median_M = prefix_M.to(integer).view(dtype).float()
    return torch.where(num_nans_M > 0, torch.full_like(median_M, float("nan")), median_M)


def codes_at(w_FD: Tensor, scale: Tensor) -> Ternary:
    """Ternary codes of a shard at a known scale: a scalar, or one for each row, [F]."""
    step = scale[:, None] if scale.dim() else scale
    codes_FD = torch.round(w_FD.detach().float() / step).clamp_(-1, 1).to(torch.int8)
    return Ternary(codes_FD, scale)


def group_rows(x_TD: Tensor, eps: float, group: dist.ProcessGroup | None) -> Int8Rows:
    """Int8 codes of this rank's columns of each row, by the row's maximum over all ranks.

    The maximum is taken of bit patterns as integers, whose order is that of |x| with NaN above
    infinity: a collective's maximum of floating numbers may drop a NaN.
    """
    x_TD = x_TD.detach().float()
    peak_T1 = x_TD.abs().view(torch.int32).amax(dim=-1, keepdim=True)
    if group is not None:
        dist.all_reduce(peak_T1, op=dist.ReduceOp.MAX, group=group)
    peak_T1 = peak_T1.view(torch.float32).clamp(min=eps)
    scale_T1 = peak_T1 / peak_T1.new_full((), ACTIVATION_MAX)  # not by a number: quantizer.py
    codes_TD = torch.round(x_TD / scale_T1).clamp_(-128, ACTIVATION_MAX).to(torch.int8)
    return Int8Rows(codes_TD, scale_T1)
