"""The λ = 1 linear layer, and the norm before it, on a table of kernels.

Shapes: T tokens (all leading dimensions), D inputs, F outputs.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bitscale.quant.kernels.table import GradientBits, Kernels
from bitscale.quant.packed_matrix import PackedTernary
from bitscale.quant.reference import MAX_EXACT_INPUTS, Int8Rows, Ternary
from bitscale.quant.surroundings import refuse_second_derivative


class NormedInput(NamedTuple):
    """The codes of RMSNorm(x), without RMSNorm(x) itself."""

    carrier_TD: Tensor  # takes the gradient with respect to the normed rows; its values are NaN
    rows: Int8Rows


def ternary_linear(
    x_TD: Tensor,
    w_FD: Tensor,
    bias_F: Tensor | None,
    x: Int8Rows,
    weight: Ternary | PackedTernary,
    kernels: Kernels,
    *,
    bits: GradientBits = None,
    main_grad_FD: Tensor | None = None,
) -> Tensor:
    """y [T, F] in the dtype of `x_TD`, from codes that the caller made with `kernels`.

    `x_TD` and `w_FD` (the latent weight) only receive the gradients, straight through. Layers
    that read one input share its codes `x`, and the codes of a weight serve every micro-batch of
    a step. A weight of several logical matrices has a scale for each output, [F]. Saved for
    backward are the codes and scales: D + 4 bytes a token for each distinct input. `bits`: of the
    gradient in the backward products (plain_backward.py). A packed weight is unpacked here and once
    more in the backward pass, for which it is kept packed.

    With `main_grad_FD` (fp32) the gradient of the weight is added to it. Then `w_FD` receives
    none, unless it has Megatron's attribute `grad_added_to_main_grad`: that is set, and `w_FD`
    receives an uninitialized gradient, whose arrival is what Megatron waits for.

    Raises:
        ValueError: more inputs than fp32 can sum exactly.
    """
    if w_FD.shape[1] > MAX_EXACT_INPUTS:
        raise ValueError(
            f"{w_FD.shape[1]} inputs exceed {MAX_EXACT_INPUTS}, the most whose int8 x ternary "
            "products fp32 holds exactly; split the matrix"
        )
    codes = unpacked(weight)
    packed = weight if isinstance(weight, PackedTernary) else None
    carrier_TF = keep_for_grads(x_TD, w_FD, bias_F, x, codes, kernels, bits, main_grad_FD, packed)
    y_TF = _Product.apply(carrier_TF, bias_F, *x, *codes, kernels)  # type: ignore[no-untyped-call]
    return cast(Tensor, y_TF)


def unpacked(weight: Ternary | PackedTernary) -> Ternary:
    """As the kernels read it."""
    return weight.unpack() if isinstance(weight, PackedTernary) else weight


def keep_for_grads(
    x_TD: Tensor,
    w_FD: Tensor,
    bias_F: Tensor | None,
    x: Int8Rows,
    weight: Ternary,
    kernels: Kernels,
    bits: GradientBits,
    main_grad_FD: Tensor | None,
    packed: PackedTernary | None = None,
) -> Tensor:
    """A stand-in [T, F] for the product, whose gradient becomes those of x, w and the bias.

    `packed`: the same codes, to be kept in their place.

    What these need is saved here, before anything is multiplied, so that activation checkpointing,
    which recomputes up to the last saved tensor, does not multiply (or sum over ranks) again.
    """
    carrier_TF = _Grads.apply(  # type: ignore[no-untyped-call]
        x_TD, w_FD, bias_F, *x, *weight, kernels, bits, main_grad_FD, packed
    )
    return cast(Tensor, carrier_TF)


def rms_norm_rows(
    x_TD: Tensor, weight_D: Tensor | None, norm_eps: float, eps: float, kernels: Kernels
) -> NormedInput:
    """Codes of RMSNorm(x) in one pass; saved for backward are x, which is the residual stream
    anyway, and 4 bytes a token."""
    carrier_TD, codes_TD, scale_T1 = _NormRows.apply(  # type: ignore[no-untyped-call]
        x_TD, weight_D, norm_eps, eps, kernels
    )
    return NormedInput(carrier_TD, Int8Rows(codes_TD, scale_T1))


class _Grads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_FD: Tensor,
        bias_F: Tensor | None,
        x_codes_TD: Tensor,
        x_scale_T1: Tensor,
        w_codes_FD: Tensor,
        w_scale: Tensor,
        kernels: Kernels,
        bits: GradientBits,
        main_grad_FD: Tensor | None,
        packed: PackedTernary | None,
    ) -> Tensor:
        weight = () if packed is not None else (w_codes_FD, w_scale)
        ctx.save_for_backward(x_codes_TD, x_scale_T1, *weight)
        ctx.packed = packed
        ctx.kernels, ctx.bits, ctx.main_grad_FD = kernels, bits, main_grad_FD
        ctx.weight_dtype = w_FD.dtype
        ctx.weight = None if main_grad_FD is None else w_FD
        nan = x_TD.new_full((), float("nan"))  # seen as a matrix, without memory of its own
        return nan.expand(*x_codes_TD.shape[:-1], w_codes_FD.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad_TF = grads[0]
        x_codes_TD, x_scale_T1, *weight = ctx.saved_tensors
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            codes = Ternary(*weight) if ctx.packed is None else ctx.packed.unpack()
            grad_x = _input_grad(ctx.kernels, grad_TF, codes, ctx.bits)
        if ctx.needs_input_grad[1]:
            rows = Int8Rows(x_codes_TD, x_scale_T1)
            grad_w = ctx.kernels.weight_grad(
                grad_TF, rows, ctx.weight_dtype, ctx.main_grad_FD, ctx.bits
            )
            if ctx.main_grad_FD is not None:
                grad_w = _placeholder_grad(ctx.weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_TF.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.weight_dtype)
        return grad_x, grad_w, grad_bias, *[None] * 8


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        carrier_TF: Tensor,
        bias_F: Tensor | None,
        x_codes_TD: Tensor,
        x_scale_T1: Tensor,
        w_codes_FD: Tensor,
        w_scale: Tensor,
        kernels: Kernels,
    ) -> Tensor:
        x, weight = Int8Rows(x_codes_TD, x_scale_T1), Ternary(w_codes_FD, w_scale)
        return _product(kernels, x, weight, bias_F, carrier_TF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None, None, None


def _product(
    kernels: Kernels, x: Int8Rows, weight: Ternary, bias_F: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(Σ int8 · code) · r · s + bias in `dtype`; s a scalar, or one for each output, [F]."""
    if not weight.scale.dim():
        return kernels.integer_linear(x, weight, bias_F, dtype)
    one = torch.ones((), dtype=torch.float32, device=weight.scale.device)
    y_TF = kernels.integer_linear(x, Ternary(weight.codes_FD, one), None, torch.float32)
    y_TF = y_TF * weight.scale
    return (y_TF if bias_F is None else y_TF + bias_F.float()).to(dtype)


def _input_grad(kernels: Kernels, grad_TF: Tensor, weight: Ternary, bits: GradientBits) -> Tensor:
    """∂L/∂x [T, D]; s a scalar, or one for each output, [F], which then enters before the sum."""
    if not weight.scale.dim():
        return kernels.input_grad(grad_TF, weight, bits)
    one = torch.ones((), dtype=torch.float32, device=weight.scale.device)
    scaled_TF = (grad_TF.float() * weight.scale).to(grad_TF.dtype)
    return kernels.input_grad(scaled_TF, Ternary(weight.codes_FD, one), bits)


def _placeholder_grad(weight: Tensor) -> Tensor | None:
    """What `weight` receives as its gradient when that went into main_grad."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_D: Tensor | None,
        norm_eps: float,
        eps: float,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes_TD, scale_T1, rstd_T1 = kernels.rms_norm_quantize_rows(x_TD, weight_D, norm_eps, eps)
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(codes_TD, scale_T1)
        dtype = x_TD.dtype if weight_D is None else torch.promote_types(x_TD.dtype, weight_D.dtype)
        # One value seen as a matrix: it has no memory of its own, and whoever reads it notices.
        carrier_TD = x_TD.new_full((), float("nan"), dtype=dtype).expand(x_TD.shape)
        return carrier_TD, codes_TD, scale_T1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        grad_x, grad_weight = ctx.kernels.rms_norm_grad(grads[0], x_TD, rstd_T1, weight_D)
        return grad_x, grad_weight, None, None, None
