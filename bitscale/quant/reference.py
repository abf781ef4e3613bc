"""The specification of quantized training, in plain PyTorch. Fused kernels are its twins.

Shapes: T tokens (all leading dimensions flattened), D inputs, F outputs of a linear layer.

Every preset of `config/presets.py` is computed here. The default, b158 (arXiv:2402.17764, eq. 1-3):
weights s = max(mean|w|, eps) over the whole logical matrix, code = clip(round(w / s), −1, 1),
ŵ = s · code; activations, per token, r = max(max|x|, eps) / 127,
code = clip(round(x / r), −128, 127), x̂ = r · code; both in fp32, from the fp32 or 16-bit latent,
rounding half to even.

Where the codes' products can be summed exactly (`product: integer`), λ = 1 does so and dequantizes
once. The other presets, and every λ between 0 and 1, go through a floating-point product: it
depends on the order of summation, as the peers they reproduce do.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bitscale.config import QuantConfig, quant_spec
from bitscale.config.presets import INT8_ROWS
from bitscale.config.spec import CodeSpec, QuantSpec, max_exact_inputs
from bitscale.errors import ConfigError
from bitscale.quant.learned import inside_clip, with_scale_gradient, with_zero_gradient
from bitscale.quant.quantizer import Codes, dequantize, inside_range, quantize, step
from bitscale.quant.schedule import Strength
from bitscale.quant.surroundings import matmul, refuse_second_derivative

ACTIVATION_MAX = 127.0  # b158's
MAX_EXACT_INPUTS = 2**24 // 128  # b158's: a product of its codes is at most 128
_LAYER_NORM_EPS = 1e-5

# A configuration's section, or the specification that follows from it.
Quant = QuantConfig | QuantSpec


class Ternary(NamedTuple):
    """ŵ = scale · codes. Ternary for most presets; int8 codes of other ranges otherwise."""

    codes_FD: Tensor  # int8 in {-1, 0, 1}
    scale: Tensor  # fp32 > 0; scalar for one matrix, else [A, B] tiles (quantizer.py)


class Int8Rows(NamedTuple):
    codes_TD: Tensor  # int8 in [-128, 127]
    scale_T1: Tensor  # fp32 > 0, one per token


def as_spec(quant: Quant) -> QuantSpec:
    return quant if isinstance(quant, QuantSpec) else quant_spec(quant)


def weight_scale(w_FD: Tensor, quant: Quant, alpha_F: Tensor | None = None) -> Tensor:
    """The weight's scale: fp32 scalar for one matrix, else [A, B] tiles."""
    return ternarize(w_FD, quant, alpha_F=alpha_F).scale


def ternarize(
    w_FD: Tensor,
    quant: Quant,
    rows: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    alpha_F: Tensor | None = None,
) -> Ternary:
    """Codes and scale of a weight of any floating dtype.

    `rows`: a fused parameter holds several logical matrices of so many rows each, stacked; each
    is quantized alone, and the scale comes as one per row, [F, B]. `generator` and `alpha_F` (of
    all rows) as in `quantize`.
    The codes are those of the rotated weight if the spec rotates.
    """
    spec = as_spec(quant)
    part = spec.weight
    codes = _quantize_weight(_rotate(w_FD.detach(), spec), part, rows, generator, alpha_F)
    return Ternary(codes.codes, step(codes, part))


def weight_codes(
    w_FD: Tensor,
    quant: Quant,
    rows: Sequence[int] | None = None,
    alpha_F: Tensor | None = None,
) -> Codes:
    """The codes that `bit_linear` makes of a weight, to be made once for several calls."""
    spec = as_spec(quant)
    return _quantize_weight(_rotate(w_FD.detach(), spec), spec.weight, rows, alpha_F=alpha_F)


def straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in the dtype of `latent`, which receives its gradient whole."""
    return cast(Tensor, _StraightThrough.apply(latent, quantized, 1.0))  # type: ignore[no-untyped-call]


def quantize_rows(x_TD: Tensor, eps: float) -> Int8Rows:
    """b158's int8 codes of each row (token) by its own absolute maximum."""
    part = INT8_ROWS if eps == INT8_ROWS.eps else replace(INT8_ROWS, eps=eps)
    return Int8Rows(*_quantize_tokens(x_TD, part))


def bit_linear(
    x_TD: Tensor,
    w_FD: Tensor,
    bias_F: Tensor | None,
    strength: Strength,
    quant: Quant,
    rows: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    alpha_F: Tensor | None = None,
    codes: Codes | None = None,
) -> Tensor:
    """Linear layer at quantization strength λ; same dtype and leading shape as `x_TD`.

    Gradients pass straight through the rounding to x and w (to w only inside the range of codes,
    if the spec says `gradient: clip`). λ = 0 is bitwise `F.linear`, after the spec's norm if it
    has one. At λ = 1 and `product: integer` codes are multiplied, summed exactly and dequantized
    once. `rows`, `generator` and `alpha_F` as in `ternarize`; α gets a gradient of 0 at λ = 0.
    `codes` are those of `weight_codes`, if the caller has them. A residual strength ε adds ε x wᵀ.

    Raises:
        ValueError: λ = 1 with more inputs than fp32 can sum exactly (131,072 for b158); learned
            scales are missing or superfluous.
    """
    spec = as_spec(quant)
    if spec.norm == "layernorm":
        x_TD = F.layer_norm(x_TD, x_TD.shape[-1:], eps=_LAYER_NORM_EPS)
    if strength.weight == 0.0 and alpha_F is not None:
        w_FD = with_zero_gradient(w_FD, alpha_F)
    if strength.weight == 0.0 and (strength.activation == 0.0 or spec.activation is None):
        y_TF = F.linear(x_TD, w_FD, bias_F)
    else:
        y_TF = _quantized_linear(
            x_TD, w_FD, bias_F, strength, spec, rows, generator, alpha_F, codes
        )
    if strength.residual == 0.0:
        return y_TF
    return torch.add(y_TF, F.linear(x_TD, w_FD), alpha=strength.residual)


def _quantized_linear(
    x_TD: Tensor,
    w_FD: Tensor,
    bias_F: Tensor | None,
    strength: Strength,
    spec: QuantSpec,
    rows: Sequence[int] | None,
    generator: torch.Generator | None,
    alpha_F: Tensor | None,
    codes: Codes | None,
) -> Tensor:
    """`bit_linear` where something is quantized, without norm and residual."""
    weight, activation, _ = strength
    if spec.activation is None:
        activation = 0.0
    x_TD, w_FD = _rotate(x_TD, spec), _rotate(w_FD, spec)
    w_codes = None
    if weight:
        w_codes = codes or _quantize_weight(w_FD, spec.weight, rows, generator, alpha_F)
    if w_codes is not None:
        bias_F = _with_deadzone(bias_F, w_FD, w_codes, weight, spec)
        w_FD = _masked_gradient(w_FD, w_codes, spec, alpha_F)
    if spec.product == "codes":
        return _codes_linear(x_TD, w_FD, w_codes, bias_F, strength, spec)
    if weight == 1.0 and activation == 1.0 and spec.product == "integer":
        assert w_codes is not None
        _check_exact(w_FD.shape[1], spec)
        if spec.gradient == "trust":
            assert spec.activation is not None
            x_codes = _quantize_tokens(x_TD, spec.activation)
            mask_TD = (x_TD.detach() - x_codes.codes * x_codes.scale).abs() <= x_codes.scale
            x_TD = _masked(x_TD, mask_TD)
        y_TF = _IntegerLinear.apply(x_TD, w_FD, bias_F, w_codes, spec)  # type: ignore[no-untyped-call]
        return cast(Tensor, y_TF)
    if w_codes is not None:
        w_FD = _blend_codes(w_FD, w_codes, weight, spec, alpha_F, rows)
    return F.linear(blend_tokens(x_TD, activation, spec), w_FD, bias_F)


def blend_tokens(x_TD: Tensor, strength: float, quant: Quant) -> Tensor:
    """x + λ (x̂ − x), the gradient straight through; λ = 0 gives back `x_TD` itself."""
    spec = as_spec(quant)
    if strength == 0.0 or spec.activation is None:
        return x_TD
    if spec.gradient == "trust":
        codes, scale = _quantize_tokens(x_TD, spec.activation)
        x_TD = _masked(x_TD, (x_TD.detach() - codes * scale).abs() <= scale)
    return _blend(x_TD, _dequantized_tokens(x_TD, spec.activation), strength, spec)


def blend_weight(
    w_FD: Tensor, strength: float, quant: Quant, alpha_F: Tensor | None = None
) -> Tensor:
    """w + λ (ŵ − w), the gradient as in `bit_linear`; λ = 0 gives back `w_FD` itself."""
    spec = as_spec(quant)
    if strength == 0.0:
        return w_FD
    codes = _quantize_weight(w_FD, spec.weight, alpha_F=alpha_F)
    w_FD = _masked_gradient(w_FD, codes, spec, alpha_F)
    return _blend_codes(w_FD, codes, strength, spec, alpha_F)


def finished_bias(
    w_FD: Tensor,
    bias_F: Tensor | None,
    quant: Quant,
    rows: Sequence[int] | None = None,
) -> Tensor | None:
    """The bias of a finished layer: its own, and the spec's share of weights whose code is 0."""
    spec = as_spec(quant)
    if not spec.deadzone_bias:
        return bias_F
    codes = _quantize_weight(w_FD, spec.weight, rows)
    return _with_deadzone(bias_F, w_FD.detach(), codes, 1.0, spec)


def int8_linear(x_TD: Tensor, w_FD: Tensor, strength: Strength, quant: Quant) -> Tensor:
    """Linear layer with 8-bit weights per output row and 8-bit activations (the 8-bit head)."""
    weight, activation, _ = strength
    spec = as_spec(quant)
    eps = spec.weight.eps
    if activation:
        x_TD = _blend(x_TD, _dequantized_rows(x_TD, eps), activation, spec)
    if weight:
        w_FD = _blend(w_FD, _dequantized_rows(w_FD, eps), weight, spec)
    return F.linear(x_TD, w_FD)


def ternary_linear(x_TD: Tensor, weight: Ternary, bias_F: Tensor | None, quant: Quant) -> Tensor:
    """The λ = 1 forward pass from codes, without gradient: the exact pass that training ran.

    `bias_F` is that of `finished_bias`.

    Raises:
        ValueError: the spec divides by q (`product: codes`), which the step does not give back.
    """
    spec = as_spec(quant)
    if spec.product == "codes":
        raise ValueError("product='codes' divides by q, and a finished weight holds only 1 / q")
    if spec.norm == "layernorm":
        x_TD = F.layer_norm(x_TD, x_TD.shape[-1:], eps=_LAYER_NORM_EPS)
    x_TD = _rotate(x_TD, spec)
    if spec.product == "integer":
        assert spec.activation is not None
        x = _quantize_tokens(x_TD, spec.activation)
        return _integer_forward(x, Codes(*weight), bias_F).to(x_TD.dtype)
    if spec.activation is not None:
        x_TD = _dequantized_tokens(x_TD, spec.activation).to(x_TD.dtype)
    w_FD = _times_scale(weight.codes_FD.float(), weight.scale)
    return F.linear(x_TD, w_FD.to(x_TD.dtype), bias_F)


def _check_exact(num_inputs: int, spec: QuantSpec) -> None:
    if num_inputs > max_exact_inputs(spec):
        raise ValueError(
            f"{num_inputs} inputs exceed {max_exact_inputs(spec)}, the most that fp32 sums of "
            "products of its codes hold exactly; split the matrix, or use product='dequantized'"
        )


def _quantize_weight(
    w_FD: Tensor,
    part: CodeSpec,
    rows: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    alpha_F: Tensor | None = None,
) -> Codes:
    if rows is None:
        return quantize(w_FD, part, generator, alpha_F)
    alphas = [None] * len(rows) if alpha_F is None else list(torch.split(alpha_F, list(rows)))
    matrices = [
        quantize(w, part, generator, alpha)
        for w, alpha in zip(torch.split(w_FD.detach(), list(rows)), alphas, strict=True)
    ]
    scales = [_scale_per_row(*matrix) for matrix in matrices]
    return Codes(torch.cat([matrix.codes for matrix in matrices]), torch.cat(scales))


def _scale_per_row(codes_FD: Tensor, scale: Tensor) -> Tensor:
    """[F, B] from a scalar or [A, B]."""
    num_rows = codes_FD.shape[0]
    if not scale.dim():
        return scale.expand(num_rows, 1)
    return scale.repeat_interleave(num_rows // scale.shape[0], dim=0)


def _times_scale(values_FD: Tensor, scale: Tensor) -> Tensor:
    if not scale.dim():
        return values_FD * scale
    scale = _scale_per_row(values_FD, scale)
    return values_FD * scale.repeat_interleave(values_FD.shape[1] // scale.shape[1], dim=1)


def _quantize_tokens(x_TD: Tensor, part: CodeSpec) -> Codes:
    """Codes shaped as `x_TD`; the scale has 1 in place of D."""
    codes, scale = quantize(x_TD.reshape(-1, x_TD.shape[-1]), part)
    return Codes(codes.view(x_TD.shape), scale.reshape(*x_TD.shape[:-1], 1))


def _dequantized_tokens(x_TD: Tensor, part: CodeSpec) -> Tensor:
    codes_TD, scale_T1 = _quantize_tokens(x_TD, part)
    values = codes_TD.to(scale_T1.dtype)
    return values / scale_T1 if part.scale_form == "multiply" else values * scale_T1


def _dequantized_rows(x_TD: Tensor, eps: float) -> Tensor:
    codes_TD, scale_T1 = quantize_rows(x_TD, eps)
    return codes_TD.float() * scale_T1


def _blend(latent: Tensor, quantized: Tensor, strength: float, spec: QuantSpec) -> Tensor:
    """latent + λ (quantized − latent); the gradient goes to `latent` whole.

    In fp32, and bitwise the quantized value at λ = 1, unless the spec says `added`.
    """
    if spec.straight_through == "added":
        return latent + strength * (quantized.to(latent.dtype) - latent).detach()
    blended = _StraightThrough.apply(latent, quantized, strength)  # type: ignore[no-untyped-call]
    return cast(Tensor, blended)


def _blend_codes(
    w_FD: Tensor,
    codes: Codes,
    strength: float,
    spec: QuantSpec,
    alpha_F: Tensor | None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """w + λ (ŵ − w) as in `_blend`; the gradient goes to learned scales too."""
    blended_FD = _blend(w_FD, dequantize(codes, spec.weight), strength, spec)
    if alpha_F is None:
        return blended_FD
    return with_scale_gradient(
        blended_FD, alpha_F, w_FD, codes.codes, spec.weight, strength=strength, rows=rows
    )


def _with_deadzone(
    bias_F: Tensor | None, w_FD: Tensor, codes: Codes, strength: float, spec: QuantSpec
) -> Tensor | None:
    """bias + λ share Σ of the weights whose code is 0 (arXiv:2509.23809), in w's dtype."""
    if not spec.deadzone_bias:
        return bias_F
    sums_F = (w_FD.float() * (codes.codes == 0)).sum(dim=1) * (strength * spec.deadzone_bias)
    return (sums_F if bias_F is None else bias_F.float() + sums_F).to(w_FD.dtype)


def _masked_gradient(
    w_FD: Tensor, codes: Codes, spec: QuantSpec, alpha_F: Tensor | None = None
) -> Tensor:
    """`w_FD`, whose gradient is 0 beyond the outermost code if the spec says so."""
    if spec.gradient == "identity":
        return w_FD
    if alpha_F is not None:
        return _masked(w_FD, inside_clip(w_FD, alpha_F, spec.weight))
    if spec.gradient == "trust":
        error_FD = (w_FD.detach() - dequantize(codes, spec.weight)).abs()
        return _masked(w_FD, error_FD <= _times_scale(torch.ones_like(error_FD), codes.scale))
    return _masked(w_FD, inside_range(w_FD, codes, spec.weight))


def _masked(latent: Tensor, mask: Tensor) -> Tensor:
    """`latent`, with a gradient only where `mask`."""
    return cast(Tensor, _MaskedGradient.apply(latent, mask))  # type: ignore[no-untyped-call]


def _rotate(t_FD: Tensor, spec: QuantSpec) -> Tensor:
    """t H, block by block along the inputs; H is orthonormal and symmetric."""
    if spec.hadamard is None:
        return t_FD
    if t_FD.shape[-1] % spec.hadamard:
        raise ConfigError(
            f"quantizer hadamard={spec.hadamard} does not divide {t_FD.shape[-1]} inputs; use "
            "another preset for this layer"
        )
    blocks = t_FD.reshape(*t_FD.shape[:-1], t_FD.shape[-1] // spec.hadamard, spec.hadamard)
    rotated = matmul(blocks, hadamard_matrix(spec.hadamard, t_FD.dtype, t_FD.device))
    return rotated.reshape(t_FD.shape)


def hadamard_matrix(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of ±1 / sqrt(width), [width, width]; `width` a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)  # the host would be waited for
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / math.sqrt(width)).to(dtype)


def _codes_linear(
    x_TD: Tensor,
    w_FD: Tensor,
    w_codes: Codes | None,
    bias_F: Tensor | None,
    strength: Strength,
    spec: QuantSpec,
) -> Tensor:
    """linear(x p → codes, w q → codes) / (q p) in the tensor's dtype; the bias as the spec says.

    Blends are taken between scaled values and codes, which is the same up to rounding.
    """
    divisor: Tensor | None = None
    if w_codes is not None:
        q_F1 = w_codes.scale if not w_codes.scale.dim() else _scale_per_row(*w_codes)
        w_FD = _blend(w_FD * q_F1, w_codes.codes.to(w_FD.dtype), strength.weight, spec)
        divisor = q_F1 if not q_F1.dim() else q_F1.flatten()
    if spec.activation is not None and strength.activation:
        codes_TD, p_T1 = _quantize_tokens(x_TD, spec.activation)
        x_TD = _blend(x_TD * p_T1, codes_TD.to(x_TD.dtype), strength.activation, spec)
        divisor = p_T1 if divisor is None else divisor * p_T1
    assert divisor is not None
    if spec.bias == "before":
        return F.linear(x_TD, w_FD, bias_F) / divisor
    y_TF = F.linear(x_TD, w_FD) / divisor
    return y_TF if bias_F is None else y_TF + bias_F


def _integer_forward(x: Codes, weight: Codes, bias_F: Tensor | None) -> Tensor:
    """fp32 (Σ int8 · code) · r · s + bias."""
    # Integers in fp32: exact in any order, so the sum does not depend on the layout.
    sums_TF = matmul(x.codes.float(), weight.codes.float().T)
    y_TF = sums_TF * x.scale * _scale_of_outputs(weight)
    return y_TF if bias_F is None else y_TF + bias_F.float()


def _scale_of_outputs(weight: Codes) -> Tensor:
    """s as a scalar, or [F]."""
    return _scale_per_row(*weight).flatten() if weight.scale.dim() else weight.scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, latent: Tensor, quantized: Tensor, strength: float) -> Tensor:
        if strength == 1.0:
            return quantized.to(latent.dtype)
        return torch.lerp(latent.float(), quantized.float(), strength).to(latent.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w_FD: Tensor, mask_FD: Tensor) -> Tensor:
        ctx.save_for_backward(mask_FD)
        return w_FD.view_as(w_FD)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (mask_FD,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] * mask_FD, None


class _IntegerLinear(torch.autograd.Function):
    """λ = 1. Saves int8 codes and scales, never a floating copy of an input or weight."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TD: Tensor,
        w_FD: Tensor,
        bias_F: Tensor | None,
        weight: Codes,
        spec: QuantSpec,
    ) -> Tensor:
        assert spec.activation is not None
        x = _quantize_tokens(x_TD, spec.activation)
        ctx.save_for_backward(*x, *weight)
        ctx.weight_dtype = w_FD.dtype  # type: ignore[attr-defined]
        return _integer_forward(x, weight, bias_F).to(x_TD.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        refuse_second_derivative()
        x_codes_TD, x_scale_T1, w_codes_FD, w_scale = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_x, needs_w, needs_bias, _, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        dtype = grads[0].dtype
        grad_TF = grads[0].float()
        grad_x = grad_w = grad_bias = None
        if needs_x and not w_scale.dim():
            grad_x = ((grad_TF @ w_codes_FD.float()) * w_scale).to(dtype)
        elif needs_x:
            s_F = _scale_of_outputs(Codes(w_codes_FD, w_scale))
            grad_x = ((grad_TF * s_F) @ w_codes_FD.float()).to(dtype)
        if needs_w:
            x_hat_TD = (x_codes_TD.float() * x_scale_T1).flatten(0, -2)
            grad_w = (grad_TF.flatten(0, -2).T @ x_hat_TD).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        if needs_bias:
            grad_bias = grad_TF.flatten(0, -2).sum(0).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return grad_x, grad_w, grad_bias, None, None
