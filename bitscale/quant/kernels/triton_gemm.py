"""The three matrix products of a ternary linear layer; integer gradients: triton_gradient_gemm.py.

T tokens, D inputs, F outputs. Operands stay int8 in memory; the forward product runs on the
integer tensor cores, the backward ones widen codes to the gradient's dtype tile by tile.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels.tiles import Tile, backward_tile, forward_tile
from bitscale.quant.kernels.triton_common import LAUNCH, as_operand, round_to, rows_of
from bitscale.quant.reference import Int8Rows, Ternary


def integer_linear(
    x: Int8Rows,
    weight: Ternary,
    bias_F: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """Twin of `plain.integer_linear`."""
    x_TD, w_FD = rows_of(x.codes_TD), rows_of(weight.codes_FD)
    (T, D), F = x_TD.shape, w_FD.shape[0]
    # No view: the next layer may write into it.
    y_TF = torch.empty((*x.codes_TD.shape[:-1], F), dtype=dtype, device=x_TD.device)
    if T:
        tile = tile or forward_tile(T, F, (x_TD.stride(0), w_FD.stride(0)))
        forward[_grid(T, F, tile)](
            x_TD, w_FD, x.scale_T1, weight.scale, y_TF if bias_F is None else bias_F, y_TF,
            T, F, D, x_TD.stride(0), w_FD.stride(0),
            HAS_BIAS=bias_F is not None, **_options(tile, D),
        )  # fmt: skip
    return y_TF


def input_grad(grad_TF: Tensor, weight: Ternary, tile: Tile | None = None) -> Tensor:
    """Twin of `plain_backward.input_grad` without bits; 16-bit gradients stay 16 bit."""
    g_TF, w_FD = rows_of(grad_TF), rows_of(weight.codes_FD)
    (T, F), D = g_TF.shape, w_FD.shape[1]
    grad_TD = torch.empty((T, D), dtype=grad_TF.dtype, device=grad_TF.device)
    if T:
        strides = (g_TF.stride(0), w_FD.stride(0))
        tile = tile or backward_tile(T, D, strides, is_fp32=grad_TF.dtype == torch.float32)
        grad_of_input[_grid(T, D, tile)](
            g_TF, w_FD, weight.scale, grad_TD,
            T, D, F, g_TF.stride(0), w_FD.stride(0), **_options(tile, F),
        )  # fmt: skip
    return grad_TD.view(*grad_TF.shape[:-1], D)


def weight_grad(
    grad_TF: Tensor,
    x: Int8Rows,
    dtype: torch.dtype,
    main_grad_FD: Tensor | None,
    tile: Tile | None = None,
) -> Tensor:
    """Twin of `plain_backward.weight_grad` without bits; 16-bit gradients stay 16 bit."""
    g_TF, x_TD = rows_of(grad_TF), rows_of(x.codes_TD)
    (T, F), D = g_TF.shape, x_TD.shape[1]
    if main_grad_FD is None:
        # An empty batch still has a gradient: the kernel's sum over no tokens.
        grad_FD = torch.empty((F, D), dtype=dtype, device=grad_TF.device)
    else:
        assert main_grad_FD.dtype == torch.float32 and main_grad_FD.is_contiguous()
        grad_FD = main_grad_FD
    strides = (g_TF.stride(0), x_TD.stride(0))
    tile = tile or backward_tile(F, D, strides, is_fp32=grad_TF.dtype == torch.float32)
    grad_of_weight[_grid(F, D, tile)](
        g_TF, x_TD, x.scale_T1, grad_FD, F, D, T, g_TF.stride(0), x_TD.stride(0),
        ACCUMULATE=main_grad_FD is not None, **_options(tile, T),
    )  # fmt: skip
    return grad_FD


def _grid(M: int, N: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)


def _options(tile: Tile, K: int) -> dict[str, int]:
    return {
        "EVEN_K": K % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **LAUNCH,
    }


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row block, column block), in groups of GROUP_M row blocks that share their columns."""
    program = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * num_n)
    rows_in_group = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * num_n)
    return group * GROUP_M + within % rows_in_group, within // rows_in_group


@triton.jit
def rows_inside(first, SIZE: tl.constexpr, limit):
    """0..SIZE−1, with 0 for rows past the end: these are loaded for nothing and never stored."""
    row = tl.arange(0, SIZE)
    return tl.where(first + row < limit, row, 0)


@triton.jit
def store_tile(values, out, row, column, num_rows, num_columns):
    """out[row, column] = values, rounded to the dtype of `out`, without what is past the end."""
    target = out + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(target, round_to(values, out.dtype.element_ty), mask=inside)


@triton.jit
def add_to_tile(values, out, row, column, num_rows, num_columns):
    """out[row, column] += values, in fp32."""
    target = out + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(target, tl.load(target, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def add_in_halves(
    values, out, first_row, first_column, num_rows, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`add_to_tile` in two halves: all values and as many loaded do not fit into the registers."""
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N // 2)
    left, right = tl.split(tl.permute(tl.reshape(values, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    add_to_tile(left, out, row, column, num_rows, num_columns)
    add_to_tile(right, out, row, column + BLOCK_N // 2, num_rows, num_columns)


# Below, a tile's address is a 64-bit base that the loop advances plus constant 32-bit offsets:
# a tile of 64-bit pointers would take twice the registers.


@triton.jit
def forward(
    x_TD, w_FD, row_scale_T, scale, bias_F, y_TF, T, F, D, x_stride, w_stride,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = (Σ int8 · code) · r · s + bias, both operands contiguous along the sum."""
    block_t, block_f = tile_of_program(T, F, BLOCK_M, BLOCK_N, GROUP_M)
    first_t, first_f = block_t * BLOCK_M, block_f * BLOCK_N
    d = tl.arange(0, BLOCK_K)
    x_offsets = rows_inside(first_t, BLOCK_M, T)[:, None] * x_stride + d[None, :]
    w_offsets = rows_inside(first_f, BLOCK_N, F)[None, :] * w_stride + d[:, None]
    x = x_TD + first_t.to(tl.int64) * x_stride
    w = w_FD + first_f.to(tl.int64) * w_stride
    s = tl.load(scale)  # after the loop it would cost 68 registers (docs/kernels.md)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x_tile, w_tile = tl.load(x + x_offsets), tl.load(w + w_offsets)
        else:
            x_tile = tl.load(x + x_offsets, mask=(d < D - start)[None, :], other=0)
            w_tile = tl.load(w + w_offsets, mask=(d < D - start)[:, None], other=0)
        sums = tl.dot(x_tile, w_tile, sums, out_dtype=tl.int32)
        x += BLOCK_K
        w += BLOCK_K
    t, f = first_t + tl.arange(0, BLOCK_M), first_f + tl.arange(0, BLOCK_N)
    row_scale = tl.load(row_scale_T + t, mask=t < T, other=0.0)
    y = sums.to(tl.float32) * row_scale[:, None] * s
    if HAS_BIAS:
        y += tl.load(bias_F + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    store_tile(y, y_TF, t, f, T, F)


@triton.jit
def grad_of_input(
    g_TF, w_FD, scale, grad_TD, T, D, F, g_stride, w_stride,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """grad_TD = (g_TF @ codes_FD) · s."""
    block_t, block_d = tile_of_program(T, D, BLOCK_M, BLOCK_N, GROUP_M)
    first_t, first_d = block_t * BLOCK_M, block_d * BLOCK_N
    d = first_d + tl.arange(0, BLOCK_N)
    f = tl.arange(0, BLOCK_K)
    # The codes are contiguous along d: clamped columns would be loaded byte by byte.
    g_offsets = rows_inside(first_t, BLOCK_M, T)[:, None] * g_stride + f[None, :]
    w_offsets = f[:, None] * w_stride + d[None, :]
    inside_D = (d < D)[None, :]
    g = g_TF + first_t.to(tl.int64) * g_stride
    w = w_FD
    s = tl.load(scale)
    dtype: tl.constexpr = g_TF.dtype.element_ty
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, F, BLOCK_K):
        if EVEN_K:
            g_tile = tl.load(g + g_offsets)
            w_tile = tl.load(w + w_offsets, mask=inside_D, other=0)
        else:
            g_tile = tl.load(g + g_offsets, mask=(f < F - start)[None, :], other=0.0)
            w_tile = tl.load(w + w_offsets, mask=inside_D & (f < F - start)[:, None], other=0)
        codes = as_operand(w_tile, dtype)
        sums = tl.dot(as_operand(g_tile, dtype), codes, sums, input_precision="ieee")
        g += BLOCK_K
        w += BLOCK_K * w_stride
    t = first_t + tl.arange(0, BLOCK_M)
    store_tile(sums * s, grad_TD, t, d, T, D)


@triton.jit
def grad_of_weight(
    g_TF, x_TD, row_scale_T, grad_FD, F, D, T, g_stride, x_stride,
    ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """grad_FD = g_TFᵀ @ (codes_TD · r), or grad_FD += that."""
    block_f, block_d = tile_of_program(F, D, BLOCK_M, BLOCK_N, GROUP_M)
    f = block_f * BLOCK_M + tl.arange(0, BLOCK_M)
    d = block_d * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_K)
    g_offsets = t[None, :] * g_stride + f[:, None]
    x_offsets = t[:, None] * x_stride + d[None, :]
    inside_F, inside_D = (f < F)[:, None], (d < D)[None, :]
    g, x, row_scale = g_TF, x_TD, row_scale_T
    dtype: tl.constexpr = g_TF.dtype.element_ty
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, T, BLOCK_K):
        if EVEN_K:
            g_tile = tl.load(g + g_offsets, mask=inside_F, other=0.0)
            x_tile = tl.load(x + x_offsets, mask=inside_D, other=0)
            r = tl.load(row_scale + t)
        else:
            inside_T = t < T - start
            g_tile = tl.load(g + g_offsets, mask=inside_F & inside_T[None, :], other=0.0)
            x_tile = tl.load(x + x_offsets, mask=inside_D & inside_T[:, None], other=0)
            r = tl.load(row_scale + t, mask=inside_T, other=0.0)
        x_hat = as_operand(x_tile.to(tl.float32) * r[:, None], dtype)
        sums = tl.dot(as_operand(g_tile, dtype), x_hat, sums, input_precision="ieee")
        g += BLOCK_K * g_stride
        x += BLOCK_K * x_stride
        row_scale += BLOCK_K
    if ACCUMULATE:
        first_f, first_d = block_f * BLOCK_M, block_d * BLOCK_N
        add_in_halves(sums, grad_FD, first_f, first_d, F, D, BLOCK_M, BLOCK_N)
    else:
        store_tile(sums, grad_FD, f, d, F, D)
