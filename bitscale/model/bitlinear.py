"""BitLinear: `nn.Linear` whose forward pass is quantized with strength λ.

The Parameter is the latent 16- or 32-bit weight and stays the same object for the whole run, so
an optimizer built before the transition keeps owning it.
"""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from bitscale.quant.pack import unpack_2bit
from bitscale.quant.reference import (
    Quant,
    Ternary,
    bit_linear,
    blend_tokens,
    blend_weight,
    int8_linear,
    ternary_linear,
)
from bitscale.quant.schedule import SIXTEEN_BIT, Strength


class BitLinear(nn.Linear):
    """y[..., F] = linear(x[..., D]) at the strength last given to `set_strength`.

    `rows`: the weight holds several logical matrices of so many rows each, stacked (q, k, v), and
    each has its own scale; None: one matrix.
    """

    quant: Quant
    strength: Strength
    rows: tuple[int, ...] | None

    def __init__(self, d_in: int, d_out: int, quant: Quant, *, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.quant = quant
        self.strength = SIXTEEN_BIT
        self.rows = None

    def forward(self, x: Tensor) -> Tensor:
        bias = cast(Tensor | None, self.bias)
        return bit_linear(x, self.weight, bias, self.strength, self.quant, self.rows)


class BitConv2d(nn.Conv2d):
    """`nn.Conv2d` with a weight quantized as the matrix [out, in · height · width].

    Activations have one scale an image. It always convolves x̂ with ŵ in the tensor's dtype: only
    `BitLinear` sums integers. Made by `bitlinearize`, not by a constructor of its own.
    """

    quant: Quant
    strength: Strength

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gave it
        weight, activation, _ = self.strength
        w = blend_weight(self.weight.flatten(1), weight, self.quant).view_as(self.weight)
        x = blend_tokens(input.flatten(-3), activation, self.quant).view_as(input)
        return cast(Tensor, self._conv_forward(x, w, self.bias))


class PackedBitLinear(nn.Module):
    """A finished ternary layer for inference: 2-bit codes and one scale, no latent weight."""

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, quant: Quant) -> None:
        super().__init__()
        self.quant = quant
        self.register_buffer("packed", packed)  # uint8 [F/4, D], see quant/pack.py
        self.register_buffer("scale", scale)  # fp32 scalar
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        packed, scale = cast(Tensor, self.packed), cast(Tensor, self.scale)
        weight = Ternary(unpack_2bit(packed), scale)
        return ternary_linear(x, weight, cast(Tensor | None, self.bias), self.quant)


class Head(nn.Linear):
    """Vocabulary projection; 16 bit, or 8-bit weights and activations following λ."""

    def __init__(self, d_model: int, vocab_size: int, quant: Quant, *, bits: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.quant = quant
        self.bits = bits
        self.strength = SIXTEEN_BIT

    def forward(self, x: Tensor) -> Tensor:
        strength = self.strength if self.bits == 8 else SIXTEEN_BIT
        return int8_linear(x, self.weight, strength, self.quant)


def set_strength(model: nn.Module, strength: Strength) -> None:
    """Give every BitLinear, BitConv2d and head of `model` the λ of this step."""
    for module in model.modules():
        if isinstance(module, BitLinear | BitConv2d | Head):
            module.strength = strength


def bit_linears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """(name, layer) of every BitLinear in `model`, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module
