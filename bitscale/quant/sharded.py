"""Ternary codes of matrices that are spread over data-parallel ranks.

ZeRO-1 and 2 cut one flat tensor, in which the matrices lie one after the other, into a partition
for each rank, anywhere; ZeRO-3 cuts each matrix into equal shares. Each rank quantizes what it
has, and packed codes travel instead of 16-bit weights: 1.6 or 2 bits an element, and one fp64 sum a
matrix for its scale (absmean), which is exact in any order (`exact_sum`), so that codes and scales
are bitwise those of the whole matrix on one rank.

Shapes: M matrices; N elements of this rank's partition; R ranks; B bytes that a rank sends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bitscale.config import Packing
from bitscale.quant.kernels import cpu_rows
from bitscale.quant.pack import runs_in_c
from bitscale.quant.packed_matrix import PackedTernary, pack_piece, packed_bytes
from bitscale.quant.quantizer import exact_sum

# Elements that are quantized at a time: a rounded copy of each, and in PyTorch one of 8 bytes.
_CHUNK = {"cpu": 2**20, "cuda": 2**24}


class Piece(NamedTuple):
    """A flat range of one matrix that lies in one rank's partition."""

    matrix: int
    start: int  # in the flattened matrix
    numel: int
    rank: int
    place: int  # in the rank's partition
    byte: int = 0  # where its packed codes begin in what the rank sends
    num_bytes: int = 0  # of them

    def of(self, partition_N: Tensor) -> Tensor:
        """The piece's elements, [numel], of its rank's partition."""
        return partition_N[self.place : self.place + self.numel]


@dataclass(frozen=True)
class Partitioned:
    """How matrices are spread over the partitions of the ranks of `group`."""

    shapes: tuple[torch.Size, ...]
    counts_M: Tensor  # fp64 elements of each matrix, where the partition is
    pieces: tuple[Piece, ...]
    num_bytes: int  # that every rank sends: those of the rank with the most
    packing: Packing
    group: dist.ProcessGroup
    rank: int

    @property
    def num_ranks(self) -> int:
        return self.group.size()

    def own(self) -> list[Piece]:
        """What lies in this rank's partition; nothing, where it holds padding only."""
        return [piece for piece in self.pieces if piece.rank == self.rank]


def partitioned(
    shapes: Sequence[torch.Size],
    starts: Sequence[int],
    partition_size: int,
    group: dist.ProcessGroup,
    device: torch.device,
    packing: Packing,
) -> Partitioned:
    """Matrices of `shapes` that begin at `starts` of a flat tensor on `device`, cut every
    `partition_size` elements."""
    pieces = []
    for matrix, (shape, first) in enumerate(zip(shapes, starts, strict=True)):
        position, end = first, first + shape.numel()
        while position < end:
            rank, place = divmod(position, partition_size)
            numel = min(end - position, partition_size - place)
            pieces.append(Piece(matrix, position - first, numel, rank, place))
            position += numel
    return _laid_out(shapes, pieces, group, device, packing)


def partitioned_each(
    shapes: Sequence[torch.Size],
    places: Sequence[int],
    group: dist.ProcessGroup,
    device: torch.device,
    packing: Packing,
) -> Partitioned:
    """Matrices of `shapes`, each cut into equal shares, of which the last ranks' may be shorter or
    empty; the share of matrix i begins at `places[i]` of every rank's partition, on `device`."""
    pieces = []
    for matrix, (shape, place) in enumerate(zip(shapes, places, strict=True)):
        share = -(-shape.numel() // group.size())
        for rank in range(group.size()):
            numel = min(share, shape.numel() - rank * share)
            if numel > 0:
                pieces.append(Piece(matrix, rank * share, numel, rank, place))
    return _laid_out(shapes, pieces, group, device, packing)


def _laid_out(
    shapes: Sequence[torch.Size],
    pieces: Sequence[Piece],
    group: dist.ProcessGroup,
    device: torch.device,
    packing: Packing,
) -> Partitioned:
    """`pieces` with their places in what each rank sends."""
    placed, sent = [], [0] * group.size()
    for piece in pieces:
        num_bytes = packed_bytes(piece.numel, packing)
        placed.append(piece._replace(byte=sent[piece.rank], num_bytes=num_bytes))
        sent[piece.rank] += num_bytes
    counts_M = torch.tensor([shape.numel() for shape in shapes], dtype=torch.float64, device=device)
    return Partitioned(
        tuple(shapes), counts_M, tuple(placed), max(sent), packing, group, group.rank()
    )


def gather_codes(
    masters_N: Tensor,
    layout: Partitioned,
    dtype: torch.dtype,
    eps: float,
    scale_group: dist.ProcessGroup | None = None,
) -> list[PackedTernary]:
    """Codes and absmean scale of every matrix, on every rank (a collective).

    `masters_N` (this rank's partition, fp32 or rounded already) are rounded to `dtype`, in which
    the weights would be, before they are quantized. `scale_group`: tensor-parallel ranks, each
    with an equally laid out part of the same logical matrices; the scales are then those of the
    whole ones.
    """
    scales_M = _scales(masters_N, layout, dtype, eps, scale_group)
    sent_B = masters_N.new_empty(layout.num_bytes, dtype=torch.uint8)
    for piece in layout.own():
        codes = _codes_of(piece, masters_N, scales_M, dtype)
        pack_piece(codes, layout.packing, sent_B[piece.byte : piece.byte + piece.num_bytes])
    packed_RB = sent_B[None]
    if layout.num_ranks > 1:
        packed_RB = sent_B.new_empty((layout.num_ranks, layout.num_bytes))
        dist.all_gather_into_tensor(packed_RB.view(-1), sent_B, group=layout.group)
    pieces: list[list[Piece]] = [[] for _ in layout.shapes]
    for piece in layout.pieces:
        pieces[piece.matrix].append(piece)
    return [
        PackedTernary(
            tuple(packed_RB[p.rank : p.rank + n, p.byte : p.byte + p.num_bytes] for p, n in runs),
            tuple(n * p.numel for p, n in runs),
            shape,
            scale,
            layout.packing,
        )
        for runs, shape, scale in zip(
            (list(_runs(own)) for own in pieces), layout.shapes, scales_M.unbind(), strict=True
        )
    ]


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int]]:
    """The first of equal pieces of neighbouring ranks, and how many they are: they can be unpacked
    together."""
    first = 0
    for index, piece in enumerate(pieces, start=1):
        following = pieces[index] if index < len(pieces) else None
        next_one = (piece.rank + 1, piece.byte, piece.numel)
        if following is None or (following.rank, following.byte, following.numel) != next_one:
            yield pieces[first], index - first
            first = index


def gather_matrix(
    masters_N: Tensor, layout: Partitioned, dtype: torch.dtype, matrix: int
) -> Tensor:
    """One whole matrix in `dtype`, on every rank (a collective)."""
    shape = layout.shapes[matrix]
    flat = masters_N.new_empty(shape.numel(), dtype=dtype)
    for piece in layout.pieces:
        if piece.matrix != matrix:
            continue
        there = flat[piece.start : piece.start + piece.numel]
        if piece.rank == layout.rank:
            there.copy_(piece.of(masters_N))
        if layout.num_ranks > 1:
            source = dist.get_global_rank(layout.group, piece.rank)
            dist.broadcast(there, source, group=layout.group)
    return flat.view(shape)


def _scales(
    masters_N: Tensor,
    layout: Partitioned,
    dtype: torch.dtype,
    eps: float,
    scale_group: dist.ProcessGroup | None,
) -> Tensor:
    """fp32 [M]: as quant/scales.py for tensor-parallel shards, and in the same arithmetic."""
    totals_M = masters_N.new_zeros(len(layout.shapes), dtype=torch.float64)
    for piece in layout.own():
        for w_N in _chunks(piece.of(masters_N)):
            totals_M[piece.matrix] += _sum_of_magnitudes(w_N.to(dtype))
    if layout.num_ranks > 1:
        dist.all_reduce(totals_M, group=layout.group)
    counts_M = layout.counts_M
    if scale_group is not None:
        both = torch.stack([totals_M, counts_M])
        dist.all_reduce(both, group=scale_group)
        totals_M, counts_M = both.unbind()
    # clamp() lets a NaN through, which must stay visible.
    return (totals_M / counts_M).float().clamp(min=eps)


def _codes_of(piece: Piece, masters_N: Tensor, scales_M: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [numel]."""
    codes = masters_N.new_empty(piece.numel, dtype=torch.int8)
    chunks = zip(_chunks(piece.of(masters_N)), _chunks(codes), strict=True)
    for w_N, codes_N in chunks:
        _write_codes(w_N.to(dtype), scales_M[piece.matrix], codes_N)
    return codes


def _chunks(flat: Tensor) -> Sequence[Tensor]:
    return torch.split(flat, _CHUNK[flat.device.type])


def _sum_of_magnitudes(w_N: Tensor) -> Tensor:
    """fp64 scalar, the same in any order of summation."""
    if runs_in_c(w_N, "auto"):
        return cpu_rows.sum_of_magnitudes(w_N)
    return exact_sum(w_N.abs())[0]


def _write_codes(w_N: Tensor, scale: Tensor, codes_N: Tensor) -> None:
    """1 where 2 w > s, −1 where −2 w > s, else 0.

    The same as clip(round(w / s), −1, 1) half to even (the proof is in kernels/triton_weight.py),
    without a division; of a NaN it is 0, and the scale is NaN.
    """
    if runs_in_c(w_N, "auto"):
        cpu_rows.write_codes(w_N, scale, codes_N)
        return
    twice_N = w_N.float() * 2.0
    is_plus, is_minus = twice_N > scale, -twice_N > scale
    torch.sub(is_plus.view(torch.int8), is_minus.view(torch.int8), out=codes_N)
