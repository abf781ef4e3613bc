"""What happens to the optimizer at the moment a run turns from 16 bit to ternary.

λ, learning rate and weight decay are pure functions of the step (quant/schedule.py, optim.py).
Adam's state is the only thing that an event changes, here, through fragments, in place: the
Parameters, their masters and their owner stay what they were.
"""

import math
from collections.abc import Iterable

import torch

from bitscale.engine import Fragment, TrainEngine
from bitscale.mesh import Mesh


def begin_transition(engine: TrainEngine, mesh: Mesh, policy: str) -> None:
    """Apply the optimizer-state policy on every rank (a collective).

    Called before the first step of the transition, and only there: a run resumed at that step
    holds the state of before, a run resumed later holds the state of after.
    """
    assert_every_parameter_owned(engine, mesh)
    apply_optimizer_policy(engine.fragments(), policy)


def apply_optimizer_policy(fragments: Iterable[Fragment], policy: str) -> None:
    """`keep` changes nothing; `reset` zeroes both moments and the step count, as at the start of
    training; `keep_second_moment` zeroes the first moment only (direction forgotten, per-weight
    step size kept, no second bias correction)."""
    if policy == "keep":
        return
    for fragment in fragments:
        fragment.exp_avg.zero_()
        if policy == "reset":
            fragment.exp_avg_sq.zero_()
            fragment.step.zero_()


def assert_every_parameter_owned(engine: TrainEngine, mesh: Mesh) -> None:
    """Every element of every parameter belongs to the optimizer of exactly one rank (or, at
    stage 0, is saved by exactly one)."""
    owned = sum(fragment.numel for fragment in engine.fragments() if fragment.saved_here)
    total = int(mesh.sum(torch.tensor(owned, dtype=torch.int64, device=mesh.device)))
    wanted = sum(math.prod(shape) for shape in engine.parameter_shapes().values())
    assert total == wanted, f"the optimizer owns {total} of {wanted} parameter elements"
