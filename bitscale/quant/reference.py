"""The specification of ternary training, in plain PyTorch. Fused kernels are its twins.

Shapes: T tokens (all leading dimensions flattened), D inputs, F outputs of a linear layer.

Weights (arXiv:2402.17764, eq. 1-3): s = max(mean|w|, eps) over the whole logical matrix,
code = clip(round(w / s), −1, 1), ŵ = s · code. `absmedian` (arXiv:2407.09527) takes the lower
median of |w| instead of the mean.
Activations, per token: r = max(max|x|, eps) / 127, code = clip(round(x / r), −128, 127),
x̂ = r · code.
Both in fp32, from the fp32 or 16-bit latent, rounding half to even.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bitscale.config import QuantConfig
from bitscale.quant.schedule import Strength

ACTIVATION_MAX = 127.0
# fp32 adds integers exactly up to 2^24 and a product of codes is at most 128.
MAX_EXACT_INPUTS = 2**24 // 128


class Ternary(NamedTuple):
    codes_FD: Tensor  # int8 in {-1, 0, 1}
    scale: Tensor  # fp32 scalar > 0


class Int8Rows(NamedTuple):
    codes_TD: Tensor  # int8 in [-128, 127]
    scale_T1: Tensor  # fp32 > 0, one per token


def weight_scale(w_FD: Tensor, quant: QuantConfig) -> Tensor:
    """fp32 scalar: mean (summed in fp64) or lower median of |w|, at least eps."""
    magnitude_FD = w_FD.detach().float().abs()
    if quant.weight_scale == "absmean":
        scale = (magnitude_FD.sum(dtype=torch.float64) / magnitude_FD.numel()).float()
    else:
        scale = magnitude_FD.flatten().median()
    # Not clamp: a NaN weight must stay visible.
    return torch.where(scale < quant.eps, scale.new_tensor(quant.eps), scale)


def ternarize(w_FD: Tensor, quant: QuantConfig) -> Ternary:
    """Ternary codes and scale of one logical matrix of any floating dtype."""
    scale = weight_scale(w_FD, quant)
    codes_FD = torch.round(w_FD.detach().float() / scale).clamp_(-1, 1).to(torch.int8)
    return Ternary(codes_FD, scale)


def quantize_rows(x_TD: Tensor, eps: float) -> Int8Rows:
    """Int8 codes of each row (token) by its own absolute maximum."""
    x_TD = x_TD.detach().float()
    peak_T1 = x_TD.abs().amax(dim=-1, keepdim=True)
    scale_T1 = torch.where(peak_T1 < eps, peak_T1.new_tensor(eps), peak_T1) / ACTIVATION_MAX
    codes_TD = torch.round(x_TD / scale_T1).clamp_(-128, 127).to(torch.int8)
    return Int8Rows(codes_TD, scale_T1)


def bit_linear(
    x_TD: Tensor, w_FD: Tensor, bias_F: Tensor | None, strength: Strength, quant: QuantConfig
) -> Tensor:
    """Linear layer at quantization strength λ; same dtype and leading shape as `x_TD`.

    Gradients pass straight through the rounding to x and w. λ = 0 is bitwise `F.linear`;
    λ = 1 multiplies codes, sums integers exactly (D <= 131,072) and dequantizes once.

    Raises:
        ValueError: λ = 1 with more inputs than fp32 can sum exactly.
    """
    weight, activation = strength
    if quant.activation_bits == 16:
        activation = 0.0
    if weight == 0.0 and activation == 0.0:
        return F.linear(x_TD, w_FD, bias_F)
    if weight == 1.0 and activation == 1.0:
        if w_FD.shape[1] > MAX_EXACT_INPUTS:
            raise ValueError(
                f"{w_FD.shape[1]} inputs exceed {MAX_EXACT_INPUTS}, the most that fp32 sums of "
                "int8 x ternary products hold exactly; split the matrix"
            )
        y_TF = _TernaryLinear.apply(x_TD, w_FD, bias_F, quant)  # type: ignore[no-untyped-call]
        return cast(Tensor, y_TF)
    x_TD = _blend(x_TD, _dequantized_rows(x_TD, quant.eps), activation) if activation else x_TD
    w_FD = _blend(w_FD, _dequantized_ternary(w_FD, quant), weight) if weight else w_FD
    return F.linear(x_TD, w_FD, bias_F)


def int8_linear(x_TD: Tensor, w_FD: Tensor, strength: Strength, quant: QuantConfig) -> Tensor:
    """Linear layer with 8-bit weights per output row and 8-bit activations (the 8-bit head)."""
    weight, activation = strength
    if activation:
        x_TD = _blend(x_TD, _dequantized_rows(x_TD, quant.eps), activation)
    if weight:
        w_FD = _blend(w_FD, _dequantized_rows(w_FD, quant.eps), weight)
    return F.linear(x_TD, w_FD)


def _dequantized_rows(x_TD: Tensor, eps: float) -> Tensor:
    codes_TD, scale_T1 = quantize_rows(x_TD, eps)
    return codes_TD.float() * scale_T1


def _dequantized_ternary(w_FD: Tensor, quant: QuantConfig) -> Tensor:
    codes_FD, scale = ternarize(w_FD, quant)
    return codes_FD.float() * scale


def _blend(latent: Tensor, quantized: Tensor, strength: float) -> Tensor:
    """latent + λ (quantized − latent), computed in fp32; the gradient goes to `latent` whole."""
    blended = _StraightThrough.apply(latent, quantized, strength)  # type: ignore[no-untyped-call]
    return cast(Tensor, blended)


def ternary_linear(
    x_TD: Tensor, weight: Ternary, bias_F: Tensor | None, quant: QuantConfig
) -> Tensor:
    """The λ = 1 forward pass from codes, without gradient: the exact pass that training ran."""
    if quant.activation_bits == 16:
        w_FD = (weight.codes_FD.float() * weight.scale).to(x_TD.dtype)
        return F.linear(x_TD, w_FD, bias_F)
    return _integer_forward(quantize_rows(x_TD, quant.eps), weight, bias_F).to(x_TD.dtype)


def _integer_forward(x: Int8Rows, weight: Ternary, bias_F: Tensor | None) -> Tensor:
    """fp32 (Σ int8 · code) · r · s + bias."""
    # Integers in fp32: exact in any order, so the sum does not depend on the layout.
    sums_TF = x.codes_TD.float() @ weight.codes_FD.float().T
    y_TF = sums_TF * x.scale_T1 * weight.scale
    return y_TF if bias_F is None else y_TF + bias_F.float()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, latent: Tensor, quantized: Tensor, strength: float) -> Tensor:
        if strength == 1.0:
            return quantized.to(latent.dtype)
        return torch.lerp(latent.float(), quantized, strength).to(latent.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _TernaryLinear(torch.autograd.Function):
    """λ = 1. Saves int8 codes and scales, never a floating copy of an input or weight."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TD: Tensor,
        w_FD: Tensor,
        bias_F: Tensor | None,
        quant: QuantConfig,
    ) -> Tensor:
        x, weight = quantize_rows(x_TD, quant.eps), ternarize(w_FD, quant)
        ctx.save_for_backward(*x, *weight)
        ctx.weight_dtype = w_FD.dtype  # type: ignore[attr-defined]
        return _integer_forward(x, weight, bias_F).to(x_TD.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x_codes_TD, x_scale_T1, w_codes_FD, w_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_w, needs_bias, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        dtype = grads[0].dtype
        grad_TF = grads[0].float()
        grad_x = grad_w = grad_bias = None
        if needs_x:
            grad_x = ((grad_TF @ w_codes_FD.float()) * w_scale).to(dtype)
        if needs_w:
            x_hat_TD = (x_codes_TD.float() * x_scale_T1).flatten(0, -2)
            grad_w = (grad_TF.flatten(0, -2).T @ x_hat_TD).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        if needs_bias:
            grad_bias = grad_TF.flatten(0, -2).sum(0).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return grad_x, grad_w, grad_bias, None
