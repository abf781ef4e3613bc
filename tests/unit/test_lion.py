"""Lion against its formula in float64, and what the configuration says about optimizers."""

from collections.abc import Callable

import pytest
import torch

from bitscale.config import Config
from bitscale.engine.optimizers import MOMENTS_OF, Lion, make_optimizer
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]
LR, BETAS, DECAY = 0.01, (0.9, 0.99), 0.1


def test_updates_are_the_papers() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 30))
    lion = Lion([weight], lr=LR, betas=BETAS, weight_decay=DECAY)
    w, m = weight.detach().double(), torch.zeros(40, 30, dtype=torch.float64)
    for step in range(5):
        weight.grad = torch.randn(40, 30)
        g = weight.grad.double()
        lion.step()
        w = w - LR * (torch.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + DECAY * w)
        m = BETAS[1] * m + (1 - BETAS[1]) * g
        state = lion.state[weight]
        assert set(state) == {"step", *MOMENTS_OF["lion"]} and int(state["step"]) == step + 1
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_nothing_moves_without_gradient_and_momentum() -> None:
    """What waits for the transition (learned scales, SubLN) has a gradient of 0 until then."""
    waiting = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    lion = Lion([waiting], lr=LR, betas=BETAS, weight_decay=0.0)
    waiting.grad = torch.tensor([0.0, 1e-30])
    lion.step()
    assert waiting.tolist() == pytest.approx([1.0, 1.0 - LR])
    assert waiting[0] == 1.0


def test_a_parameter_without_gradient_is_left_alone() -> None:
    frozen = torch.nn.Parameter(torch.ones(2))
    lion = Lion([frozen], lr=LR, betas=BETAS, weight_decay=DECAY)
    assert lion.step(lambda: 1.5) == 1.5
    assert frozen.tolist() == [1.0, 1.0] and not lion.state[frozen]


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_named_optimizer_starts_without_moving(name: str, make_config: MakeConfig) -> None:
    """DeepSpeed steps once on zero gradients when it starts in bf16."""
    cfg = make_config(f"optim.name={name}")
    weight = torch.nn.Parameter(torch.randn(3))
    before = weight.detach().clone()
    groups = [{"params": [weight], "decayed": True}]
    optimizer = make_optimizer(cfg.optim, groups, fused=False)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight, before)
    assert set(optimizer.state[weight]) == {"step", *MOMENTS_OF[name]}
    assert optimizer.defaults["betas"] == cfg.optim.betas


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.name=muon", ["optim.name='muon'", "data-parallel ranks only", "use adamw"]),
        ("optim.name=adamw8bit", ["optim.name='adamw8bit'", "share a scale", "use adamw"]),
        (
            "transition.optimizer_state=keep_second_moment",
            ["'keep_second_moment' with optim.name='lion'", "no second moment", "{scale: f}"],
        ),
    ],
)
def test_what_does_not_run_is_refused_with_the_reason(
    override: str, parts: list[str], make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as error:
        make_config("optim.name=lion", override)
    for part in parts:
        assert part in str(error.value)
