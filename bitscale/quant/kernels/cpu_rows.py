"""Codes, norms and blends of `kernel: cpu`: one pass in C (cpu_rows.c) over rows or weights.

Every function is an operator of torch.library: torch.compile keeps it whole, without a break in
its graph. Shapes: T tokens, D inputs, F outputs of a linear layer, N = F·D weights.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor

from bitscale.quant.kernels.cpu_library import (
    BINS,
    TILE,
    WEIGHTS_PER_BLOCK,
    dtype_number,
    empty,
    launch,
    matrix,
    rows_of,
)
from bitscale.quant.kernels.table import Measure, NormedRows
from bitscale.quant.reference import Int8Rows, Ternary

# From so many inputs on, torch sums a single row in parts, one a thread.
_TWO_PASS_SUM = 32_768
_NORM_BLOCKS = 64  # partial sums of the norm's gradient, whatever the number of threads


def ternarize(w_FD: Tensor, measure: Measure, eps: float) -> Ternary:
    """Twin of `plain.ternarize`."""
    return Ternary(*_ternarize(w_FD.detach(), measure, eps))


def sum_of_magnitudes(w_N: Tensor) -> Tensor:
    """fp64 scalar: twin of `quantizer.exact_sum` of |w|."""
    partial = torch.empty(_num_blocks(w_N), dtype=torch.float64)
    _launch_weights("abs_sum", w_N, TILE, partial=partial)
    return partial.sum()


def write_codes(w_N: Tensor, scale: Tensor, codes_N: Tensor) -> None:
    """Ternary codes of a part of a matrix, by the scale of the whole, to int8 `codes_N`."""
    assert codes_N.is_contiguous() and codes_N.dtype == torch.int8
    _launch_weights("ternary_codes", w_N, TILE, codes=codes_N, scale=scale)


def blend_weight(w_FD: Tensor, measure: Measure, eps: float, strength: float) -> Tensor:
    """Twin of `plain.blend_weight`."""
    return cast(Tensor, _blend_weight(w_FD.detach(), measure, eps, strength))


def quantize_rows(x_TD: Tensor, eps: float) -> Int8Rows:
    """Twin of `plain.quantize_rows`."""
    return Int8Rows(*_quantize_rows(x_TD.detach(), eps))


def blend_rows(x_TD: Tensor, eps: float, strength: float) -> Tensor:
    """Twin of `plain.blend_rows`."""
    return cast(Tensor, _blend_rows(x_TD.detach(), eps, strength))


def rms_norm_quantize_rows(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float
) -> NormedRows:
    """Twin of `plain.rms_norm_quantize_rows`; rstd too has its bits, and so the codes."""
    weight_D = None if weight_D is None else weight_D.detach()
    return NormedRows(*_rms_norm_quantize_rows(x_TD.detach(), weight_D, norm_eps, eps))


def rms_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Twin of `plain_backward.rms_norm_grad`."""
    grad_x_TD, grad_weight_D = _rms_norm_grad(grad_TD, x_TD, rstd_T1, weight_D)
    return grad_x_TD, None if weight_D is None else grad_weight_D


# --- Weights ---


@torch.library.custom_op("bitscale_cpu::ternarize", mutates_args=())
def _ternarize(w_FD: Tensor, measure: str, eps: float) -> tuple[Tensor, Tensor]:
    w_FD = w_FD.contiguous()
    scale = _scale(w_FD, measure, eps)
    codes_FD = empty(*w_FD.shape, dtype=torch.int8)
    _launch_weights("ternary_codes", w_FD, TILE, codes=codes_FD, scale=scale)
    return codes_FD, scale


@_ternarize.register_fake
def _(w_FD: Tensor, measure: str, eps: float) -> tuple[Tensor, Tensor]:
    return (
        w_FD.new_empty(w_FD.shape, dtype=torch.int8),
        w_FD.new_empty((), dtype=torch.float32),
    )


@torch.library.custom_op("bitscale_cpu::blend_weight", mutates_args=())
def _blend_weight(w_FD: Tensor, measure: str, eps: float, strength: float) -> Tensor:
    w_FD = w_FD.contiguous()
    blended_FD = empty(*w_FD.shape, dtype=w_FD.dtype)
    _launch_weights(
        "blend_weights", w_FD, 2 * TILE, out=matrix(blended_FD.view(-1)),
        scale=_scale(w_FD, measure, eps), strength=strength,
    )  # fmt: skip
    return blended_FD


@_blend_weight.register_fake
def _(w_FD: Tensor, measure: str, eps: float, strength: float) -> Tensor:
    return w_FD.new_empty(w_FD.shape)


def _scale(w_FD: Tensor, measure: str, eps: float) -> Tensor:
    """fp32 max(mean|w| or lower median|w|, eps)."""
    if measure == "absmedian":
        return _median_magnitude(w_FD).clamp(min=eps)
    return (sum_of_magnitudes(w_FD) / w_FD.numel()).clamp(min=eps).float()


def _median_magnitude(w_FD: Tensor) -> Tensor:
    """Lower median of |w|, or NaN: the upper 16 bits of its pattern first, then the lower 15."""
    rank = (w_FD.numel() - 1) // 2
    counts = _count_magnitudes(w_FD, -1)
    if counts[-1] != counts[-2]:
        return torch.tensor(float("nan"))
    upper = int(torch.searchsorted(counts, rank, right=True))
    below = int(counts[upper - 1]) if upper else 0
    lower = int(torch.searchsorted(_count_magnitudes(w_FD, upper), rank - below, right=True))
    return torch.tensor((upper << 15) + lower, dtype=torch.int32).view(torch.float32)


def _count_magnitudes(w_FD: Tensor, upper: int) -> Tensor:
    """Numbers of |w| in the bins up to each of them (cpu_rows.c: count_magnitudes)."""
    width = -(-w_FD.numel() // torch.get_num_threads())
    blocks = -(-w_FD.numel() // width)
    counts = torch.empty(blocks, BINS, dtype=torch.int32)
    launch(
        "count_magnitudes", blocks, TILE, columns=w_FD.numel(), width=width, first=upper,
        sums=counts, **{"in": matrix(w_FD.view(-1))},
    )  # fmt: skip
    return counts.sum(dim=0).cumsum(dim=0)


def _launch_weights(kernel: str, w_FD: Tensor, scratch: int, **fields: object) -> None:
    fields |= {"in": matrix(w_FD.view(-1)), "columns": w_FD.numel()}
    launch(kernel, _num_blocks(w_FD), scratch, **fields)  # type: ignore[arg-type]


def _num_blocks(w_FD: Tensor) -> int:
    return -(-w_FD.numel() // WEIGHTS_PER_BLOCK)


# --- Activations ---


@torch.library.custom_op("bitscale_cpu::quantize_rows", mutates_args=())
def _quantize_rows(x_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    codes_TD, scale_T1 = _empty_rows(x_TD)
    _launch_rows(
        "quantize_row", rows_of(x_TD), 2, codes=codes_TD, row_scale=scale_T1, eps=eps
    )  # fmt: skip
    return codes_TD, scale_T1


@_quantize_rows.register_fake
def _(x_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_rows(x_TD)


@torch.library.custom_op("bitscale_cpu::rms_norm_quantize_rows", mutates_args=())
def _rms_norm_quantize_rows(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes_TD, scale_T1 = _empty_rows(x_TD)
    in_one_pass = x_TD.stride(-1) == 1 and x_TD.shape[-1] < _TWO_PASS_SUM and _sums_as_torch()
    rstd_T1 = torch.empty_like(scale_T1) if in_one_pass else plain_rstd(x_TD, norm_eps)
    normed_dtype = x_TD.dtype
    if weight_D is not None:
        normed_dtype = torch.promote_types(x_TD.dtype, weight_D.dtype)
    _launch_rows(
        "quantize_row", rows_of(x_TD), 2, codes=codes_TD, row_scale=scale_T1, rstd=rstd_T1,
        vector=_vector(weight_D), normed_dtype=dtype_number(normed_dtype), eps=eps,
        norm_eps=norm_eps, flag=int(in_one_pass),
    )  # fmt: skip
    return codes_TD, scale_T1, rstd_T1


@_rms_norm_quantize_rows.register_fake
def _(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes_TD, scale_T1 = _empty_rows(x_TD)
    return codes_TD, scale_T1, torch.empty_like(scale_T1)


def plain_rstd(x_TD: Tensor, norm_eps: float) -> Tensor:
    """1 / sqrt(mean x² + eps) [T, 1] by the operations of plain.py."""
    mean_T1 = x_TD.float().square().mean(dim=-1, keepdim=True)
    return torch.rsqrt(mean_T1 + norm_eps).contiguous()


@cache
def _sums_as_torch() -> bool:
    """Whether cpu_rows.c adds squares in the order of this torch on this processor.

    Otherwise a norm needs passes of its own for rstd, as its codes must be plain.py's.
    """
    generator = torch.Generator().manual_seed(0)
    for D in (1, 4, 5, 6, 7, 60, 1000, 4096, 20_011):
        x_TD = torch.randn(8, D, generator=generator)
        codes_TD, scale_T1 = _empty_rows(x_TD)
        rstd_T1 = torch.empty_like(scale_T1)
        _launch_rows(
            "quantize_row", x_TD, 2, codes=codes_TD, row_scale=scale_T1, rstd=rstd_T1, flag=1,
            eps=1e-5, norm_eps=1e-6,
        )  # fmt: skip
        if not torch.equal(rstd_T1, plain_rstd(x_TD, 1e-6)):
            return False
    return True


@torch.library.custom_op("bitscale_cpu::rms_norm_grad", mutates_args=())
def _rms_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_x_TD = empty(*x_TD.shape, dtype=x_TD.dtype)
    grad, x = rows_of(grad_TD), rows_of(x_TD)
    T, D = x.shape
    width = max(1, -(-T // _NORM_BLOCKS))
    blocks = -(-T // width)
    partial_D = torch.empty(blocks, 0 if weight_D is None else D)
    launch(
        "rms_norm_grad", blocks, 4 * D, other=matrix(x), out=matrix(grad_x_TD.view(T, D)),
        rstd=rstd_T1.contiguous(), vector=_vector(weight_D), sums=partial_D, rows=T, columns=D,
        width=width, **{"in": matrix(grad)},
    )  # fmt: skip
    grad_weight_D = partial_D.sum(dim=0)
    return grad_x_TD, grad_weight_D if weight_D is None else grad_weight_D.to(weight_D.dtype)


@_rms_norm_grad.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(0) if weight_D is None else (
        torch.empty_like(weight_D)
    )


@torch.library.custom_op("bitscale_cpu::blend_rows", mutates_args=())
def _blend_rows(x_TD: Tensor, eps: float, strength: float) -> Tensor:
    x = rows_of(x_TD)
    blended_TD = empty(*x_TD.shape, dtype=x_TD.dtype)
    _launch_rows(
        "blend_row", x, 2, out=matrix(blended_TD.view(x.shape)), eps=eps, strength=strength
    )  # fmt: skip
    return blended_TD


@_blend_rows.register_fake
def _(x_TD: Tensor, eps: float, strength: float) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _launch_rows(kernel: str, x_TD: Tensor, buffers: int, **fields: object) -> None:
    """One block a row; `buffers`: fp32 copies of a row that it needs."""
    T, D = x_TD.shape
    fields |= {"in": matrix(x_TD), "rows": T, "columns": D}
    launch(kernel, T, buffers * D, **fields)  # type: ignore[arg-type]


def _empty_rows(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) to be written."""
    return (
        x_TD.new_empty(x_TD.shape, dtype=torch.int8),
        x_TD.new_empty((*x_TD.shape[:-1], 1), dtype=torch.float32),
    )


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()
