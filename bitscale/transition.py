"""What happens to the optimizer at the moment a run turns from 16 bit to ternary.

λ, learning rate and weight decay are pure functions of the step (quant/schedule.py, optim.py).
Adam's state, and scales that are learned from now on, are all that an event changes, here, through
fragments, in place: the Parameters, their owner and all other masters stay what they were.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bitscale.config import OptimizerState, ScaledMoments
from bitscale.engine import Fragment, TrainEngine
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import bit_linears
from bitscale.quant.learned import initial_scale


def begin_transition(engine: TrainEngine, mesh: Mesh, policy: OptimizerState) -> None:
    """Apply the optimizer-state policy and start learned scales, on every rank (a collective).

    Called before the first step of the transition, and only there: a run resumed at that step
    holds the state of before, a run resumed later holds the state of after.
    """
    assert_every_parameter_owned(engine, mesh)
    apply_optimizer_policy(engine.fragments(), policy)
    start_learned_scales(engine)


def start_learned_scales(engine: TrainEngine) -> None:
    """Set every learned scale from its weight as it is now (a collective).

    Their Adam moments become 0 whatever the policy: no gradient has reached them before.
    """
    initial: dict[str, Tensor] = {}
    for name, layer in bit_linears(engine.module):
        if layer.alpha is not None:
            with engine.gathered(layer.weight) as weight_FD:
                initial[f"{name}.alpha"] = initial_scale(weight_FD)
    if not initial:
        return
    for fragment in engine.fragments():
        if fragment.name in initial:
            end = fragment.start + fragment.numel
            fragment.master.copy_(initial[fragment.name][fragment.start : end])
            for moment in fragment.moments().values():
                moment.zero_()
    engine.publish_masters()


def apply_optimizer_policy(fragments: Iterable[Fragment], policy: OptimizerState) -> None:
    """Change moments and step counts in place; masters are never touched.

    `keep` changes nothing; `reset` zeroes the moments and the step count, as at the start of
    training; `keep_second_moment` zeroes the first moment only (direction forgotten, per-weight
    step size kept, no second bias correction); `{scale: f}` multiplies the first by f and the
    second by f², as if every gradient so far had been f times what it was.
    """
    if policy == "keep":
        return
    for fragment in fragments:
        if isinstance(policy, ScaledMoments):
            fragment.exp_avg.mul_(policy.scale)
            if fragment.exp_avg_sq is not None:
                fragment.exp_avg_sq.mul_(policy.scale**2)
            continue
        fragment.exp_avg.zero_()
        if policy == "reset":
            if fragment.exp_avg_sq is not None:
                fragment.exp_avg_sq.zero_()
            fragment.step.zero_()


def assert_every_parameter_owned(engine: TrainEngine, mesh: Mesh) -> None:
    """Every element of every parameter belongs to the optimizer of exactly one rank (or, at
    stage 0, is saved by exactly one)."""
    owned = sum(fragment.numel for fragment in engine.fragments() if fragment.saved_here)
    total = int(mesh.sum(torch.tensor(owned, dtype=torch.int64, device=mesh.device)))
    wanted = sum(math.prod(shape) for shape in engine.parameter_shapes().values())
    assert total == wanted, f"the optimizer owns {total} of {wanted} parameter elements"
