"""The three matrix products of `kernel: cpu`: torch's int8 product, the rest in C (cpu_gemm.c).

A product is taken in blocks of rows, whose int32 sums are scaled and rounded before the next block:
in place if the result is fp32, else from a buffer that every block reuses. Every function is an
operator of torch.library (cpu_rows.py says why). Shapes: T tokens, D inputs, F outputs.
"""

from typing import cast

import torch
from torch import Tensor

from bitscale.quant.kernels.cpu_library import (
    BLOCK_ROWS,
    MULTIPLY_SCRATCH,
    STRIPE,
    TILE_COLUMNS,
    empty,
    launch,
    matrix,
    multiplies_fp32,
    rows_of,
)
from bitscale.quant.kernels.plain_backward import CHUNK_TOKENS, SMALLEST_PEAK
from bitscale.quant.kernels.table import GradientBits
from bitscale.quant.reference import Int8Rows, Ternary

_BLOCK_BYTES = 16 * 2**20  # of int32 sums, which should stay in the cache
# A product packs its right operand anew for every block: with fewer rows that would cost more
# than the cache saves.
_MIN_BLOCK_ROWS = 1024


def integer_linear(
    x: Int8Rows, weight: Ternary, bias_F: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Twin of `plain.integer_linear`."""
    return cast(Tensor, _integer_linear(*x, *weight, bias_F, dtype))


def input_grad(grad_TF: Tensor, weight: Ternary, bits: GradientBits) -> Tensor:
    """Twin of `plain_backward.input_grad`; without bits, bf16 gradients are multiplied in bf16."""
    return cast(Tensor, _input_grad(grad_TF, *weight, bits))


def weight_grad(
    grad_TF: Tensor,
    x: Int8Rows,
    dtype: torch.dtype,
    main_grad_FD: Tensor | None,
    bits: GradientBits,
) -> Tensor:
    """Twin of `plain_backward.weight_grad`; without bits, bf16 gradients are multiplied in bf16."""
    if main_grad_FD is None:
        return cast(Tensor, _weight_grad(grad_TF, *x, dtype, bits))
    _add_weight_grad(grad_TF, *x, main_grad_FD, bits)
    return main_grad_FD


def _block_rows(columns: int, planes: int) -> int:
    """Rows of the result that a block of `planes` products covers; at least 1."""
    return max(1, max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (4 * max(1, columns))) // planes)


# --- y = x̂ ŵᵀ ---


@torch.library.custom_op("bitscale_cpu::integer_linear", mutates_args=())
def _integer_linear(
    x_TD: Tensor,
    row_scale_T1: Tensor,
    w_FD: Tensor,
    scale: Tensor,
    bias_F: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    F = w_FD.shape[0]
    y = empty(*x_TD.shape[:-1], F, dtype=dtype)  # no view: the next layer may write into it
    x_TD, r_T = x_TD.flatten(0, -2).contiguous(), row_scale_T1.reshape(-1)
    y_TF = y.view(x_TD.shape[0], F)
    bias = None if bias_F is None else bias_F.detach().float().contiguous()
    rows = _block_rows(F, 1)
    buffer = _sums_buffer(y_TF, rows, 1)
    for first in range(0, x_TD.shape[0], rows):
        x, block, r = (t[first : first + rows] for t in (x_TD, y_TF, r_T))
        sums = _sums_of(block, 1, buffer)
        torch._int_mm(x, w_FD.T, out=sums)
        _scale_sums(sums, block, r, scale=scale, vector=bias)
    return y


@_integer_linear.register_fake
def _(
    x_TD: Tensor,
    row_scale_T1: Tensor,
    w_FD: Tensor,
    scale: Tensor,
    bias_F: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x_TD.new_empty((*x_TD.shape[:-1], w_FD.shape[0]), dtype=dtype)


# --- ∂L/∂x = g ŵ ---


@torch.library.custom_op("bitscale_cpu::input_grad", mutates_args=())
def _input_grad(grad_TF: Tensor, w_FD: Tensor, scale: Tensor, bits: int | None) -> Tensor:
    g_TF = rows_of(grad_TF)
    if bits is not None:
        grad_TD = _integer_input_grad(g_TF, w_FD, scale, bits // 8)
    elif _multiplies_bf16(g_TF.dtype, g_TF.dtype):
        grad_TD = (g_TF @ w_FD.to(torch.bfloat16)).mul_(scale)
    else:
        grad_TD = _float_product(g_TF.float(), w_FD, scale=scale).to(grad_TF.dtype)
    return grad_TD.view(*grad_TF.shape[:-1], w_FD.shape[1])


@_input_grad.register_fake
def _(grad_TF: Tensor, w_FD: Tensor, scale: Tensor, bits: int | None) -> Tensor:
    return grad_TF.new_empty((*grad_TF.shape[:-1], w_FD.shape[1]))


def _integer_input_grad(g_TF: Tensor, w_FD: Tensor, scale: Tensor, planes: int) -> Tensor:
    (T, F), D = g_TF.shape, w_FD.shape[1]
    w_FD = w_FD.contiguous()
    grad_TD = empty(T, D, dtype=g_TF.dtype)
    rows = min(_block_rows(D, planes), T)
    buffer = _sums_buffer(grad_TD, rows, planes)
    codes = empty(planes * rows * F, dtype=torch.int8)
    step_T = torch.empty(rows)
    for first in range(0, T, max(1, rows)):
        g, grad = (t[first : first + rows] for t in (g_TF, grad_TD))
        n = len(g)
        launch(
            "gradient_row", n, F, codes=codes, codes_stride=F, plane_stride=n * F, planes=planes,
            row_scale=step_T, first=first, columns=F, eps=SMALLEST_PEAK, **{"in": matrix(g)},
        )  # fmt: skip
        sums = _sums_of(grad, planes, buffer)
        torch._int_mm(codes[: planes * n * F].view(planes * n, F), w_FD, out=sums)
        _scale_sums(sums, grad, step_T, scale=scale)
    return grad_TD


# --- ∂L/∂w = gᵀ x̂ ---


@torch.library.custom_op("bitscale_cpu::weight_grad", mutates_args=())
def _weight_grad(
    grad_TF: Tensor, x_TD: Tensor, row_scale_T1: Tensor, dtype: torch.dtype, bits: int | None
) -> Tensor:
    g_TF, x_TD, r_T = rows_of(grad_TF), x_TD.flatten(0, -2).contiguous(), row_scale_T1.reshape(-1)
    if bits is None:
        return _float_weight_grad(g_TF, x_TD, r_T, dtype)
    grad_FD = empty(g_TF.shape[1], x_TD.shape[1], dtype=dtype)
    _integer_weight_grad(g_TF, x_TD, r_T, grad_FD, bits // 8, adds=False)
    return grad_FD


@_weight_grad.register_fake
def _(
    grad_TF: Tensor, x_TD: Tensor, row_scale_T1: Tensor, dtype: torch.dtype, bits: int | None
) -> Tensor:
    return grad_TF.new_empty((grad_TF.shape[-1], x_TD.shape[-1]), dtype=dtype)


@torch.library.custom_op("bitscale_cpu::add_weight_grad", mutates_args=("main_grad_FD",))
def _add_weight_grad(
    grad_TF: Tensor,
    x_TD: Tensor,
    row_scale_T1: Tensor,
    main_grad_FD: Tensor,
    bits: int | None,
) -> None:
    assert main_grad_FD.dtype == torch.float32
    g_TF, x_TD, r_T = rows_of(grad_TF), x_TD.flatten(0, -2).contiguous(), row_scale_T1.reshape(-1)
    if bits is None:
        main_grad_FD.add_(_float_weight_grad(g_TF, x_TD, r_T, torch.float32))
    else:
        _integer_weight_grad(g_TF, x_TD, r_T, main_grad_FD, bits // 8, adds=True)


@_add_weight_grad.register_fake
def _(
    grad_TF: Tensor,
    x_TD: Tensor,
    row_scale_T1: Tensor,
    main_grad_FD: Tensor,
    bits: int | None,
) -> None:
    return None


def _float_weight_grad(g_TF: Tensor, x_TD: Tensor, r_T: Tensor, dtype: torch.dtype) -> Tensor:
    if _multiplies_bf16(g_TF.dtype, dtype):
        return g_TF.T @ _dequantized(x_TD, r_T, torch.bfloat16)
    return _float_product(g_TF.float().T, x_TD, row_scale=r_T).to(dtype)


def _integer_weight_grad(
    g_TF: Tensor, x_TD: Tensor, r_T: Tensor, grad_FD: Tensor, planes: int, *, adds: bool
) -> None:
    """Writes, or adds to, `grad_FD`, in blocks of its rows."""
    (T, F), D = g_TF.shape, x_TD.shape[1]
    if T > CHUNK_TOKENS:
        total_FD = torch.zeros(F, D)
        for first in range(0, T, CHUNK_TOKENS):
            g, x, r = (t[first : first + CHUNK_TOKENS] for t in (g_TF, x_TD, r_T))
            _integer_weight_grad(g, x, r, total_FD, planes, adds=True)
        grad_FD.add_(total_FD) if adds else grad_FD.copy_(total_FD)
        return
    rows = min(_block_rows(D, planes), F)
    buffer = _sums_buffer(grad_FD, rows, planes, adds=adds)
    codes = empty(T * planes * rows, dtype=torch.int8)
    step_F = torch.empty(rows)
    for first in range(0, F, max(1, rows)):
        grad = grad_FD[first : first + rows]
        n = len(grad)
        launch(
            "gradient_columns", -(-n // STRIPE), 2 * STRIPE, codes=codes,
            codes_stride=planes * n, plane_stride=n, planes=planes, row_scale=step_F, rstd=r_T,
            rows=T, columns=F, first=first, width=n, eps=SMALLEST_PEAK, **{"in": matrix(g_TF)},
        )  # fmt: skip
        sums = _sums_of(grad, planes, buffer)
        torch._int_mm(codes[: T * planes * n].view(T, planes * n).T, x_TD, out=sums)
        _scale_sums(sums, grad, step_F, adds=adds)


# --- Blocks ---


def _sums_buffer(out: Tensor, rows: int, planes: int, *, adds: bool = False) -> Tensor | None:
    """int32 for blocks of so many rows of `out`, or None if their sums fit into its own place."""
    if out.dtype == torch.float32 and planes == 1 and not adds:
        return None
    return empty(planes * min(rows, len(out)) * out.shape[1], dtype=torch.int32)


def _sums_of(out: Tensor, planes: int, buffer: Tensor | None) -> Tensor:
    """Where the sums [planes · rows, columns] of the block `out` go."""
    if buffer is None:
        return out.view(torch.int32)
    return buffer[: planes * out.numel()].view(planes * len(out), out.shape[1])


def _scale_sums(
    sums: Tensor,
    out: Tensor,
    row_scale: Tensor,
    *,
    scale: Tensor | None = None,
    vector: Tensor | None = None,
    adds: bool = False,
) -> None:
    """One block of products, from int32 [planes · rows, columns] to `out`."""
    rows, columns = out.shape
    planes = len(sums) // max(1, rows)
    launch(
        "scale_sums", rows, 2 * columns, sums=sums, planes=planes, out=matrix(out),
        row_scale=row_scale, scale=scale, vector=vector, rows=rows, columns=columns,
        flag=int(adds),
    )  # fmt: skip


# --- Floating point ---


def _float_product(
    a: Tensor, codes: Tensor, *, row_scale: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """fp32 a [M, K] @ (codes [K, N] · row_scale [K]) · scale; `a` or its transpose has rows."""
    (M, K), N = a.shape, codes.shape[1]
    out = empty(M, N, dtype=torch.float32)
    if not (multiplies_fp32() and K):
        torch.mm(a, _dequantized(codes, row_scale, torch.float32), out=out)
        return out if scale is None else out.mul_(scale)
    codes = codes.contiguous()
    panels = -(-N // TILE_COLUMNS)
    packed = empty(panels * K * TILE_COLUMNS, dtype=torch.float32)
    launch(
        "pack_panel", panels, 1, other=matrix(packed), codes=codes, codes_stride=N,
        row_scale=row_scale, columns=N, width=K,
    )  # fmt: skip
    is_transposed = a.stride(1) != 1
    launch(
        "multiply_rows", -(-M // BLOCK_ROWS), MULTIPLY_SCRATCH, other=matrix(packed),
        out=matrix(out), scale=scale, rows=M, columns=N, width=K, flag=int(is_transposed),
        **{"in": matrix(a.T if is_transposed else a)},
    )  # fmt: skip
    return out


def _dequantized(codes: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes · row_scale."""
    values = empty(*codes.shape, dtype=dtype)
    if row_scale is None:
        return values.copy_(codes)
    launch(
        "dequantize_row", codes.shape[0], codes.shape[1], codes=codes,
        codes_stride=codes.stride(0), row_scale=row_scale, columns=codes.shape[1],
        out=matrix(values),
    )  # fmt: skip
    return values


def _multiplies_bf16(gradient: torch.dtype, result: torch.dtype) -> bool:
    """Whether gradient and result are bf16 and the processor multiplies it."""
    if not gradient == result == torch.bfloat16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
