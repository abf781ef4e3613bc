"""Ternary telemetry: per layer the share of zeros, of codes flipped, and the scale."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.model.bitlinear import QuantizedLinear, bit_linears
from bitscale.quant.pack import pack_2bit, unpack_2bit
from bitscale.quant.reference import as_spec, ternarize


class TernaryTelemetry:
    """Remembers each layer's codes from one reading to the next, in host memory.

    Ternary ones take 2 bits each, others 8.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(bit_linears(model))
        self._previous: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(
        self, gathered: Callable[[nn.Parameter], AbstractContextManager[Tensor]], *, compute: bool
    ) -> dict[str, dict[str, float | None]]:
        """{layer: {zeros, flipped, scale}}; flipped is None at the first reading.

        `gathered` yields a whole weight on every rank (a collective at ZeRO-3, so every rank
        calls this); `compute` is true on the rank that wants the figures.
        """
        figures: dict[str, dict[str, float | None]] = {}
        for name, layer in self._layers.items():
            with gathered(layer.weight) as weight_FD, _gathered_scale(gathered, layer) as alpha_F:
                if not compute:
                    continue
                # Its own draws, so that reading changes nothing in a stochastic run.
                generator = torch.Generator(weight_FD.device).manual_seed(0)
                codes_FD, scale = ternarize(weight_FD, layer.quant, layer.rows, generator, alpha_F)
            codes = codes_FD.flatten().cpu()
            previous = self._previous.get(name)
            ternary = as_spec(layer.quant).weight.is_ternary
            if previous is not None and ternary:
                previous = _unpack(previous, codes.numel())
            flipped = None if previous is None else _share(previous != codes)
            self._previous[name] = _pack(codes) if ternary else codes
            figures[name] = {
                "zeros": _share(codes == 0),
                "flipped": flipped,
                "scale": float(scale.mean()),  # of all scales, where there are several
            }
        return figures


def _gathered_scale(
    gathered: Callable[[nn.Parameter], AbstractContextManager[Tensor]], layer: QuantizedLinear
) -> AbstractContextManager[Tensor | None]:
    return nullcontext() if layer.alpha is None else gathered(layer.alpha)


def _pack(codes: Tensor) -> Tensor:
    return pack_2bit(F.pad(codes, (0, -codes.numel() % 4))[:, None])


def _unpack(packed: Tensor, numel: int) -> Tensor:
    return unpack_2bit(packed).flatten()[:numel]


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()
