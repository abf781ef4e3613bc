"""The gradient of the fused RMSNorm: one pass over the rows, and a sum of partial sums.

T tokens, D inputs, P programs.
"""

# triton has no types, and its kernels' arguments none that Python knows.
# mypy: disable-error-code="import-not-found,import-untyped,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitscale.quant.kernels.triton_common import LAUNCH, round_to, rows_of

_MAX_ROW_BYTES = 32768  # of x; a longer row does not fit into registers with its sums
_BLOCK = 4096  # elements of a longer row at a time
_MAX_ROWS, _MIN_PROGRAMS = 16, 256  # rows of a program: more sums in a row, fewer to write
_SUM_TILE = (64, 32)  # partial sums, columns


def rms_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Twin of `plain_backward.rms_norm_grad`; `rstd_T1` contiguous."""
    grads, rows = rows_of(grad_TD), rows_of(x_TD)
    T, D = rows.shape
    grad_x_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    num_rows = min(_MAX_ROWS, max(triton.cdiv(T, _MIN_PROGRAMS), 1))
    P = triton.cdiv(T, num_rows)
    partials_PD = None if weight_D is None else rows.new_empty((P, D), dtype=torch.float32)
    weight = None if weight_D is None else weight_D.detach()
    block = triton.next_power_of_2(D)
    is_long = block * x_TD.element_size() > _MAX_ROW_BYTES
    if T:
        (norm_grad_long_rows if is_long else norm_grad_rows)[(P,)](
            grads, rows, rstd_T1, weight, grad_x_TD, partials_PD,
            T, D, num_rows, grads.stride(0), rows.stride(0), BLOCK=_BLOCK if is_long else block,
            num_warps=8 if is_long else min(max(block // 512, 1), 16), **LAUNCH,
        )  # fmt: skip
    if weight is None or partials_PD is None:
        return grad_x_TD, None
    grad_weight_D = torch.empty_like(weight)
    rows_at_once, columns = _SUM_TILE
    sum_partials[(triton.cdiv(D, columns),)](
        partials_PD, grad_weight_D, P, D,
        BLOCK_P=rows_at_once, BLOCK_D=columns, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return grad_x_TD, grad_weight_D


@triton.jit
def row_terms(grad_TD, x_TD, weight_D, row, d, D, rstd, grad_stride, x_stride):
    """fp32 (grad, n, g = grad · weight, n as the unfused norm rounds it) at `d` of a row."""
    inside = d < D
    x = tl.load(x_TD + row * x_stride + d, mask=inside, other=0.0)
    grad = tl.load(grad_TD + row * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
    n = x.to(tl.float32) * rstd
    g = grad
    if weight_D is not None:
        g = grad * tl.load(weight_D + d, mask=inside, other=0.0).to(tl.float32)
    return grad, n, g, round_to(n, x.dtype).to(tl.float32)


@triton.jit
def norm_grad_rows(
    grad_TD, x_TD, rstd_T, weight_D, grad_x_TD, partials_PD, T, D, num_rows,
    grad_stride, x_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """num_rows rows of grad_x, one after the other in registers, and their sum for the weight."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    weight_sums = tl.zeros((BLOCK,), dtype=tl.float32)
    first_row = program * num_rows
    for row in range(first_row, tl.minimum(first_row + num_rows, T)):
        rstd = tl.load(rstd_T + row)
        grad, n, g, rounded = row_terms(
            grad_TD, x_TD, weight_D, row, d, D, rstd, grad_stride, x_stride
        )
        weight_sums += grad * rounded
        mean = tl.div_rn(tl.sum(g * n), tl.cast(D, tl.float32))
        grad_x = round_to(rstd * (g - n * mean), grad_x_TD.dtype.element_ty)
        tl.store(grad_x_TD + row * D + d, grad_x, mask=d < D)
    if weight_D is not None:
        tl.store(partials_PD + program * D + d, weight_sums, mask=d < D)


@triton.jit
def norm_grad_long_rows(
    grad_TD, x_TD, rstd_T, weight_D, grad_x_TD, partials_PD, T, D, num_rows,
    grad_stride, x_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """`norm_grad_rows` block by block; a row is read again, and its sums kept, in the cache."""
    program = tl.program_id(0).to(tl.int64)
    first_row = program * num_rows
    for row in range(first_row, tl.minimum(first_row + num_rows, T)):
        rstd = tl.load(rstd_T + row)
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            _, n, g, _ = row_terms(grad_TD, x_TD, weight_D, row, d, D, rstd, grad_stride, x_stride)
            products += g * n
        mean = tl.div_rn(tl.sum(products), tl.cast(D, tl.float32))
        for first in range(0, D, BLOCK):
            d = first + tl.arange(0, BLOCK)
            grad, n, g, rounded = row_terms(
                grad_TD, x_TD, weight_D, row, d, D, rstd, grad_stride, x_stride
            )
            grad_x = round_to(rstd * (g - n * mean), grad_x_TD.dtype.element_ty)
            tl.store(grad_x_TD + row * D + d, grad_x, mask=d < D)
            if weight_D is not None:
                # Each thread reads what it wrote itself.
                sums = partials_PD + program * D + d
                before = tl.load(sums, mask=(d < D) & (row > first_row), other=0.0)
                tl.store(sums, before + grad * rounded, mask=d < D)


@triton.jit
def sum_partials(partials_PD, grad_weight_D, P, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """grad_weight = Σ_P partials, in an order that P alone decides."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (d < D)[None, :]
        rows = partials_PD + p.to(tl.int64)[:, None] * D + d[None, :]
        sums += tl.load(rows, mask=inside, other=0.0)
    total = round_to(tl.sum(sums, axis=0), grad_weight_D.dtype.element_ty)
    tl.store(grad_weight_D + d, total, mask=d < D)
