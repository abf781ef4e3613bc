"""What each optimizer-state policy leaves of Adam at the transition (tests/dist: on all ranks)."""

import pytest
import torch

from bitscale.config import ScaledMoments
from bitscale.engine.fragments import Fragment
from bitscale.transition import apply_optimizer_policy

pytestmark = pytest.mark.unit


def make_adam() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """Two parameters after three AdamW steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    adam = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        adam.step()
    return parameters, adam


def fragments(parameters: list[torch.nn.Parameter], adam: torch.optim.AdamW) -> list[Fragment]:
    return [
        Fragment(
            str(index),
            0,
            parameter.data.view(-1),
            adam.state[parameter]["exp_avg"].view(-1),
            adam.state[parameter]["exp_avg_sq"].view(-1),
            adam.state[parameter]["step"],
        )
        for index, parameter in enumerate(parameters)
    ]


@pytest.mark.parametrize(
    ("policy", "keeps_first", "keeps_second", "step"),
    [("keep", True, True, 3), ("reset", False, False, 0), ("keep_second_moment", False, True, 3)],
)
def test_moments_after_the_policy(
    policy: str, keeps_first: bool, keeps_second: bool, step: int
) -> None:
    parameters, adam = make_adam()
    before = [
        (p.detach().clone(), adam.state[p]["exp_avg"].clone(), adam.state[p]["exp_avg_sq"].clone())
        for p in parameters
    ]
    apply_optimizer_policy(fragments(parameters, adam), policy)
    for parameter, (master, first, second) in zip(parameters, before, strict=True):
        state = adam.state[parameter]
        assert torch.equal(parameter, master)
        assert torch.equal(state["exp_avg"], first if keeps_first else torch.zeros_like(first))
        assert torch.equal(
            state["exp_avg_sq"], second if keeps_second else torch.zeros_like(second)
        )
        assert int(state["step"]) == step


def test_scaled_moments_are_those_of_gradients_that_were_f_times_as_large() -> None:
    """f on the first and f² on the second: what Adam would hold had every gradient been f g."""
    parameters, adam = make_adam()
    apply_optimizer_policy(fragments(parameters, adam), ScaledMoments(scale=0.25))
    torch.manual_seed(0)
    twins = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    twin = torch.optim.AdamW(twins, lr=0.1)
    for _ in range(3):
        for parameter in twins:
            parameter.grad = 0.25 * torch.randn_like(parameter)
        twin.step()
    for ours, theirs in zip(parameters, twins, strict=True):
        # A power of two: exact, but for Adam's eps, which is not in the moments.
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adam.state[ours][moment], twin.state[theirs][moment])
        assert int(adam.state[ours]["step"]) == 3


def test_an_optimizer_with_one_moment() -> None:
    """`reset` and `scale` leave nothing out, and ask for no second moment."""
    for policy, expected, step in (
        ("keep", 2.0, 7),
        ("reset", 0.0, 0),
        (ScaledMoments(scale=0.5), 1.0, 7),
    ):
        master, momentum, count = torch.full((3,), 0.7), torch.full((3,), 2.0), torch.tensor(7.0)
        fragment = Fragment("w", 0, master, momentum, None, count)
        assert list(fragment.moments()) == ["exp_avg"]
        apply_optimizer_policy([fragment], policy)
        assert momentum.tolist() == [expected] * 3 and int(count) == step
        assert master.tolist() == torch.full((3,), 0.7).tolist()


def test_reset_makes_the_next_update_that_of_a_new_optimizer() -> None:
    parameters, adam = make_adam()
    apply_optimizer_policy(fragments(parameters, adam), "reset")
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    new_adam = torch.optim.AdamW(fresh, lr=0.1)
    for old, new in zip(parameters, fresh, strict=True):
        old.grad = torch.full_like(old, 0.3)
        new.grad = old.grad.clone()
    adam.step()
    new_adam.step()
    for old, new in zip(parameters, fresh, strict=True):
        assert torch.equal(old, new)


def test_a_step_count_shared_by_fragments_is_reset_once_for_all() -> None:
    """ZeRO keeps many parameters in one flat tensor with one step count."""
    flat, step = torch.randn(3, 10), torch.tensor(7.0)
    views = [
        Fragment(name, 0, flat[0, low:high], flat[1, low:high], flat[2, low:high], step)
        for name, low, high in (("a", 0, 4), ("b", 4, 10))
    ]
    apply_optimizer_policy(views, "keep_second_moment")
    assert int(step) == 7 and not flat[1].any() and flat[2].all()
    apply_optimizer_policy(views, "reset")
    assert int(step) == 0 and flat[0].all() and not flat[1:].any()
