"""A ternary matrix as packed pieces of its flattened codes: what ranks exchange, and layers may
keep in place of int8 codes.

Two bits a code, or base 3 (five codes to a byte, 1.6 bits), as quant/pack.py writes them.

Shapes: n pieces of S codes in B bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.config import Packing
from bitscale.quant.pack import pack_2bit, pack_base3, runs_in_c, unpack_2bit, unpack_base3
from bitscale.quant.reference import Ternary

_CODES_PER_BYTE: dict[Packing, int] = {"2bit": 4, "base3": 5}


class PackedTernary(NamedTuple):
    """A matrix as consecutive flat pieces, and its scale."""

    pieces: tuple[Tensor, ...]  # uint8 [n, B]: n pieces of equal size, each of `pack_piece`
    sizes: tuple[int, ...]  # codes in each of these tensors
    shape: torch.Size
    scale: Tensor  # fp32 scalar
    packing: Packing

    def unpack(self) -> Ternary:
        """int8 codes in memory of their own."""
        codes = self.scale.new_empty(self.shape.numel(), dtype=torch.int8)
        parts = torch.split(codes, list(self.sizes))
        for packed_nB, part in zip(self.pieces, parts, strict=True):
            codes_nS = part.view(packed_nB.shape[0], -1)
            if self.packing == "base3":
                unpack_base3(packed_nB, codes_nS.shape[1], checked=False, out=codes_nS)
            else:
                _unpack_2bit(packed_nB, codes_nS)
        return Ternary(codes.view(self.shape), self.scale)


def packed_bytes(num_codes: int, packing: Packing) -> int:
    """What `pack_piece` takes."""
    return -(-num_codes // _CODES_PER_BYTE[packing])


def pack_piece(codes_S: Tensor, packing: Packing, out_B: Tensor) -> None:
    """int8 [S] ternary codes, which are not checked, into uint8 [packed_bytes(S)].

    Base 3 as one row of `pack_base3`; two bits as four rows of `pack_2bit`, padded at the end.
    """
    if packing == "base3":
        pack_base3(codes_S[None], checked=False, out=out_B[None])
        return
    missing = -codes_S.numel() % 4
    if missing:
        codes_S = torch.nn.functional.pad(codes_S, (0, missing))
    pack_2bit(codes_S.view(4, -1), checked=False, out=out_B[None])


def _unpack_2bit(packed_nB: Tensor, codes_nS: Tensor) -> None:
    """Each row of bytes into a row of codes, which ends where its padding begins."""
    num_pieces, size = codes_nS.shape
    if num_pieces > 1 and not runs_in_c(packed_nB, "auto"):
        # PyTorch's operators are started once for all pieces.
        fields_4nB = unpack_2bit(packed_nB, checked=False).view(4, num_pieces, -1)
        codes_nS.copy_(fields_4nB.transpose(0, 1).flatten(1)[:, :size])
        return
    for packed_B, codes_S in zip(packed_nB, codes_nS, strict=True):
        if size % 4:
            codes_S.copy_(unpack_2bit(packed_B[None], checked=False).flatten()[:size])
        else:
            unpack_2bit(packed_B[None], checked=False, out=codes_S.view(4, -1))
