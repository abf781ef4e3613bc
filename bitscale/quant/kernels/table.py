"""What a set of kernels for the b158 quantizer offers, whatever it is written in.

Shapes: T tokens (all leading dimensions), D inputs, F outputs of a linear layer.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bitscale.quant.reference import Int8Rows, Ternary

Measure = Literal["absmean", "absmedian"]
# Of the gradient in the backward products; None: floating point (plain_backward.py).
GradientBits = Literal[8, 16, 24] | None


class NormedRows(NamedTuple):
    """Int8 codes of RMS-normalized rows."""

    codes_TD: Tensor  # int8 in [-128, 127]
    scale_T1: Tensor  # fp32 > 0, one per token
    rstd_T1: Tensor  # fp32 1 / sqrt(mean x² + eps), for the norm's backward pass


class Kernels(NamedTuple):
    """The functions of one implementation. None of them waits for the device.

    Their contracts are the docstrings of `plain.py` and `plain_backward.py`, whose functions are
    the specification.
    """

    name: str
    # (w_FD, measure, eps)
    ternarize: Callable[[Tensor, Measure, float], Ternary]
    # (x_TD, eps)
    quantize_rows: Callable[[Tensor, float], Int8Rows]
    # (x_TD, norm weight_D or None, norm_eps, eps)
    rms_norm_quantize_rows: Callable[[Tensor, Tensor | None, float, float], NormedRows]
    # (x, weight, bias_F or None, dtype of the result)
    integer_linear: Callable[[Int8Rows, Ternary, Tensor | None, torch.dtype], Tensor]
    # (grad_TF, weight, bits) -> grad_TD
    input_grad: Callable[[Tensor, Ternary, GradientBits], Tensor]
    # (grad_TF, x, dtype of the result, fp32 main_grad_FD to add to instead, or None, bits)
    weight_grad: Callable[[Tensor, Int8Rows, torch.dtype, Tensor | None, GradientBits], Tensor]
    # (grad of the normed rows, x_TD, rstd_T1, norm weight_D or None) -> (grad_x, grad_weight)
    rms_norm_grad: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    # (w_FD, measure, eps, λ)
    blend_weight: Callable[[Tensor, Measure, float, float], Tensor]
    # (x_TD, eps, λ)
    blend_rows: Callable[[Tensor, float, float], Tensor]
