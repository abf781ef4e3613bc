"""BitLinear: `nn.Linear` whose forward pass is quantized with strength λ.

The Parameter is the latent 16- or 32-bit weight and stays the same object for the whole run, so
an optimizer built before the transition keeps owning it.

Three things are done once instead of several times, with the same result: what concerns the weight
once per optimizer step (`prepare_weights`), the input once for all layers that read it, and the
norm before them in one pass with its codes (`shared_input`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from bitscale.config.spec import QuantSpec, kernel_measure
from bitscale.errors import ConfigError
from bitscale.model.head import Head
from bitscale.model.norms import BlendedNorm, RMSNorm
from bitscale.quant.kernels import Kernels, Measure, get_kernels, log_specification
from bitscale.quant.kernels.linear import ternary_linear
from bitscale.quant.learned import initial_scale
from bitscale.quant.pack import unpack_2bit, unpack_base3
from bitscale.quant.packed_matrix import PackedTernary
from bitscale.quant.quantizer import Codes
from bitscale.quant.reference import (
    Int8Rows,
    Quant,
    Ternary,
    as_spec,
    bit_linear,
    blend_tokens,
    blend_weight,
    straight_through,
    weight_codes,
)
from bitscale.quant.reference import ternary_linear as finished_linear
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength


class QuantizedInput(NamedTuple):
    """An input as the layers that read it will multiply it: see `shared_input`."""

    x_TD: Tensor  # takes the gradient; blended already if `strength`; NaN after a fused norm
    rows: Int8Rows | None  # λ = 1: the codes
    strength: float  # λ_a that is in `x_TD` or in the codes; 0: not quantized yet


class PreparedWeight(NamedTuple):
    """What every forward pass of an optimizer step does to a weight in the same way."""

    codes: Ternary | None  # λ = 1, on kernels
    blended_FD: Tensor | None  # 0 < λ < 1 (or 16-bit activations), on kernels: w_λ
    specified: Codes | None  # presets that no kernel computes
    packed: PackedTernary | None = None  # in place of `codes`
    is_given: bool = False  # by somebody who knows when the weight changes


class QuantizedLinear:
    """What every linear layer at strength λ does, whatever module holds its weight and bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    quant: Quant
    spec: QuantSpec  # that follows from `quant`
    alpha: nn.Parameter | None
    strength: Strength
    rows: tuple[int, ...] | None
    kernels: Kernels | None  # None: the specification (quant/reference.py) computes this preset
    prepared: PreparedWeight | None
    _prepared_for: tuple[object, ...] | None

    def _set_up(
        self,
        quant: Quant,
        strength: Strength,
        rows: tuple[int, ...] | None,
        kernels: Kernels | None,
    ) -> None:
        self.quant, self.strength, self.rows = quant, strength, rows
        self.spec, self.kernels = as_spec(quant), kernels
        self.prepared = self._prepared_for = None
        self.alpha = None
        if self.spec.learns_scale:
            scale_F = initial_scale(self.weight).to(self.weight.dtype)
            self.alpha = nn.Parameter(scale_F, requires_grad=self.weight.requires_grad)

    def start_scale(self) -> None:
        """Give a learned scale its initial value, from the weight as it is."""
        if self.alpha is not None:
            with torch.no_grad():
                self.alpha.copy_(initial_scale(self.weight))

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 1:  # one token, as nn.Linear takes it
            return self.forward(x[None]).squeeze(0)
        given = self.quantize_input(x) if isinstance(x, Tensor) else x
        weight = self._weight()
        if self._kernels is None or self.strength == SIXTEEN_BIT:
            assert given.strength == 0.0, "this layer quantizes its own input"
            return bit_linear(
                given.x_TD,
                self.weight,
                self.bias,
                self.strength,
                self.spec,
                self.rows,
                alpha_F=self.alpha,
                codes=None if weight is None else weight.specified,
            )
        assert given.strength == self.strength.activation, "the input has another layer's λ"
        if self.strength == TERNARY:
            codes = self._ternarize() if weight is None else weight.packed or weight.codes
            assert given.rows is not None and codes is not None
            return ternary_linear(
                given.x_TD,
                self.weight,
                self.bias,
                given.rows,
                codes,
                self._kernels,
                bits=self.spec.gradient_bits,
                main_grad_FD=getattr(self.weight, "main_grad", None),
            )
        if self.strength.weight == 0.0:
            return F.linear(given.x_TD, self.weight, self.bias)
        blended_FD = weight.blended_FD if weight is not None else self._blend()
        assert blended_FD is not None
        return F.linear(given.x_TD, straight_through(self.weight, blended_FD), self.bias)

    def quantize_input(self, x_TD: Tensor, norm: nn.Module | None = None) -> QuantizedInput:
        """x, or norm(x), as this layer multiplies it."""
        strength, kernels = self.strength.activation, self._kernels
        if kernels is None or strength == 0.0:
            return QuantizedInput(x_TD if norm is None else norm(x_TD), None, 0.0)
        if self.strength != TERNARY:
            x_TD = x_TD if norm is None else norm(x_TD)
            blended_TD = kernels.blend_rows(x_TD, self._eps(), strength)
            return QuantizedInput(straight_through(x_TD, blended_TD), None, strength)
        if self.fuses(norm):
            assert norm is not None
            carrier_TD, rows = norm(x_TD, (kernels, self._eps()))
            return QuantizedInput(carrier_TD, rows, strength)
        x_TD = x_TD if norm is None else norm(x_TD)
        return QuantizedInput(x_TD, kernels.quantize_rows(x_TD, self._eps()), strength)

    def fuses(self, norm: nn.Module | None) -> bool:
        """Whether `quantize_input` computes the norm in one pass with the codes."""
        if self._kernels is None or self.strength != TERNARY or not isinstance(norm, RMSNorm):
            return False
        # A layer may be ternary by itself (bitscale probe), while its norm has yet to come in.
        return not isinstance(norm, BlendedNorm) or norm.strength == 1.0

    def prepare_weight(self) -> None:
        """Compute what the coming forward passes share, unless it is there already."""
        count_updates()
        if self._prepared_for != self._made_for():
            self.prepared = self._prepare()
            self._prepared_for = self._made_for()

    @staticmethod
    def prepare_many(layers: "Sequence[QuantizedLinear]") -> None:
        """`prepare_weight` of each; layers shared by ranks have a better way."""
        for layer in layers:
            layer.prepare_weight()

    def is_prepared(self) -> bool:
        """Whether a forward pass now would find what `prepare_weight` computes."""
        return self._prepared_for is not None and self._prepared_for == self._made_for()

    def use_codes(self, codes: Ternary | PackedTernary) -> None:
        """Multiply by these codes, which somebody else made of the weight, until it changes.

        The weight itself need not be there then: the λ = 1 passes read its shape and dtype only.
        """
        assert self.strength == TERNARY and self._kernels is not None
        if isinstance(codes, PackedTernary):
            self.prepared = PreparedWeight(None, None, None, codes, is_given=True)
        else:
            self.prepared = PreparedWeight(codes, None, None, is_given=True)
        self._prepared_for = self._made_for()

    def forget_weight(self) -> None:
        """The weight has changed, or is about to."""
        self.prepared = self._prepared_for = None

    def _prepare(self) -> PreparedWeight | None:
        if self.strength.weight == 0.0:
            return None
        if self._kernels is None:
            if self.spec.weight.rounding == "stochastic":
                return None  # drawn anew in every forward pass
            codes = weight_codes(self.weight, self.spec, self.rows, self.alpha)
            return PreparedWeight(None, None, codes)
        if self.strength == TERNARY:
            return PreparedWeight(self._ternarize(), None, None)
        return PreparedWeight(None, self._blend(), None)

    def _weight(self) -> PreparedWeight | None:
        # A compiled graph cannot look at versions: there, `prepare_weights` is the caller's duty.
        if torch.compiler.is_compiling():
            return self.prepared
        if self._prepared_for is None or self._prepared_for != self._made_for():
            return None
        return self.prepared

    def _made_for(self) -> tuple[object, ...]:
        parameters = [self.weight] if self.alpha is None else [self.weight, self.alpha]
        versions = tuple((p._version, p.data_ptr()) for p in parameters)
        is_given = self.prepared is not None and self.prepared.is_given
        return (versions, None if is_given else _num_updates, self.strength, self.spec)

    @property
    def _kernels(self) -> Kernels | None:
        """What computes the layer now: no kernel knows the residual."""
        return None if self.strength.residual else self.kernels

    def _ternarize(self) -> Ternary:
        assert self.kernels is not None
        return self.kernels.ternarize(self.weight, self._measure(), self._eps())

    def _blend(self) -> Tensor:
        assert self.kernels is not None
        return self.kernels.blend_weight(
            self.weight, self._measure(), self._eps(), self.strength.weight
        )

    def _measure(self) -> Measure:
        return cast(Measure, self.spec.weight.measure)

    def _eps(self) -> float:
        return self.spec.weight.eps


# The attributes that make a module's linear layer a quantized one.
QUANTIZATION = tuple(
    name for name in QuantizedLinear.__annotations__ if name not in ("weight", "bias")
)


class BitLinear(QuantizedLinear, nn.Linear):  # type: ignore[misc]
    """y[..., F] = linear(x[..., D]) at the strength last given to `set_strength`.

    `rows`: the weight holds several logical matrices of so many rows each, stacked (q, k, v), and
    each has its own scale; None: one matrix. `alpha` [F] is a Parameter if the quantizer learns
    its scales (paretoq), else None. It exists from the start, so that the optimizer owns it, has a
    gradient of 0 at λ = 0, and is set from the weight when the transition begins.
    """

    def __init__(self, d_in: int, d_out: int, quant: Quant, *, bias: bool = False) -> None:
        nn.Linear.__init__(self, d_in, d_out, bias=bias)
        spec = as_spec(quant)
        self._set_up(quant, SIXTEEN_BIT, None, kernels_for("", "reference", "cpu", spec, None))


class BitConv2d(nn.Conv2d):
    """`nn.Conv2d` with a weight quantized as the matrix [out, in · height · width].

    Activations have one scale an image. It always convolves x̂ with ŵ in the tensor's dtype: only
    `BitLinear` sums integers. Made by `bitlinearize`, not by a constructor of its own.
    """

    quant: Quant
    strength: Strength

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gave it
        weight, activation, residual = self.strength
        w = blend_weight(self.weight.flatten(1), weight, self.quant).view_as(self.weight)
        x = blend_tokens(input.flatten(-3), activation, self.quant).view_as(input)
        y = cast(Tensor, self._conv_forward(x, w, self.bias))
        if residual == 0.0:
            return y
        return torch.add(y, self._conv_forward(input, self.weight, None), alpha=residual)


class PackedBitLinear(nn.Module):
    """A finished ternary layer for inference: packed codes and one scale, no latent weight."""

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        quant: Quant,
        base3_columns: int | None = None,
    ) -> None:
        super().__init__()
        self.quant, self.base3_columns = quant, base3_columns
        # uint8 [F/4, D] of two bits a code; or [F, D/5] of base 3 and D. See quant/pack.py.
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)  # fp32 scalar
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        packed, scale = cast(Tensor, self.packed), cast(Tensor, self.scale)
        columns = self.base3_columns
        codes_FD = unpack_2bit(packed) if columns is None else unpack_base3(packed, columns)
        weight = Ternary(codes_FD, scale)
        return finished_linear(x, weight, cast(Tensor | None, self.bias), self.quant)


def shared_input(
    x_TD: Tensor, norm: nn.Module | None, *layers: nn.Module, recomputes: bool = False
) -> Tensor | QuantizedInput:
    """norm(x) for `layers`, which all read it: quantized once, if they quantize it alike.

    At λ = 1 an RMSNorm is computed in one pass with the codes, and its output is never stored.
    `recomputes`: any other norm is computed again in the backward pass, of which x is kept.
    """
    first = layers[0]
    fuses = isinstance(first, QuantizedLinear) and first.fuses(norm)
    if recomputes and norm is not None and not fuses:
        x_TD, norm = cast(Tensor, checkpoint(norm, x_TD, use_reentrant=False)), None
    if isinstance(first, QuantizedLinear) and all(
        isinstance(layer, QuantizedLinear)
        and (layer.strength, layer.spec, layer.kernels)
        == (first.strength, first.spec, first.kernels)
        for layer in layers
    ):
        return first.quantize_input(x_TD, norm)
    return x_TD if norm is None else cast(Tensor, norm(x_TD))


def set_strength(model: nn.Module, strength: Strength) -> None:
    """Give every BitLinear, BitConv2d, head and blended norm of `model` the λ of this step.

    Raises:
        ConfigError: λ outside [0, 1], or a negative or infinite residual.
    """
    check_strength(strength)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | BitConv2d | Head):
            module.strength = strength
        elif isinstance(module, BlendedNorm):
            module.strength = strength.weight


def check_strength(strength: Strength) -> None:
    """Raises ConfigError for λ outside [0, 1], or a negative or infinite residual."""
    for name, highest in (("weight", 1.0), ("activation", 1.0), ("residual", sys.float_info.max)):
        value = getattr(strength, name)
        if not 0.0 <= value <= highest:  # nor NaN
            raise ConfigError(
                f"strength.{name}={value:g} must be {'0 or more' if highest > 1 else 'in [0, 1]'}: "
                "0 is the 16-bit model; use bitscale.quant.schedule for ramps"
            )


def set_kernels(model: nn.Module, name: str, device_type: str) -> None:
    """Compute every BitLinear of `model` with the kernels `name`; raises as `kernels_for`."""
    for path, layer in bit_linears(model):
        layer.kernels = kernels_for(path, name, device_type, layer.spec, layer.rows)
        layer.forget_weight()


def kernels_for(
    path: str, name: str, device_type: str, spec: QuantSpec, rows: tuple[int, ...] | None
) -> Kernels | None:
    """The table `name` for a layer, or None if the specification computes it: `auto` and
    `reference` leave to it the presets that no kernel knows, and several matrices in one weight;
    `auto` logs that.

    Raises:
        KernelUnavailable: the kernels do not run on that device.
        ConfigError: `cpu` or `triton` for what they do not compute.
    """
    if kernel_measure(spec) is not None and rows is None:
        return get_kernels(name, device_type)
    if name == "auto":
        log_specification("another quantizer" if rows is None else "several matrices in a weight")
        return None
    get_kernels(name, device_type)  # an unknown name, or another device, comes first
    if name == "reference":
        return None
    raise ConfigError(
        f"quant.kernel={name!r} computes b158 and absmedian with one matrix a weight, and "
        f"{path or 'the layer'} has another quantizer or several; use quant.kernel=reference"
    )


def prepare_weights(model: nn.Module) -> None:
    """Quantize every weight once, for all forward passes until the weights change.

    Call it after `set_strength` and before the micro-batches of a step. Without it every forward
    pass quantizes for itself, with the same result. A weight that is changed in place, or whose
    storage or λ is another, is noticed and quantized anew, and so is every weight after a step of
    any `torch.optim.Optimizer`; one that is written through `.data` at other times is not: call
    `forget_weights` then. A compiled graph notices none of this.
    """
    batches: dict[Callable[..., None], list[QuantizedLinear]] = {}
    for _, layer in bit_linears(model):
        batches.setdefault(type(layer).prepare_many, []).append(layer)
    for prepare_many, layers in batches.items():
        prepare_many(layers)


_num_updates = 0  # steps of all optimizers, since weights were first prepared


@cache
def count_updates() -> None:
    """From now on: fused optimizers change weights, and Megatron's copy to them, without another
    version."""

    def count(*_: object) -> None:
        global _num_updates
        _num_updates += 1

    register_optimizer_step_post_hook(count)


def forget_weights(model: nn.Module) -> None:
    """Drop what `prepare_weights` has computed."""
    for _, layer in bit_linears(model):
        layer.forget_weight()


def is_scale(parameter_name: str) -> bool:
    """Whether the parameter is a BitLinear's learned scale."""
    return parameter_name.endswith(".alpha")


def bit_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, layer) of every quantized linear layer in `model`, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module
