"""A rank's own part of a step: its layers, without what is fetched before them."""

import time

import pytest
import torch
from torch import nn

from bitscale.engine.own_time import OwnClock, layers_with_parameters

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class Slow(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.block = nn.Sequential(Slow(4, 4), nn.ReLU(), nn.LayerNorm(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        x: torch.Tensor = self.block(self.embedding(ids))
        return x


def fetching(module: nn.Module, *_: object) -> None:
    """What ZeRO-3's hooks do: wait for the other ranks."""
    time.sleep(0.1)


def test_layers_are_the_innermost_modules_with_parameters() -> None:
    model = Model()
    linear, _, norm = model.block
    assert list(layers_with_parameters(model)) == [model.embedding, linear, norm]


def test_a_whole_model_is_timed_with_everything_in_it() -> None:
    clock, model = OwnClock(CPU), Model()
    clock.watch([model])
    with clock.running():
        time.sleep(0.01)
    model(torch.tensor([0]))
    assert clock.take().seconds() >= 0.08
    assert clock.take().seconds() == 0.0


def test_what_is_fetched_before_a_layer_and_released_after_it_is_not_its_own() -> None:
    clock, model = OwnClock(CPU), Model()
    for module in model.modules():
        module.register_forward_pre_hook(fetching)
        module.register_forward_hook(fetching)
    clock.watch(layers_with_parameters(model))
    begin = time.perf_counter()
    model(torch.tensor([0]))
    waited = 2 * 0.1 * len(list(model.modules())) + 0.05
    own = clock.take().seconds()
    assert 0.02 <= own <= time.perf_counter() - begin - waited
    model.eval()(torch.tensor([0]))
    assert clock.take().seconds() == 0.0
