"""AdamW in pieces against torch's."""

import pytest
import torch
from torch import Tensor, nn

from bitscale.config import OptimConfig
from bitscale.engine import optimizers
from bitscale.engine.optimizers import make_optimizer

pytestmark = pytest.mark.unit

SHAPES = ((1,), (64,), (65,), (1003,), (7, 9), ())


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "PIECE_ELEMENTS", 64)


def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and state after steps of different learning rates, decays and gradients."""
    generator = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3 * (step + 1), 0.1 * (step % 2)
        for index, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (step, index) == (2, 3) else grad
        optimizer.step()
    states = [optimizer.state[p] for p in parameters]
    return [p.detach() for p in parameters] + [
        state[key] for state in states for key in ("step", "exp_avg", "exp_avg_sq")
    ]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_equals_torch_to_the_bit() -> None:
    optim = OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    ours = make_optimizer(optim, [{"params": parameters()}], fused=False)
    plain = torch.optim.AdamW(parameters(), lr=0.0, betas=optim.betas, eps=optim.eps)
    assert type(ours) is not torch.optim.AdamW
    for got, want in zip(trained(ours), trained(plain), strict=True):
        assert torch.equal(got, want)
    assert ours.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


def test_does_not_depend_on_the_cuts() -> None:
    whole, cut = torch.randn(1003), [7, 64, 500, 501]
    grad = torch.randn(1003)
    optim, results = OptimConfig(lr=1e-3), []
    for pieces, grads in (([whole], [grad]), (whole.tensor_split(cut), grad.tensor_split(cut))):
        weights = [nn.Parameter(piece.clone()) for piece in pieces]
        optimizer = make_optimizer(optim, [{"params": weights}], fused=False)
        optimizer.param_groups[0]["lr"] = 1e-3
        for weight, g in zip(weights, grads, strict=True):
            weight.grad = g
        optimizer.step()
        results.append(torch.cat([weight.detach() for weight in weights]))
    assert not torch.equal(results[0], whole)
    assert torch.equal(*results)
