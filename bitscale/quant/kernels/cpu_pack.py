"""Packing in C (cpu_pack.c): the twins of the plain functions in quant/pack.py and gguf_blocks.py.

Shapes: F rows, D columns, G groups of 256 codes.
"""

import torch
from torch import Tensor

from bitscale.quant.kernels.cpu_library import Matrix, empty, launch

# Mirrors cpu_pack.c.
GROUP, GROUPS_PER_BLOCK, LINE, LINES_PER_BLOCK = 256, 64, 128, 128
GROUP_BYTES = {"tq1_0": 54, "tq2_0": 66}


def pack_two_bit(codes_FD: Tensor, out: Tensor | None) -> Tensor | None:
    """uint8 [F/4, D], or None if a code is not ternary."""
    rows, columns = codes_FD.shape[0] // 4, codes_FD.shape[1]
    out = _bytes(out, rows, columns)
    valid = _run("pack_two_bit", rows, codes_FD.contiguous(), out, rows=rows, columns=columns)
    return out if valid else None


def unpack_two_bit(packed: Tensor, out: Tensor | None) -> Tensor | None:
    """int8 [F, D], or None if a byte holds the bit pattern 3."""
    rows, columns = packed.shape
    out = _codes(out, 4 * rows, columns)
    valid = _run("unpack_two_bit", rows, out, packed.contiguous(), rows=rows, columns=columns)
    return out if valid else None


def pack_base3(codes_FD: Tensor, out: Tensor | None) -> Tensor | None:
    """uint8 [F, ceil(D/5)], or None if a code is not ternary."""
    rows, columns = codes_FD.shape
    width = -(-columns // 5)
    out = _bytes(out, rows, width)
    valid = _run("pack_base3", rows, codes_FD.contiguous(), out, columns=columns, first=width)
    return out if valid else None


def unpack_base3(packed: Tensor, columns: int, out: Tensor | None) -> Tensor | None:
    """int8 [F, D], or None if a byte holds no five trits."""
    rows, width = packed.shape
    out = _codes(out, rows, columns)
    valid = _run("unpack_base3", rows, out, packed.contiguous(), columns=columns, first=width)
    return out if valid else None


def pack_groups(name: str, codes_FD: Tensor, d: Tensor, out: Tensor | None) -> Tensor | None:
    """`name` tq1_0 or tq2_0: uint8 [F, D/256 · bytes], or None if a code is not ternary."""
    groups = codes_FD.numel() // GROUP
    out = _bytes(out, codes_FD.shape[0], codes_FD.shape[1] // GROUP * GROUP_BYTES[name])
    blocks = -(-groups // GROUPS_PER_BLOCK)
    scale = d.float()
    valid = _run(f"pack_{name}", blocks, codes_FD.contiguous(), out, rows=groups, scale=scale)
    return out if valid else None


def unpack_groups(name: str, packed: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """int8 [F, D] and fp16 d [F, D/256], or None if a byte is not one that packing writes."""
    rows, per_row = packed.shape[0], packed.shape[1] // GROUP_BYTES[name]
    out = _codes(out, rows, per_row * GROUP)
    d_FG = empty(rows, per_row, dtype=torch.float16)
    groups = rows * per_row
    valid = _run(
        f"unpack_{name}",
        -(-groups // GROUPS_PER_BLOCK),
        out,
        packed.contiguous(),
        rows=groups,
        other=Matrix(d_FG.data_ptr(), 0, 0),
    )
    return (out, d_FG) if valid else None


def pack_i2_s(codes_FD: Tensor, out: Tensor | None) -> Tensor | None:
    """uint8 [F · D / 4], or None if a code is not ternary."""
    lines = codes_FD.numel() // LINE
    out = _bytes(out, codes_FD.numel() // 4)
    blocks = -(-lines // LINES_PER_BLOCK)
    valid = _run("pack_i2_s", blocks, codes_FD.contiguous(), out, rows=lines)
    return out if valid else None


def unpack_i2_s(packed: Tensor, shape: tuple[int, int], out: Tensor | None) -> Tensor | None:
    """int8 [F, D], or None if a byte holds the bit pattern 3."""
    lines = packed.numel() * 4 // LINE
    out = _codes(out, *shape)
    blocks = -(-lines // LINES_PER_BLOCK)
    valid = _run("unpack_i2_s", blocks, out, packed.contiguous(), rows=lines)
    return out if valid else None


def _run(
    kernel: str, blocks: int, codes: Tensor, packed: Tensor, **fields: Tensor | Matrix | int
) -> bool:
    """Whether every value was one that the layout holds."""
    invalid = torch.zeros(1, dtype=torch.int32)
    raw = Matrix(packed.data_ptr(), 0, 0)
    launch(kernel, blocks, 1, codes=codes, out=raw, sums=invalid, **fields)
    return not int(invalid)


def _bytes(out: Tensor | None, *shape: int) -> Tensor:
    return _checked(out, torch.uint8, shape)


def _codes(out: Tensor | None, *shape: int) -> Tensor:
    return _checked(out, torch.int8, shape)


def _checked(out: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return empty(*shape, dtype=dtype)
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    return out
