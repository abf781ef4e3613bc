"""Ternary codes as the blocks that GGUF files hold: TQ1_0, TQ2_0, and bitnet.cpp's I2_S.

Nothing is quantized here: codes and their scale are given. A block of TQ1_0 or TQ2_0 is 256
consecutive codes of a row and, last, d in fp16: the largest |code · d| of the block, so 0 where
every code is 0 (which is what llama.cpp's and gguf-py's quantizers write for such weights).

    TQ2_0   66 bytes: qs[64]. Code 128j + 32l + m is bits 2l, 2l+1 of qs[32j + m], plus 1.
    TQ1_0   54 bytes: qs[48], qh[4], five trits a byte as in base 3 (quant/pack.py).
            qs[m] holds the codes m + 32n (m < 32, n < 5), qs[32 + m] holds 160 + m + 16n (m < 16),
            qh[j] holds 240 + j + 4n (j < 4, n < 4) and a fifth trit of 0.
    I2_S    for x86: 128 codes of the flattened matrix in 32 bytes; code 32g + p is bits 6 - 2g,
            7 - 2g of byte p, plus 1. One fp32 scale for all follows (convert/gguf_tensors.py).
            bitnet.cpp on Arm uses lines of 64 codes: such a file is of one platform.

Sources: ggml-quants.c and ggml-common.h of llama.cpp (as vendored in llama-cpp-python 0.3.36),
gguf/quants.py of gguf 0.19, ggml-bitnet-mad.cpp of bitnet.cpp (October 2024).

`kernel` as in quant/pack.py. Shapes: F rows, D columns, B = D/256 blocks of a row.
"""

from typing import Literal

import torch
from torch import Tensor

from bitscale.quant.pack import (
    NOT_TERNARY,
    byte_to_five,
    five_to_byte,
    runs_in_c,
    trits_of,
    valid,
    written,
)

BlockType = Literal["tq1_0", "tq2_0"]
BLOCK = 256  # codes
BLOCK_BYTES: dict[BlockType, int] = {"tq1_0": 54, "tq2_0": 66}
I2_S_LINE = 128  # codes


def pack_blocks(
    codes_FD: Tensor,
    d: Tensor,
    kind: BlockType,
    *,
    kernel: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """int8 codes and the scalar scale `d` (rounded to fp16) -> uint8 [F, B · bytes of a block].

    Raises:
        ValueError: D is not a multiple of 256, or a code is not ternary.
    """
    _check_columns(codes_FD.shape[1])
    if runs_in_c(codes_FD, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.pack_groups(kind, codes_FD, d, out), NOT_TERNARY)
    trits_FB = trits_of(codes_FD).view(codes_FD.shape[0], -1, BLOCK)
    quants = _tq2_0_bytes(trits_FB) if kind == "tq2_0" else _tq1_0_bytes(trits_FB)
    any_FB1 = (trits_FB != 1).any(dim=-1, keepdim=True)
    d_FB1 = torch.where(any_FB1, d.to(torch.float16), torch.zeros((), dtype=torch.float16))
    return written(torch.cat((quants, d_FB1.view(torch.uint8)), dim=-1).flatten(1), out)


def unpack_blocks(
    packed: Tensor, kind: BlockType, *, kernel: str = "auto", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """uint8 [F, B · bytes of a block] -> int8 codes [F, D] and d, fp16 [F, B].

    Raises ValueError on a byte that packing never gives.
    """
    reason = f"a {kind.upper()} block holds a byte that is not of ternary codes: damaged"
    if runs_in_c(packed, kernel):
        from bitscale.quant.kernels import cpu_pack

        unpacked = cpu_pack.unpack_groups(kind, packed, out)
        if unpacked is None:
            raise ValueError(reason)
        return unpacked
    blocks = packed.view(packed.shape[0], -1, BLOCK_BYTES[kind])
    trits_FB = (_tq2_0_trits if kind == "tq2_0" else _tq1_0_trits)(blocks[..., :-2], reason)
    d_FB = blocks[..., -2:].contiguous().view(torch.float16).squeeze(-1)
    return written(trits_FB.to(torch.int8).flatten(1) - 1, out), d_FB


def pack_i2_s(codes_FD: Tensor, *, kernel: str = "auto", out: Tensor | None = None) -> Tensor:
    """int8 codes -> uint8 [F · D / 4], without the scale. D a multiple of 128.

    Raises ValueError if it is not, or if a code is not ternary.
    """
    if codes_FD.shape[1] % I2_S_LINE:
        raise ValueError(f"{codes_FD.shape[1]} columns are not a multiple of {I2_S_LINE}")
    if runs_in_c(codes_FD, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.pack_i2_s(codes_FD, out), NOT_TERNARY)
    q = trits_of(codes_FD).view(-1, 4, 32)
    return written((q[:, 0] << 6 | q[:, 1] << 4 | q[:, 2] << 2 | q[:, 3]).flatten(), out)


def unpack_i2_s(
    packed: Tensor, shape: tuple[int, int], *, kernel: str = "auto", out: Tensor | None = None
) -> Tensor:
    """uint8 [F · D / 4] -> int8 codes [F, D]. Raises ValueError on the bit pattern 3."""
    reason = "an I2_S tensor holds the unused bit pattern 3: damaged, or not ternary"
    if runs_in_c(packed, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.unpack_i2_s(packed, shape, out), reason)
    lines = packed.view(-1, 1, 32)
    trits = torch.cat([lines >> shift & 3 for shift in (6, 4, 2, 0)], dim=1)
    if trits.numel() and int(trits.max()) > 2:
        raise ValueError(reason)
    return written(trits.to(torch.int8).view(shape) - 1, out)


def _check_columns(columns: int) -> None:
    if columns % BLOCK:
        raise ValueError(f"{columns} columns are not a multiple of {BLOCK}")


def _split(t: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return t.reshape(*t.shape[:-1], *sizes)


def _tq2_0_bytes(trits_FB: Tensor) -> Tensor:
    """[F, B, 256] -> [F, B, 64]"""
    q = _split(trits_FB, 2, 4, 32)
    return (q[..., 0, :] | q[..., 1, :] << 2 | q[..., 2, :] << 4 | q[..., 3, :] << 6).flatten(-2)


def _tq2_0_trits(quants: Tensor, reason: str) -> Tensor:
    halves = _split(quants, 2, 1, 32)
    trits = torch.cat([halves >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
    if trits.numel() and int(trits.max()) > 2:
        raise ValueError(reason)
    return trits.flatten(-3)


def _tq1_0_bytes(trits_FB: Tensor) -> Tensor:
    """[F, B, 256] -> [F, B, 52]"""
    first = five_to_byte(_split(trits_FB[..., :160], 5, 32))
    second = five_to_byte(_split(trits_FB[..., 160:240], 5, 16))
    four = _split(trits_FB[..., 240:], 4, 4)
    third = five_to_byte(torch.cat((four, torch.zeros_like(four[..., :1, :])), dim=-2))
    return torch.cat((first, second, third), dim=-1)


def _tq1_0_trits(quants: Tensor, reason: str) -> Tensor:
    first = byte_to_five(quants[..., :32], reason).flatten(-2)
    second = byte_to_five(quants[..., 32:48], reason).flatten(-2)
    third = byte_to_five(quants[..., 48:], reason)
    if bool(third[..., 4, :].any()):
        raise ValueError(reason)
    return torch.cat((first, second, third[..., :4, :].flatten(-2)), dim=-1)
