"""The λ = 1 linear layer on a table of kernels.

Shapes: T tokens (all leading dimensions), D inputs, F outputs.
"""

from typing import cast

import torch
from torch import Tensor

from bitscale.quant.kernels.table import Kernels
from bitscale.quant.reference import MAX_EXACT_INPUTS, Int8Rows, Ternary


def ternary_linear(
    x_TD: Tensor,
    w_FD: Tensor,
    bias_F: Tensor | None,
    x: Int8Rows,
    weight: Ternary,
    kernels: Kernels,
    main_grad_FD: Tensor | None = None,
) -> Tensor:
    """y [T, F] in the dtype of `x_TD`, from codes that the caller made with `kernels`.

    `x_TD` and `w_FD` (the latent weight) only receive the gradients, straight through. Layers
    that read one input share its codes `x`, and the codes of a weight serve every micro-batch of
    a step. Saved for backward are the codes and scales: D + 4 bytes a token for each distinct
    input. With `main_grad_FD` (fp32) the gradient of the weight is added to it, and `w_FD`
    receives none.

    Raises:
        ValueError: more inputs than fp32 can sum exactly.
    """
    if w_FD.shape[1] > MAX_EXACT_INPUTS:
        raise ValueError(
            f"{w_FD.shape[1]} inputs exceed {MAX_EXACT_INPUTS}, the most whose int8 x ternary "
            "products fp32 holds exactly; split the matrix"
        )
    y_TF = _TernaryLinear.apply(  # type: ignore[no-untyped-call]
        x_TD, w_FD, bias_F, *x, *weight, kernels, main_grad_FD
    )
    return cast(Tensor, y_TF)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TD: Tensor,
        w_FD: Tensor,
        bias_F: Tensor | None,
        x_codes_TD: Tensor,
        x_scale_T1: Tensor,
        w_codes_FD: Tensor,
        w_scale: Tensor,
        kernels: Kernels,
        main_grad_FD: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_codes_TD, x_scale_T1, w_codes_FD, w_scale)
        ctx.kernels, ctx.main_grad_FD = kernels, main_grad_FD  # type: ignore[attr-defined]
        ctx.weight_dtype = w_FD.dtype  # type: ignore[attr-defined]
        x, weight = Int8Rows(x_codes_TD, x_scale_T1), Ternary(w_codes_FD, w_scale)
        return kernels.integer_linear(x, weight, bias_F, x_TD.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_codes_TD, x_scale_T1, w_codes_FD, w_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
        kernels: Kernels = ctx.kernels  # type: ignore[attr-defined]
        main_grad_FD: Tensor | None = ctx.main_grad_FD  # type: ignore[attr-defined]
        dtype: torch.dtype = ctx.weight_dtype  # type: ignore[attr-defined]
        grad_TF = grads[0]
        grad_x = grad_w = grad_bias = None
        if needs_x:
            grad_x = kernels.input_grad(grad_TF, Ternary(w_codes_FD, w_scale))
        if needs_w:
            x = Int8Rows(x_codes_TD, x_scale_T1)
            grad_w = kernels.weight_grad(grad_TF, x, dtype, main_grad_FD)
        if needs_bias:
            grad_bias = grad_TF.flatten(0, -2).sum(0, dtype=torch.float32).to(dtype)
        if main_grad_FD is not None:
            grad_w = None
        return grad_x, grad_w, grad_bias, None, None, None, None, None, None
