"""ZeRO-3 that fetches no ternary matrix in 16 bit at λ = 1 (docs/ternary-zero.md).

DeepSpeed gathers the weights of each module in 16 bit before it runs, forward and backward, and
drops them afterwards. At λ = 1 the layers read codes and a scale only. Then this class declares
their weights to be there already, and in use until the update, so that nothing fetches or drops
them; it hands the layers codes that ranks have made of their own shares and exchanged packed,
once a step (quant/sharded.py). The shares, masters and gradients are DeepSpeed's, as they were.

It knows DeepSpeed's internal layout, as fragments.py does (measured with 0.19.8).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitscale.config import Packing
from bitscale.model.bitlinear import QuantizedLinear
from bitscale.quant.schedule import TERNARY
from bitscale.quant.sharded import gather_codes, partitioned_each

# Stands for a module among those that use a weight now; DeepSpeed's own are numbers.
_HOLDER = "ternary codes"


class TernaryZero3:
    """The weights of `layers`, of which ranks hold equal shares."""

    def __init__(
        self,
        wrapper: Any,
        layers: Sequence[QuantizedLinear],
        scale_group: dist.ProcessGroup | None,
        *,
        packed: bool,
        packing: Packing,
    ) -> None:
        """`wrapper`: DeepSpeed's optimizer object; `scale_group`: the ranks that share matrices;
        `packed`: the layers keep their codes as they were sent (`packing`: in 2 or 1.6 bits),
        and unpack them for each pass.
        """
        self._wrapper, self._layers, self._packed = wrapper, list(layers), packed
        self._scale_group = scale_group
        # DeepSpeed's parameters; asking the layers for them would fetch them in a forward pass.
        self._weights: list[Any] = [layer.weight for layer in self._layers]
        self._available = type(self._weights[0].ds_status).AVAILABLE
        shares = [weight.ds_tensor for weight in self._weights]
        buffer = wrapper.lp_param_buffer
        storages = {share.untyped_storage().data_ptr() for share in shares}
        assert storages == {buffer.untyped_storage().data_ptr()}, "shares beside the flat tensor"
        self._layout = partitioned_each(
            [weight.ds_shape for weight in self._weights],
            [int(share.storage_offset() - buffer.storage_offset()) for share in shares],
            self._weights[0].ds_process_group,
            buffer.device,
            packing,
        )
        # What the weights show while their codes are there: one NaN, seen as a matrix. Whoever
        # reads it notices.
        self._nan = torch.full((), torch.nan, dtype=buffer.dtype, device=buffer.device)
        self._is_fetched_by_deepspeed = True

    @torch.no_grad()
    def prepare(self) -> None:
        """Have what a forward pass at the layers' λ reads (a collective)."""
        if any(layer.strength != TERNARY for layer in self._layers):
            self._let_go()
            return
        self._hold()
        if all(layer.is_prepared() for layer in self._layers):
            return
        shares_N: Tensor = self._wrapper.lp_param_buffer
        eps = self._layers[0].spec.weight.eps
        codes = gather_codes(shares_N, self._layout, shares_N.dtype, eps, self._scale_group)
        for layer, ternary in zip(self._layers, codes, strict=True):
            layer.use_codes(ternary if self._packed else ternary.unpack())

    @contextmanager
    def own_gather(self) -> Iterator[None]:
        """While DeepSpeed updates weights, after which it gathers small ones for the next step."""
        if self._is_fetched_by_deepspeed:
            yield
            return
        small, ours = self._wrapper.persistent_parameters, set(map(id, self._weights))
        self._wrapper.persistent_parameters = [p for p in small if id(p) not in ours]
        try:
            yield
        finally:
            self._wrapper.persistent_parameters = small

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """DeepSpeed can gather `parameter` for a while."""
        is_held = _is_held(parameter)
        if is_held:
            _drop(parameter)
        try:
            yield
        finally:
            if is_held:
                self._hold_one(parameter)

    def _hold(self) -> None:
        """Until the update, with which DeepSpeed drops every weight."""
        if self._is_fetched_by_deepspeed:
            # Some are there since the last update or evaluation, or on their way.
            self._wrapper._partition_all_parameters()
            self._is_fetched_by_deepspeed = False
        for weight in self._weights:
            if not _is_held(weight):
                self._hold_one(weight)

    def _hold_one(self, weight: Any) -> None:
        weight.data = self._nan.expand(weight.ds_shape)
        weight.ds_status = self._available
        weight.ds_active_sub_modules.add(_HOLDER)

    def _let_go(self) -> None:
        for weight in filter(_is_held, self._weights):
            _drop(weight)
        self._is_fetched_by_deepspeed = True


def _is_held(weight: Any) -> bool:
    return _HOLDER in weight.ds_active_sub_modules


def _drop(weight: Any) -> None:
    """As ZeRO-3 leaves it between its uses."""
    weight.ds_active_sub_modules.remove(_HOLDER)
    weight.partition()
