"""Linear layers at strength λ whose matrices are shared by tensor-parallel ranks.

The model is the same at every number of ranks: a scale belongs to the whole logical matrix, a
row-parallel layer's codes to the maximum of the whole row, and at λ = 1 integers are summed over
the ranks before the one dequantization. So codes, scales and integer sums are bitwise those of one
rank; gradients and 0 < λ < 1 are sums of floating-point products and agree to rounding.

Shapes: T tokens (all leading dimensions; with sequence parallelism dimension 0 is the sequence),
D inputs, F outputs of the whole layer; a shard has F / size rows (column parallel) or D / size
columns (row parallel).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.config.spec import QuantSpec, kernel_measure
from bitscale.errors import ConfigError
from bitscale.model.bitlinear import (
    PreparedWeight,
    QuantizedInput,
    QuantizedLinear,
    count_updates,
    kernels_for,
)
from bitscale.model.collectives import (
    ONE_RANK,
    TensorGroup,
    all_gather,
    all_reduce,
    copy_to_group,
    gather_sequence,
    mark_shard,
    reduce_scatter,
    sum_and_split_sequence,
    sum_over_group,
)
from bitscale.quant.kernels.linear import keep_for_grads, ternary_linear, unpacked
from bitscale.quant.kernels.table import Kernels
from bitscale.quant.packed_matrix import PackedTernary
from bitscale.quant.reference import (
    MAX_EXACT_INPUTS,
    Int8Rows,
    Quant,
    Ternary,
    as_spec,
    straight_through,
)
from bitscale.quant.scales import Shard, codes_at, group_rows, group_scales
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY


class ShardedLinear(QuantizedLinear):
    """What column- and row-parallel layers share: the weight's side, over the group."""

    tp: TensorGroup
    replicas: TensorGroup = ONE_RANK
    # The logical matrix of each row, if the shard holds several (q, k, v); and how many there are.
    matrix_F: Tensor | None
    num_matrices: int

    def share(self, tp: TensorGroup, matrix_F: Tensor | None = None, num_matrices: int = 1) -> None:
        """Join the layer to its group. Raises ConfigError for presets that are not shared."""
        check_shared_spec(self.spec)
        self.tp, self.matrix_F, self.num_matrices = tp, matrix_F, num_matrices

    @staticmethod
    def prepare_many(layers: Sequence[QuantizedLinear]) -> None:
        """One collective for each group and kind of scale, however many layers there are."""
        _prepare_sharded(cast(list[ShardedLinear], layers))

    def shard(self) -> Shard:
        return Shard(self.weight, self.matrix_F, self.num_matrices)

    def prepare_with(self, scales_M: Tensor) -> None:
        """Make the codes (or w_λ) of the coming forward passes at these scales."""
        count_updates()
        self.prepared = self._prepare_at(scales_M)
        self._prepared_for = self._made_for()

    def _prepare(self) -> PreparedWeight | None:
        return None if self.strength.weight == 0.0 else self._prepare_at(self._scales())

    def _prepare_at(self, scales_M: Tensor) -> PreparedWeight | None:
        if self.strength.weight == 0.0:
            return None
        codes = codes_at(self.weight, self._row_scale(scales_M))
        if self._is_ternary():
            return PreparedWeight(codes, None, None)
        return PreparedWeight(None, self._blend_codes(codes), None)

    def _scales(self) -> Tensor:
        (scales_M,) = group_scales(
            [self.shard()], self._measure(), self._eps(), self._scale_group()
        )
        return scales_M

    def _scale_group(self) -> Any:
        """Spectra's layers have a scale for each shard (preset trilm with *_shard)."""
        return self.tp.group if self.spec.weight.granularity == "matrix" else None

    def _row_scale(self, scales_M: Tensor) -> Tensor:
        """A scalar, or [F] if there are several matrices."""
        if self.spec.weight.eps_enters == "added":
            scales_M = scales_M + self._eps()
        if self.matrix_F is None:
            return scales_M[0]
        if self.matrix_F.device != scales_M.device:
            self.matrix_F = self.matrix_F.to(scales_M.device)
        return scales_M[self.matrix_F]

    def _blend_codes(self, codes: Ternary) -> Tensor:
        scale = codes.scale[:, None] if codes.scale.dim() else codes.scale
        quantized_FD = codes.codes_FD.float() * scale
        blended_FD = torch.lerp(self.weight.detach().float(), quantized_FD, self.strength.weight)
        return blended_FD.to(self.weight.dtype)

    def _is_ternary(self) -> bool:
        """Whether this pass multiplies integers."""
        return self.kernels is not None and self.strength == TERNARY

    def _codes_now(self) -> Ternary | PackedTernary:
        weight = self._weight() or self._prepare()
        assert weight is not None
        codes = weight.packed or weight.codes
        assert codes is not None
        return codes

    def _weight_now(self) -> Tensor:
        """w_λ, whose gradient goes to the latent weight."""
        if self.strength.weight == 0.0:
            return self._latent()
        weight = self._weight()
        blended_FD = (weight or self._prepare()).blended_FD  # type: ignore[union-attr]
        assert blended_FD is not None
        return straight_through(self._latent(), blended_FD)

    def _latent(self) -> Tensor:
        """The weight as autograd sees it: what several ranks hold gets the sum of their parts."""
        return copy_to_group(self.weight, self.replicas)

    def _activation_strength(self) -> float:
        return self.strength.activation if self.spec.activation is not None else 0.0

    def _main_grad(self) -> Tensor | None:
        return getattr(self.weight, "main_grad", None)


class ColumnParallel(ShardedLinear):
    """Each rank computes F / size outputs of every token."""

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """y [T, F / size] from x [T, D], which with sequence parallelism is [T / size, D]."""
        return self.project(
            x, None if self.bias is None else copy_to_group(self.bias, self.replicas)
        )

    def project(self, x: Tensor | QuantizedInput, bias_F: Tensor | None) -> Tensor:
        given = self.quantize_input(x) if isinstance(x, Tensor) else x
        assert given.strength == self._activation_strength(), "the input has another layer's λ"
        if not self._is_ternary():
            return F.linear(given.x_TD, self._weight_now(), bias_F)
        assert given.rows is not None and self.kernels is not None
        return ternary_linear(
            given.x_TD,
            self._latent(),
            bias_F,
            given.rows,
            self._codes_now(),
            self.kernels,
            bits=self.spec.gradient_bits,
            main_grad_FD=self._main_grad(),
        )

    def quantize_input(self, x_TD: Tensor, norm: nn.Module | None = None) -> QuantizedInput:
        """norm(x) as the group multiplies it: with sequence parallelism codes travel, one byte an
        element and four a token, and not 16-bit values."""
        if self.kernels is None or self._activation_strength() == 0.0:
            given = QuantizedInput(x_TD if norm is None else norm(x_TD), None, 0.0)
        else:
            given = super().quantize_input(x_TD, norm)
        if not self.tp.sequence_parallel:
            return given._replace(x_TD=copy_to_group(given.x_TD, self.tp))
        if given.rows is None:
            return given._replace(x_TD=gather_sequence(given.x_TD, self.tp))
        carrier_TD, codes_TD, scale_T1 = _GatherRows.apply(  # type: ignore[no-untyped-call]
            given.x_TD, *given.rows, self.tp.group
        )
        return QuantizedInput(carrier_TD, Int8Rows(codes_TD, scale_T1), given.strength)


class RowParallel(ShardedLinear):
    """Each rank computes D / size terms of every output; the ranks' sums are added."""

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        """y [T, F] from this rank's x [T, D / size]; sequence parallelism: y [T / size, F]."""
        y = self.project(x)
        if self.bias is None:
            return y
        # With sequence parallelism each rank adds it to its own tokens.
        return y + (copy_to_group(self.bias, self.tp) if self.tp.sequence_parallel else self.bias)

    def project(self, x: Tensor | QuantizedInput) -> Tensor:
        given = self.quantize_input(x) if isinstance(x, Tensor) else x
        assert given.strength == self._activation_strength(), "the input has another layer's λ"
        if not self._is_ternary():
            y_TF = F.linear(given.x_TD, self._weight_now())
            leave = sum_and_split_sequence if self.tp.sequence_parallel else sum_over_group
            return leave(y_TF, self.tp)
        num_inputs = self.weight.shape[1] * self.tp.size
        if num_inputs > MAX_EXACT_INPUTS:
            raise ValueError(f"{num_inputs} inputs exceed {MAX_EXACT_INPUTS}; split the matrix")
        assert given.rows is not None and self.kernels is not None
        held = self._codes_now()
        codes = unpacked(held)
        carrier_TF = keep_for_grads(
            given.x_TD,
            self.weight,
            None,
            given.rows,
            codes,
            self.kernels,
            self.spec.gradient_bits,
            self._main_grad(),
            held if isinstance(held, PackedTernary) else None,
        )
        y_TF = _RowProduct.apply(  # type: ignore[no-untyped-call]
            carrier_TF, *given.rows, *codes, self.kernels, self.tp
        )
        return cast(Tensor, y_TF)

    def quantize_input(self, x_TD: Tensor, norm: nn.Module | None = None) -> QuantizedInput:
        """norm(x) at the scale of the whole row, of which this rank has D / size columns."""
        x_TD = x_TD if norm is None else norm(x_TD)
        strength = self._activation_strength()
        if self.kernels is None or strength == 0.0:
            return QuantizedInput(x_TD, None, 0.0)
        rows = group_rows(x_TD, self._eps(), self.tp.group)
        if self.strength == TERNARY:
            return QuantizedInput(x_TD, rows, strength)
        quantized_TD = rows.codes_TD.float() * rows.scale_T1
        blended_TD = torch.lerp(x_TD.detach().float(), quantized_TD, strength).to(x_TD.dtype)
        return QuantizedInput(straight_through(x_TD, blended_TD), None, strength)


class ColumnBitLinear(ColumnParallel, nn.Linear):  # type: ignore[misc]
    """The [F / size, D] shard of a layer of bitscale's own decoder.

    With `replicas` the matrix has fewer parts than there are ranks (key/value heads): that many
    neighbouring ranks hold the same part, and its gradient is summed over them.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        quant: Quant,
        tp: TensorGroup,
        *,
        bias: bool = False,
        replicas: TensorGroup = ONE_RANK,
    ) -> None:
        num_parts = tp.size // replicas.size
        nn.Linear.__init__(self, d_in, d_out // num_parts, bias=bias)
        self.replicas = replicas
        set_up_shard(self, quant, tp)
        for parameter in self.parameters():
            mark_shard(parameter, 0, tp.rank // replicas.size, num_parts)


class RowBitLinear(RowParallel, nn.Linear):  # type: ignore[misc]
    """The [F, D / size] shard of a layer of bitscale's own decoder; the bias is whole."""

    def __init__(
        self, d_in: int, d_out: int, quant: Quant, tp: TensorGroup, *, bias: bool = False
    ) -> None:
        nn.Linear.__init__(self, d_in // tp.size, d_out, bias=bias)
        set_up_shard(self, quant, tp)
        mark_shard(self.weight, 1, tp.rank, tp.size)


def set_up_shard(
    layer: ShardedLinear,
    quant: Quant,
    tp: TensorGroup,
    matrix_F: Tensor | None = None,
    num_matrices: int = 1,
) -> None:
    """Make a module with a weight shard a quantized layer of the group."""
    kernels = kernels_for("", "reference", "cpu", as_spec(quant), None)
    layer._set_up(quant, SIXTEEN_BIT, None, kernels)
    layer.share(tp, matrix_F, num_matrices)


def check_shared_spec(spec: QuantSpec) -> None:
    """Raise ConfigError for a preset whose numbers would depend on the number of ranks."""
    weight = spec.weight
    is_plain_ternary = (
        weight.measure in ("absmean", "absmedian")
        and weight.is_ternary
        and (weight.numerator, weight.rounding, weight.scale_form) == (1.0, "half_even", "divide")
        and weight.granularity in ("matrix", "row_shard", "column_shard")
    )
    if kernel_measure(spec) is not None:
        return
    # Nothing but the weight differs: no norm, clipped gradient, rotation or term of its own.
    if is_plain_ternary and spec == QuantSpec(
        weight=weight, activation=None, product="dequantized"
    ):
        return
    raise ConfigError(
        "tensor parallelism knows the presets b158, absmedian, weight_only and trilm; this quant "
        "section is another: use one of them, or parallel.tp=1"
    )


def _prepare_sharded(layers: list[ShardedLinear]) -> None:
    batches: dict[tuple[Any, ...], list[ShardedLinear]] = {}
    for layer in layers:
        if layer.strength.weight == 0.0 or layer._prepared_for == layer._made_for():
            continue
        kind = (layer._scale_group(), layer._measure(), layer._eps(), layer.weight.dtype)
        batches.setdefault(kind, []).append(layer)
    for (group, measure, eps, _), batch in batches.items():
        scales = group_scales([layer.shard() for layer in batch], measure, eps, group)
        for layer, scales_M in zip(batch, scales, strict=True):
            layer.prepare_with(scales_M)


class _GatherRows(torch.autograd.Function):
    """Codes of the whole sequence from each rank's part; the gradient is summed and split."""

    @staticmethod
    def forward(
        ctx: Any, carrier_TD: Tensor, codes_TD: Tensor, scale_T1: Tensor, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        codes_TD, scale_T1 = all_gather(codes_TD, group), all_gather(scale_T1, group)
        ctx.mark_non_differentiable(codes_TD, scale_T1)
        # One NaN seen as a matrix, as in kernels/linear.py: only its gradient is of use.
        carrier_TD = carrier_TD.new_full((), float("nan")).expand(codes_TD.shape)
        return carrier_TD, codes_TD, scale_T1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter(grads[0], ctx.group), None, None, None


class _RowProduct(torch.autograd.Function):
    """(Σ over ranks of Σ int8 · code) · r · s: integers travel, and are dequantized once."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier_TF: Tensor,
        x_codes_TD: Tensor,
        x_scale_T1: Tensor,
        w_codes_FD: Tensor,
        w_scale: Tensor,
        kernels: Kernels,
        tp: TensorGroup,
    ) -> Tensor:
        ctx.tp = tp
        rows = Int8Rows(x_codes_TD, torch.ones_like(x_scale_T1))
        weight = Ternary(w_codes_FD, torch.ones_like(w_scale))
        # fp32 holds these integers, and their sum over the ranks, exactly.
        sums_TF = kernels.integer_linear(rows, weight, None, torch.float32)
        if tp.sequence_parallel:
            sums_TF = reduce_scatter(sums_TF, tp.group)
            first = sums_TF.shape[0] * tp.rank
            x_scale_T1 = x_scale_T1[first : first + sums_TF.shape[0]]
        else:
            sums_TF = all_reduce(sums_TF, tp.group)
        return (sums_TF * x_scale_T1 * w_scale).to(carrier_TF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TF = all_gather(grads[0], ctx.tp.group) if ctx.tp.sequence_parallel else grads[0]
        return (grad_TF, *[None] * 6)
