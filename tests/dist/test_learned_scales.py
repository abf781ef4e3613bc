"""Learned scales (paretoq) through the transition: every ZeRO stage trains what plain torch trains.

All checks of one layout share one run in the world of ranks.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_runs import (
    NO_PERSISTENCE,
    NUM_STEPS,
    TRANSITION_STEP,
    Curve,
    Whole,
    make_batches,
    make_engine,
    reference,
    tiny_config,
    train_step,
    whole_state,
)
from world import World

from bitscale.mesh import Mesh
from bitscale.model.bitlinear import bit_linears, is_scale
from bitscale.telemetry import TernaryTelemetry
from bitscale.transition import assert_every_parameter_owned, begin_transition

pytestmark = pytest.mark.dist

LAYOUTS = [
    pytest.param(0, "fp32", {}, id="zero0-fp32"),
    pytest.param(1, "fp32", {}, id="zero1-fp32"),
    pytest.param(2, "fp32", {}, id="zero2-fp32"),
    pytest.param(3, "fp32", NO_PERSISTENCE, id="zero3-fp32"),
    pytest.param(1, "bf16", {}, id="zero1-bf16"),
    pytest.param(3, "bf16", NO_PERSISTENCE, id="zero3-bf16"),
]
# In nats: loss at λ = 0, and later. Seen: 3e-7 throughout; one code that rounds the other way, as
# the order of summation allows, would be a finite change (docs/results/zero-equivalence.md).
TOLERANCES = {"fp32": (2e-6, 2e-4), "bf16": (1e-4, 3e-3)}
QUANT = {"preset": "paretoq"}


class Seen(NamedTuple):
    curve: Curve
    started: dict[str, Whole]  # right after the transition began
    maxima: dict[str, torch.Tensor]  # max|w| of each row of the compute weights at that moment
    scales: dict[str, float]  # telemetry's, at the end


def run(mesh: Mesh, cfg_arguments: tuple[Any, ...], policy: str, corpus: Path) -> Seen:
    stage, dtype, deepspeed = cfg_arguments
    cfg = tiny_config(stage, dtype, quant=QUANT, engine={"deepspeed": deepspeed})
    engine = make_engine(cfg, mesh)
    telemetry = TernaryTelemetry(engine.module)
    assert_every_parameter_owned(engine, mesh)
    batches = make_batches(cfg, corpus, mesh.rank, mesh.world_size)
    curve = Curve([], [], {})
    started, maxima = {}, {}
    for step in range(NUM_STEPS):
        if step == TRANSITION_STEP:
            curve.states[step] = whole_state(engine, mesh)
            for name, layer in bit_linears(engine.module):
                with engine.gathered(layer.weight) as weight_FD:
                    maxima[f"{name}.alpha"] = weight_FD.float().abs().amax(1)
            begin_transition(engine, mesh, policy)
            started = whole_state(engine, mesh)
            for name, layer in bit_linears(engine.module):
                with engine.gathered(layer.alpha) as alpha_F:  # what the next forward pass reads
                    assert torch.equal(alpha_F.float(), maxima[f"{name}.alpha"])
        loss, norm = train_step(engine, batches, step, mesh)
        curve.losses.append(loss)
        curve.grad_norms.append(norm)
    curve.states[NUM_STEPS] = whole_state(engine, mesh)
    figures = telemetry.read(engine.gathered, compute=True)
    scales = {name: float(layer["scale"] or 0.0) for name, layer in figures.items()}
    return Seen(curve, started, maxima, scales)


@pytest.mark.parametrize(("stage", "dtype", "deepspeed"), LAYOUTS)
def test_two_ranks_train_what_plain_torch_trains(
    world_of: Any, corpus_prefix: Path, stage: int, dtype: str, deepspeed: dict[str, Any]
) -> None:
    world: World = world_of(2)
    seen, other = world.run(run, (stage, dtype, deepspeed), "keep", corpus_prefix)
    assert seen.curve.losses == other.curve.losses
    cfg = tiny_config(stage, dtype, quant=QUANT)
    wanted = reference(cfg, corpus_prefix)
    _check_losses(seen.curve.losses, wanted.losses, TOLERANCES[dtype])
    names = [name for name in seen.started if is_scale(name)]
    assert len(names) == 2 * 7
    before, end = seen.curve.states[TRANSITION_STEP], seen.curve.states[NUM_STEPS]
    for name in names:
        _check_scale(before[name], seen.started[name], end[name], seen.maxima[name])
        assert end[name].step == NUM_STEPS  # the count goes on, as for every other parameter
        layer = name.removesuffix(".alpha")
        assert seen.scales[layer] == pytest.approx(float(end[name].master.mean()) / 1.5, rel=1e-2)
    # Everything else is as it was: the event changes scales only.
    assert all(
        torch.equal(before[name].master, seen.started[name].master)
        and torch.equal(before[name].exp_avg, seen.started[name].exp_avg)
        for name in before.keys() - set(names)
    )
    _check_end(end, wanted.states[NUM_STEPS], 5e-3 if dtype == "fp32" else 5e-2)


def test_scales_start_alike_whatever_the_policy(world_of: Any, corpus_prefix: Path) -> None:
    world: World = world_of(2)
    (seen, _) = world.run(run, (1, "fp32", {}), "reset", corpus_prefix)
    for name, maximum in seen.maxima.items():
        assert torch.equal(seen.started[name].master, maximum)
        assert not seen.started[name].exp_avg_sq.any()
    assert all(whole.step == 0 for whole in seen.started.values())


def _check_losses(ours: list[float], theirs: list[float], allowed: tuple[float, float]) -> None:
    difference = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    seen = max(difference[: TRANSITION_STEP + 1]), max(difference)
    assert seen[0] <= allowed[0] and seen[1] <= allowed[1], seen


def _check_scale(before: Whole, started: Whole, end: Whole, maximum: torch.Tensor) -> None:
    assert not before.exp_avg.any() and not before.exp_avg_sq.any()  # no gradient has come
    assert torch.equal(started.master, maximum)
    assert not torch.equal(before.master, maximum)  # the weights had moved by then
    assert not started.exp_avg.any() and not started.exp_avg_sq.any()
    assert bool((end.exp_avg_sq > 0).any())
    assert not torch.equal(end.master, maximum)


def _check_end(ours: dict[str, Whole], theirs: dict[str, Whole], allowed: float) -> None:
    worst = {
        name: float((ours[name].master - whole.master).norm() / whole.master.norm())
        for name, whole in theirs.items()
    }
    assert ours.keys() == theirs.keys()
    assert max(worst.values()) <= allowed, max(worst.items(), key=lambda item: item[1])
