"""Ternary codes as bytes: two bits each, or five in a byte.

Two bits, the layout of transformers' `bitnet` checkpoints: uint8 [F/4, D]; with R = F/4, bits 2i
and 2i+1 of packed[r, c] hold code[r + i·R, c] + 1.

Base 3, bitscale's own compact form, 1.6 bits a weight: uint8 [F, W], W = ceil(D/5). With the trits
t_i = code[r, c + i·W] + 1 (0 beyond the row's end is a code of 0: t = 1) and v = Σ 3^(4-i) t_i,
packed[r, c] = ceil(256 v / 243): a fixed-point fraction, whose next trit is the digit before the
point of three times itself (as in GGUF's TQ1_0).

Every function takes `kernel`: "auto" (compiled C for tensors on the CPU, where it can be compiled;
logged), "cpu" (C, or an error) or "reference" (the plain PyTorch below, the specification).

Shapes: F rows, D columns.
"""

import torch
from torch import Tensor

from bitscale.quant.kernels import get_kernels

NOT_TERNARY = "codes outside {-1, 0, 1} do not fit into a ternary layout"
TRITS_PER_BYTE = 5


def pack_2bit(
    codes_FD: Tensor, *, kernel: str = "auto", out: Tensor | None = None, checked: bool = True
) -> Tensor:
    """int8 codes in {-1, 0, 1}, F a multiple of 4 -> uint8 [F/4, D], in `out` if given.

    `checked=False`, for codes that the caller has just computed: a GPU is not waited for.

    Raises:
        ValueError: F is not a multiple of 4, or a code is not ternary.
    """
    if codes_FD.shape[0] % 4:
        raise ValueError(f"{codes_FD.shape[0]} rows are not a multiple of 4")
    if runs_in_c(codes_FD, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.pack_two_bit(codes_FD, out), NOT_TERNARY)
    trits_FD = trits_of(codes_FD) if checked else (codes_FD + 1).view(torch.uint8)
    quarters = trits_FD.chunk(4, dim=0)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return written(packed, out)


def unpack_2bit(
    packed: Tensor, *, kernel: str = "auto", out: Tensor | None = None, checked: bool = True
) -> Tensor:
    """uint8 [F/4, D] -> int8 codes [F, D]. Raises ValueError on the unused bit pattern 3.

    `checked=False`, for what another rank has just packed: a GPU is not waited for.
    """
    reason = "packed tensor holds the unused bit pattern 3: damaged, or not ternary"
    if runs_in_c(packed, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.unpack_two_bit(packed, out), reason)
    fields = torch.cat([(packed >> 2 * i) & 3 for i in range(4)], dim=0)
    if checked and fields.numel() and int(fields.max()) > 2:
        raise ValueError(reason)
    return written(fields.to(torch.int8) - 1, out)


def pack_base3(
    codes_FD: Tensor, *, kernel: str = "auto", out: Tensor | None = None, checked: bool = True
) -> Tensor:
    """int8 codes in {-1, 0, 1} -> uint8 [F, ceil(D/5)], in `out` if given; `checked` as above.

    Raises ValueError if a code is not ternary.
    """
    if runs_in_c(codes_FD, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.pack_base3(codes_FD, out), NOT_TERNARY)
    trits_FD = trits_of(codes_FD) if checked else (codes_FD + 1).view(torch.uint8)
    rows, columns = trits_FD.shape
    width = base3_width(columns)
    padding = trits_FD.new_ones(rows, TRITS_PER_BYTE * width - columns)
    runs = torch.cat((trits_FD, padding), dim=1).view(rows, TRITS_PER_BYTE, width)
    return written(five_to_byte(runs), out)


def unpack_base3(
    packed: Tensor,
    columns: int,
    *,
    kernel: str = "auto",
    out: Tensor | None = None,
    checked: bool = True,
) -> Tensor:
    """uint8 [F, ceil(D/5)] and D = `columns` -> int8 codes [F, D]; `checked` as above.

    Raises ValueError if the width does not fit, or on a byte that is no five trits.
    """
    if packed.shape[1] != base3_width(columns):
        raise ValueError(
            f"{packed.shape[1]} bytes a row, but {columns} columns take {base3_width(columns)}"
        )
    reason = "packed tensor holds a byte that is not five trits: damaged, or not base 3"
    if runs_in_c(packed, kernel):
        from bitscale.quant.kernels import cpu_pack

        return valid(cpu_pack.unpack_base3(packed, columns, out), reason)
    trits = byte_to_five(packed, reason if checked else None).flatten(1)
    if checked and bool((trits[:, columns:] != 1).any()):
        raise ValueError(reason)
    return written(trits[:, :columns].to(torch.int8) - 1, out)


def base3_width(columns: int) -> int:
    """Bytes of a row."""
    return -(-columns // TRITS_PER_BYTE)


def five_to_byte(trits: Tensor) -> Tensor:
    """uint8 [..., 5, W] in {0, 1, 2}, the first most significant -> uint8 [..., W]."""
    value = torch.zeros_like(trits[..., 0, :], dtype=torch.int32)
    for i in range(TRITS_PER_BYTE):
        value = 3 * value + trits[..., i, :]
    return ((256 * value + 242) // 243).to(torch.uint8)


def byte_to_five(packed: Tensor, reason: str | None) -> Tensor:
    """uint8 [..., W] -> [..., 5, W]. ValueError(reason) on a byte that packing never gives, unless
    `reason` is None: nothing is checked then."""
    fraction, trits = packed.to(torch.int32), []
    # 243 q = 256 v + r, and q = ceil(256 v / 243) exactly if r < 243.
    if reason is not None and bool((243 * fraction % 256 >= 243).any()):
        raise ValueError(reason)
    for _ in range(TRITS_PER_BYTE):
        trits.append((3 * fraction >> 8).to(torch.uint8))
        fraction = 3 * fraction & 255
    return torch.stack(trits, dim=-2)


def trits_of(codes: Tensor) -> Tensor:
    """codes + 1 as uint8. Raises ValueError if one is not ternary."""
    # Not abs(): that of int8 -128 is -128.
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise ValueError(NOT_TERNARY)
    return (codes + 1).to(torch.uint8)


def runs_in_c(t: Tensor, kernel: str) -> bool:
    """Whether `kernel` means cpu_pack.c for this tensor; KernelUnavailable as `get_kernels`."""
    return get_kernels(kernel, t.device.type).name == "cpu"


def valid(result: Tensor | None, reason: str) -> Tensor:
    """`result`. Raises ValueError(reason) if it is None."""
    if result is None:
        raise ValueError(reason)
    return result


def written(result: Tensor, out: Tensor | None) -> Tensor:
    """`result`, copied to `out` if there is one."""
    return result if out is None else out.copy_(result)
