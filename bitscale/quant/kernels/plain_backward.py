"""The backward pass's specification in plain PyTorch: gradients of inputs, weights and norm.

Shapes: T tokens (all leading dimensions), D inputs, F outputs of a linear layer.

With `bits` the incoming gradient is rounded to integers of 8, 16 or 24 bits, and the products are
integer products: exact, in any order. A row of the gradient g (a token for dX, an output feature
for dW, whose g is first multiplied by the token's input scale) has the step

    q = max(max|g|, 1e-30) / L,   L = 127 · 256^(bits/8 − 1),   code = clip(round(g / q), −L, L)

in fp32, 16 and 24 bits rounding half to even. 8 bits round stochastically: code = floor(g / q + u)
with u in [0, 1) from a hash of g's bits and its position, so that the same gradient is rounded the
same way in every run and on every device, without a state to save. A code is split into signed
bytes, most significant first: code = Σ byte_i · 256^(n−1−i), each in [−128, 127], so that a product
is n int8 products; their sum is taken in integers and rounded to fp32 once. The tokens of dW are
taken in chunks of 65,536, with steps of their own, so that int32 holds the sums of a byte.
"""

import torch
from torch import Tensor

from bitscale.quant.kernels.table import GradientBits
from bitscale.quant.reference import Int8Rows, Ternary

CHUNK_TOKENS = 65_536
SMALLEST_PEAK = 1e-30  # a smaller peak's step would be denormal
_HASH_POSITION, _HASH_FIRST, _HASH_SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_WORD = 0xFFFFFFFF


def input_grad(grad_TF: Tensor, weight: Ternary, bits: GradientBits) -> Tensor:
    """∂L/∂x [T, D] = (grad @ codes) · s, in the dtype of `grad_TF`; `bits` None: fp32 sums."""
    if bits is None:
        grad_TD = grad_TF.float() @ weight.codes_FD.float()
        return (grad_TD * weight.scale).to(grad_TF.dtype)
    g_TF = grad_TF.float().flatten(0, -2)
    codes_TF, step_T1 = quantize_gradient(g_TF, bits)
    # fp64 sums integers exactly up to 2^53.
    sums_TD = codes_TF.double() @ weight.codes_FD.double()
    grad_TD = sums_TD.float() * step_T1 * weight.scale
    return grad_TD.to(grad_TF.dtype).view(*grad_TF.shape[:-1], weight.codes_FD.shape[1])


def weight_grad(
    grad_TF: Tensor,
    x: Int8Rows,
    dtype: torch.dtype,
    main_grad_FD: Tensor | None,
    bits: GradientBits,
) -> Tensor:
    """∂L/∂w [F, D] = gradᵀ @ (codes · r) in `dtype`; `bits` None: fp32 sums.

    With `main_grad_FD` (fp32) the gradient is added to it in place, and it is returned.
    """
    g_TF, x_TD, r_T1 = (t.flatten(0, -2) for t in (grad_TF.float(), x.codes_TD, x.scale_T1))
    if bits is None:
        grad_FD = g_TF.T @ (x_TD.float() * r_T1)
    else:
        grad_FD = torch.zeros(g_TF.shape[1], x_TD.shape[1], device=g_TF.device)
        for first in range(0, g_TF.shape[0], CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            codes_TF, step_1F = quantize_gradient(g_TF[part] * r_T1[part], bits, dim=0)
            sums_FD = codes_TF.double().T @ x_TD[part].double()
            grad_FD += sums_FD.float() * step_1F.T
    return grad_FD.to(dtype) if main_grad_FD is None else main_grad_FD.add_(grad_FD)


def quantize_gradient(g_TF: Tensor, bits: int, dim: int = 1) -> tuple[Tensor, Tensor]:
    """(int32 codes [T, F], fp32 step) of an fp32 matrix; `dim` is what shares a step.

    dim 1: one a token, [T, 1]; dim 0: one a feature, [1, F]. A row with a NaN or an infinity has
    that as its step, and so as its result.
    """
    limit = 127.0 * 256 ** (bits // 8 - 1)
    if g_TF.shape[dim] == 0:
        peak = g_TF.new_zeros([1 if axis == dim else size for axis, size in enumerate(g_TF.shape)])
    else:
        peak = g_TF.abs().amax(dim=dim, keepdim=True)
    # Not by a number: on a GPU PyTorch would multiply by its reciprocal.
    step = peak.clamp(min=SMALLEST_PEAK) / peak.new_full((), limit)
    scaled_TF = g_TF / step
    rounded_TF = (scaled_TF + hash_noise(g_TF)).floor() if bits == 8 else scaled_TF.round()
    codes_TF = rounded_TF.nan_to_num(0.0).clamp(-limit, limit)
    return codes_TF.to(torch.int32), step


def hash_noise(g_TF: Tensor) -> Tensor:
    """u [T, F] in [0, 1), 24 bits: murmur3's finalizer of g's bits and its position t · F + f."""
    position = torch.arange(g_TF.numel(), device=g_TF.device).view(g_TF.shape)
    word = g_TF.contiguous().view(torch.int32).long() & _WORD
    word = word ^ ((position * _HASH_POSITION) & _WORD)
    word = ((word ^ (word >> 16)) * _HASH_FIRST) & _WORD
    word = ((word ^ (word >> 13)) * _HASH_SECOND) & _WORD
    word = word ^ (word >> 16)
    return (word >> 8).float() * 2.0**-24


def split_bytes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """int8 bytes of int32 codes, most significant first: code = Σ byte_i · 256^(n−1−i)."""
    parts = []
    for _ in range(bits // 8 - 1):
        low = ((codes + 128) & 255) - 128
        parts.append(low.to(torch.int8))
        codes = (codes - low) >> 8
    return (codes.to(torch.int8), *reversed(parts))


def rms_norm_grad(
    grad_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(∂L/∂x in x's dtype, ∂L/∂weight in the weight's or None) of RMSNorm, in fp32.

    With n = x · rstd and g = grad · weight: ∂x = rstd (g − n mean(g n)), ∂weight = Σ_T grad · n.
    """
    grad_TD32, n_TD = grad_TD.float(), x_TD.float() * rstd_T1
    g_TD = grad_TD32 if weight_D is None else grad_TD32 * weight_D.float()
    grad_x_TD = rstd_T1 * (g_TD - n_TD * (g_TD * n_TD).mean(dim=-1, keepdim=True))
    if weight_D is None:
        return grad_x_TD.to(x_TD.dtype), None
    # The unfused norm multiplies the weight with n rounded to x's dtype.
    n_TD = n_TD.to(x_TD.dtype).float()
    grad_weight_D = (grad_TD32 * n_TD).flatten(0, -2).sum(dim=0)
    return grad_x_TD.to(x_TD.dtype), grad_weight_D.to(weight_D.dtype)
