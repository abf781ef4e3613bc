"""Ternary codes at two bits each, in the layout of transformers' `bitnet` checkpoints.

uint8 [F/4, D]: with R = F/4, bits 2i and 2i+1 of packed[r, c] hold code[r + i·R, c] + 1.
"""

import torch
from torch import Tensor


def pack_2bit(codes_FD: Tensor) -> Tensor:
    """int8 codes in {-1, 0, 1}, F a multiple of 4 -> uint8 [F/4, D].

    Raises:
        ValueError: F is not a multiple of 4, or a code is not ternary.
    """
    if codes_FD.shape[0] % 4:
        raise ValueError(f"{codes_FD.shape[0]} rows are not a multiple of 4")
    # Not abs(): that of int8 -128 is -128.
    if codes_FD.numel() and (int(codes_FD.min()) < -1 or int(codes_FD.max()) > 1):
        raise ValueError("codes outside {-1, 0, 1} do not fit into the ternary 2-bit layout")
    quarters = (codes_FD + 1).to(torch.uint8).chunk(4, dim=0)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_2bit(packed: Tensor) -> Tensor:
    """uint8 [F/4, D] -> int8 codes [F, D]. Raises ValueError on the unused bit pattern 3."""
    quarters = [(packed >> 2 * i) & 3 for i in range(4)]
    fields = torch.cat(quarters, dim=0)
    if fields.numel() and int(fields.max()) > 2:
        raise ValueError("packed tensor holds the unused bit pattern 3: damaged, or not ternary")
    return fields.to(torch.int8) - 1
