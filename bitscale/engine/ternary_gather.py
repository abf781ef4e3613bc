"""ZeRO-1 and ZeRO-2 without a 16-bit copy of ternary matrices (docs/ternary-zero.md).

DeepSpeed keeps all matrices in one flat 16-bit tensor on every rank, and gathers it after each
update. At λ = 1 the layers read codes and a scale only. Then this class takes the flat tensor away,
leaves its group out of DeepSpeed's gather, and hands the layers codes that ranks have made of their
own masters and exchanged packed (quant/sharded.py). As soon as λ is another the flat tensor
comes back, from the masters. All of it happens before a forward pass that needs it, in `prepare`.

It knows DeepSpeed's internal layout, as fragments.py does (measured with 0.19.8).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitscale.config import Packing
from bitscale.model.bitlinear import QuantizedLinear
from bitscale.quant.schedule import TERNARY
from bitscale.quant.sharded import gather_codes, gather_matrix, partitioned


class TernaryGather:
    """The flat 16-bit tensor of one parameter group, which holds nothing but ternary matrices."""

    def __init__(
        self,
        wrapper: Any,
        optimizer: torch.optim.Optimizer,
        group_index: int,
        layers: Sequence[QuantizedLinear],
        scale_group: dist.ProcessGroup | None,
        *,
        packed: bool,
        packing: Packing,
    ) -> None:
        """`wrapper`: DeepSpeed's optimizer object; `optimizer`: torch's, inside it.

        `layers`: those whose weights are the group; `scale_group`: the ranks that share them;
        `packed`: the layers keep their codes as they were sent (`packing`: in 2 or 1.6 bits),
        and unpack them for each pass.
        """
        self._layers, self._scale_group = list(layers), scale_group
        self._wrapper, self._index = wrapper, group_index
        self._optimizer, self._packed = optimizer, packed
        self._flat: Tensor = self._flats()[group_index]
        self._partitions: list[Tensor] = self._all_partitions()[group_index]
        views = [layer.weight.data for layer in self._layers]
        self._starts = [int(v.storage_offset() - self._flat.storage_offset()) for v in views]
        shared = {v.untyped_storage().data_ptr() for v in (*views, *self._partitions)}
        assert shared == {self._flat.untyped_storage().data_ptr()}, "weights beside the flat tensor"
        group = wrapper.real_dp_process_group[group_index]
        shapes = [v.shape for v in views]
        self._layout = partitioned(
            shapes,
            self._starts,
            self._partitions[0].numel(),
            group,
            self._flat.device,
            packing,
        )
        self._dtype, self._num_bytes = self._flat.dtype, self._flat.untyped_storage().nbytes()
        # What the weights show while they are not there: one NaN, seen as a matrix. Whoever reads
        # it notices.
        self._nan = torch.full((), torch.nan, dtype=self._dtype, device=self._flat.device)
        self._is_released = False

    @torch.no_grad()
    def prepare(self) -> None:
        """Have what a forward pass at the layers' λ reads (a collective)."""
        if any(layer.strength != TERNARY for layer in self._layers):
            self._restore()
            return
        self._release()
        if all(layer.is_prepared() for layer in self._layers):
            return
        codes = gather_codes(
            self._masters(), self._layout, self._dtype, self._eps(), self._scale_group
        )
        for layer, ternary in zip(self._layers, codes, strict=True):
            layer.use_codes(ternary if self._packed else ternary.unpack())

    @contextmanager
    def own_gather(self) -> Iterator[None]:
        """While DeepSpeed updates weights: what is not there is not gathered."""
        if not self._is_released:
            yield
            return
        # Both of DeepSpeed's optimizers look the function up in their module.
        module: Any = sys.modules[type(self._wrapper).__module__]
        gather = module.all_gather_dp_groups

        def gather_others(**given: Any) -> None:
            for name in ("groups_flat", "partitioned_param_groups", "dp_process_group"):
                given[name] = [v for i, v in enumerate(given[name]) if i != self._index]
            gather(**given)

        module.all_gather_dp_groups = gather_others
        try:
            yield
        finally:
            module.all_gather_dp_groups = gather

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """`parameter` holds its values for a while, on every rank (a collective)."""
        places = [i for i, layer in enumerate(self._layers) if layer.weight is parameter]
        if not self._is_released or not places:
            yield
            return
        absent = parameter.data
        parameter.data = gather_matrix(self._masters(), self._layout, self._dtype, places[0])
        try:
            yield
        finally:
            parameter.data = absent

    def _release(self) -> None:
        if self._is_released:
            return
        # The storage itself: DeepSpeed has further views on it.
        self._flat.untyped_storage().resize_(0)
        self._flats()[self._index] = self._nan.expand(self._flat.shape)
        # DeepSpeed copies the masters into its partition after an update: to nowhere.
        self._all_partitions()[self._index] = [
            torch.empty_like(part, device="meta") for part in self._partitions
        ]
        for layer in self._layers:
            layer.weight.data = self._nan.expand(layer.weight.shape)
        self._is_released = True

    def _restore(self) -> None:
        if not self._is_released:
            return
        self._flat.untyped_storage().resize_(self._num_bytes)
        own = self._partitions[self._layout.rank]
        own.copy_(self._masters())
        if self._layout.num_ranks > 1:
            dist.all_gather_into_tensor(self._flat, own, group=self._layout.group)
        self._flats()[self._index] = self._flat
        self._all_partitions()[self._index] = self._partitions
        for layer, start in zip(self._layers, self._starts, strict=True):
            shape = layer.weight.shape
            layer.weight.data = self._flat.narrow(0, start, shape.numel()).view(shape)
        self._is_released = False

    def _masters(self) -> Tensor:
        """fp32 [N]: this rank's partition."""
        masters_N: Tensor
        (masters_N,) = self._optimizer.param_groups[self._index]["params"]
        return masters_N.detach()

    def _eps(self) -> float:
        return self._layers[0].spec.weight.eps

    def _flats(self) -> list[Tensor]:
        """By group, in bf16 at stage 1 (BF16_Optimizer) or else (DeepSpeedZeroOptimizer)."""
        name = "bf16_groups_flat" if self._is_bf16_optimizer() else "bit16_groups_flat"
        return getattr(self._wrapper, name)  # type: ignore[no-any-return]

    def _all_partitions(self) -> list[list[Tensor]]:
        """By group and rank: views on the flat tensors."""
        if self._is_bf16_optimizer():
            return self._wrapper.bf16_partitioned_groups  # type: ignore[no-any-return]
        return self._wrapper.parallel_partitioned_bit16_groups  # type: ignore[no-any-return]

    def _is_bf16_optimizer(self) -> bool:
        return hasattr(self._wrapper, "bf16_groups_flat")
