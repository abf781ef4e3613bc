"""Ternary telemetry: zeros, flips and scale of each layer between two readings."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from bitscale.config import QuantConfig
from bitscale.model.bitlinear import BitLinear
from bitscale.telemetry import TernaryTelemetry

pytestmark = pytest.mark.unit


@contextmanager
def gathered(weight: nn.Parameter) -> Iterator[Tensor]:
    yield weight


def make_model(quant: QuantConfig = QuantConfig()) -> nn.ModuleDict:  # noqa: B008 (frozen)
    model = nn.ModuleDict(
        {"a": BitLinear(4, 2, quant), "b": BitLinear(3, 5, quant), "plain": nn.Linear(2, 2)}
    )
    with torch.no_grad():
        # mean |w| = 2: codes 1 -1 0 0, 1 -1 0 1
        model["a"].weight.copy_(torch.tensor([[4.0, -3.0, 0.5, 0.0], [2.0, -3.0, 0.5, 3.0]]))
    return model


def test_first_reading_has_no_flips() -> None:
    figures = TernaryTelemetry(make_model()).read(gathered, compute=True)
    assert set(figures) == {"a", "b"}
    assert figures["a"] == {"zeros": 3 / 8, "flipped": None, "scale": 2.0}
    assert figures["b"]["flipped"] is None


def test_flips_are_counted_from_one_reading_to_the_next() -> None:
    model = make_model()
    telemetry = TernaryTelemetry(model)
    telemetry.read(gathered, compute=True)
    assert telemetry.read(gathered, compute=True)["a"]["flipped"] == 0.0
    with torch.no_grad():
        model["a"].weight[0] *= -1  # 1 -> -1 and -1 -> 1; zeros stay
    figures = telemetry.read(gathered, compute=True)
    assert figures["a"] == {"zeros": 3 / 8, "flipped": 2 / 8, "scale": 2.0}
    assert figures["b"]["flipped"] == 0.0
    assert telemetry.read(gathered, compute=True)["a"]["flipped"] == 0.0  # since the last reading


def test_scaling_a_matrix_flips_nothing() -> None:
    model = make_model()
    telemetry = TernaryTelemetry(model)
    telemetry.read(gathered, compute=True)
    with torch.no_grad():
        model["a"].weight *= 4.0
    assert telemetry.read(gathered, compute=True)["a"] == {
        "zeros": 3 / 8,
        "flipped": 0.0,
        "scale": 8.0,
    }


def test_sizes_that_are_no_multiple_of_four() -> None:
    """Layer b has 15 codes, kept in four bytes."""
    model = make_model()
    telemetry = TernaryTelemetry(model)
    telemetry.read(gathered, compute=True)
    with torch.no_grad():
        model["b"].weight *= -1
    figures = telemetry.read(gathered, compute=True)["b"]
    assert figures["zeros"] is not None
    assert figures["flipped"] == pytest.approx(1 - figures["zeros"])


def test_each_layer_uses_its_own_quantizer() -> None:
    telemetry = TernaryTelemetry(make_model(QuantConfig(weight_scale="absmedian")))
    assert telemetry.read(gathered, compute=True)["a"]["scale"] == 2.0
    model = make_model(QuantConfig(weight_scale="absmedian"))
    with torch.no_grad():
        model["a"].weight[0, 0] = 400.0  # moves the mean, not the median
    figures = TernaryTelemetry(model).read(gathered, compute=True)
    assert figures["a"]["scale"] == 2.0


def test_a_rank_that_does_not_compute_still_gathers() -> None:
    seen = []

    @contextmanager
    def noting(weight: nn.Parameter) -> Iterator[Tensor]:
        seen.append(weight)
        yield weight

    model = make_model()
    assert TernaryTelemetry(model).read(noting, compute=False) == {}
    assert [id(w) for w in seen] == [id(model["a"].weight), id(model["b"].weight)]
