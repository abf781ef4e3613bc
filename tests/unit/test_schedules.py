"""λ, learning rate and weight decay: pure functions of the step, against independent formulas."""

import math
import runpy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitscale.config import Config
from bitscale.optim import decayed_and_not, learning_rate, weight_decay
from bitscale.quant.schedule import (
    SIXTEEN_BIT,
    TERNARY,
    Strength,
    quant_strength,
    ramp_end_step,
    ramp_value,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., Config]
SHAPES = ["linear", "paper", "exponential", "sigmoid", "cosine"]

# --- Ramps ---


def sigmoid(x: float) -> float:
    return float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))


def rescaled(f: Callable[[float], float]) -> Callable[[float], float]:
    """f on [0, 1], moved and stretched to run from 0 to 1."""
    return lambda u: (f(u) - f(0.0)) / (f(1.0) - f(0.0))


ORACLES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "paper": lambda u: math.tanh(2.5 * u),  # 2σ(x) - 1 = tanh(x / 2)
    "exponential": rescaled(lambda u: math.exp(5 * u)),
    "sigmoid": rescaled(lambda u: sigmoid(10 * u - 5)),
    "cosine": lambda u: math.sin(math.pi * u / 2) ** 2,  # the half-angle formula
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_ramp_against_another_formula(shape: str, length: int) -> None:
    got = [ramp_value(shape, step, length) for step in range(length)]
    want = [ORACLES[shape](step / length) for step in range(length)]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "step", "value"),
    [
        ("paper", 100, 0.24491866),  # .245 at .1T and .762 at .4T: arXiv:2502.11895's code
        ("paper", 400, 0.76159416),
        ("paper", 999, 0.9865477),
        ("linear", 250, 0.25),
        ("exponential", 500, 0.07585818),
        ("sigmoid", 250, 0.07010372),
        ("sigmoid", 500, 0.5),
        ("cosine", 250, 0.14644661),
        ("none", 0, 1.0),
    ],
)
def test_ramp_golden_points(shape: str, step: int, value: float) -> None:
    assert ramp_value(shape, step, 1000) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_ramp_ends_and_monotonicity(shape: str) -> None:
    values = [ramp_value(shape, step, 500) for step in range(503)]
    assert values[0] == 0.0
    assert values[500:] == [1.0, 1.0, 1.0]  # exactly
    assert all(a < b for a, b in pairwise(values[:501]))
    assert values[499] > 0.98
    assert ramp_value(shape, 0, 0) == 1.0


def test_none_is_one_from_its_first_step() -> None:
    assert [ramp_value("none", step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


def test_strength_before_inside_and_after(make_config: MakeConfig) -> None:
    cfg = make_config("transition.ramp={shape: linear, over: {steps: 20}}")
    assert quant_strength(0, cfg) == quant_strength(39, cfg) == SIXTEEN_BIT
    assert quant_strength(40, cfg) == SIXTEEN_BIT  # the ramp's value at its own step 0
    assert quant_strength(45, cfg) == Strength(0.25, 0.25)
    assert quant_strength(59, cfg) == Strength(0.95, 0.95)
    assert quant_strength(60, cfg) == quant_strength(99, cfg) == TERNARY
    assert ramp_end_step(cfg) == 60
    longest = make_config("transition.ramp={shape: linear, over: {steps: 59}}")
    assert quant_strength(99, longest) == TERNARY


def test_activations_have_their_own_ramp(make_config: MakeConfig) -> None:
    cfg = make_config(
        "transition.ramp={shape: linear, over: {steps: 10}}",
        "transition.activation_ramp={shape: cosine, over: {steps: 40}}",
    )
    assert quant_strength(45, cfg) == Strength(0.5, pytest.approx(0.0380602))
    assert quant_strength(60, cfg) == Strength(1.0, pytest.approx(0.5))
    assert ramp_end_step(cfg) == 80
    at_once = make_config(
        "transition.ramp={shape: linear, over: {steps: 10}}",
        "transition.activation_ramp={shape: none}",
    )
    assert quant_strength(40, at_once) == Strength(0.0, 1.0)
    assert ramp_end_step(at_once) == 50


def test_without_a_ramp_the_switch_is_at_once(make_config: MakeConfig) -> None:
    cfg = make_config()
    assert [quant_strength(s, cfg) for s in (39, 40)] == [SIXTEEN_BIT, TERNARY]
    assert ramp_end_step(cfg) == 40


def test_from_scratch_and_never(make_config: MakeConfig) -> None:
    assert quant_strength(0, make_config("transition.at.step=0")) == TERNARY
    never = make_config("transition.at=null")
    assert {quant_strength(step, never) for step in range(100)} == {SIXTEEN_BIT}
    assert ramp_end_step(never) is None


@given(steps=st.lists(st.integers(0, 99), max_size=30))
def test_strength_depends_on_the_step_alone(steps: list[int], make_config: MakeConfig) -> None:
    """Whatever was asked before: no counter advances."""
    cfg = make_config("transition.ramp={shape: paper, over: {fraction: 0.3}}")
    in_order = [quant_strength(step, cfg) for step in range(100)]
    assert [quant_strength(step, cfg) for step in steps] == [in_order[step] for step in steps]


def test_strength_ignores_every_other_knob(make_config: MakeConfig) -> None:
    ramp = "transition.ramp={shape: sigmoid, over: {steps: 30}}"
    plain = make_config(ramp)
    other = make_config(
        ramp,
        "transition.optimizer_state=reset",
        "transition.lr=rewarm",
        "transition.weight_decay=off",
        "optim.schedule=cosine",
        "train.micro_batch_size=1",
        "train.activation_checkpointing=full",
        "train.stop_step=50",
    )
    assert [quant_strength(s, plain) for s in range(100)] == [
        quant_strength(s, other) for s in range(100)
    ]


# --- Learning rate ---


def rates(cfg: Config, num_steps: int = 100) -> list[float]:
    return [learning_rate(step, cfg) for step in range(num_steps)]


def torch_rates(
    scheduler: type[torch.optim.lr_scheduler.LRScheduler], steps: int, **options: float
) -> list[float]:
    """What torch's own scheduler gives, from a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler(optimizer, **options)  # type: ignore[arg-type]
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


def test_warmup_is_linear_and_never_zero(make_config: MakeConfig) -> None:
    got = rates(make_config("optim.lr=1.0"))
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10)
    assert got[9:] == [1.0] * 91
    assert rates(make_config("optim.lr=1.0", "optim.warmup.steps=0")) == [1.0] * 100


def test_linear_against_torch(make_config: MakeConfig) -> None:
    got = rates(make_config("optim.lr=1.0", "optim.schedule=linear", "optim.min_lr_ratio=0.2"))
    oracle = torch_rates(
        torch.optim.lr_scheduler.LinearLR, 90, start_factor=1.0, end_factor=0.2, total_iters=90
    )
    np.testing.assert_allclose(got[10:], oracle, rtol=1e-9)
    assert got[55] == pytest.approx(0.6)  # half-way from 1 to .2


def test_cosine_against_torch(make_config: MakeConfig) -> None:
    got = rates(make_config("optim.lr=1.0", "optim.schedule=cosine", "optim.min_lr_ratio=0.2"))
    oracle = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 90, T_max=90, eta_min=0.2)
    np.testing.assert_allclose(got[10:], oracle, rtol=1e-9)
    assert got[55] == pytest.approx(0.6)


def test_wsd_is_a_plateau_and_a_linear_decay(make_config: MakeConfig) -> None:
    cfg = make_config("optim.lr=1.0", "optim.schedule=wsd", "optim.decay.steps=40")
    got = rates(cfg, 101)
    assert got[9:61] == [1.0] * 52
    np.testing.assert_allclose(got[60:], 1.0 - 0.9 * np.arange(41) / 40)


def test_trilm_drops_the_peak_half_way(make_config: MakeConfig) -> None:
    plain = rates(make_config("optim.lr=1.0", "optim.schedule=linear"))
    got = rates(make_config("optim.lr=1.0", "optim.schedule=trilm"))
    assert got[:50] == plain[:50]
    np.testing.assert_allclose(got[50:], np.array(plain[50:]) * 0.6)
    early = make_config("optim.schedule=trilm", "optim.trilm_drop_at=0.2", "optim.lr=1.0")
    np.testing.assert_allclose(rates(early)[20], plain[20] * 0.6)
    assert rates(early)[19] == plain[19]


def test_the_papers_cosine_is_nearly_constant(make_config: MakeConfig) -> None:
    """arXiv:2502.11895: OLMo's 739,328-step cosine, 2,000 steps of warm-up, 10,000 steps run."""
    cfg = make_config(
        "train.steps=10000",
        "optim.lr=4e-4",
        "optim.schedule=cosine",
        "optim.warmup.steps=2000",
        "optim.horizon.steps=739328",
    )
    assert learning_rate(0, cfg) == pytest.approx(4e-4 / 2000)
    assert learning_rate(1999, cfg) == learning_rate(2000, cfg) == 4e-4
    progress = (9999 - 2000) / (739328 - 2000)
    want = 4e-4 * (0.1 + 0.9 * math.cos(math.pi * progress / 2) ** 2)
    assert learning_rate(9999, cfg) == pytest.approx(want, rel=1e-12)
    assert 0.9997 < learning_rate(9999, cfg) / 4e-4 < 0.9998


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_horizon_the_floor_remains(schedule: str, make_config: MakeConfig) -> None:
    got = rates(make_config("optim.lr=1.0", f"optim.schedule={schedule}", "optim.horizon.steps=60"))
    np.testing.assert_allclose(got[60:], 0.1)
    assert 0.1 < got[59] < 0.13


def test_trilm_drops_relative_to_the_horizon(make_config: MakeConfig) -> None:
    changes = ["optim.lr=1.0", "optim.horizon.steps=200"]
    got = rates(make_config(*changes, "optim.schedule=trilm"))
    assert got == rates(make_config(*changes, "optim.schedule=linear"))


def test_continue_is_the_schedule_without_transition(make_config: MakeConfig) -> None:
    for schedule in ("constant", "linear", "cosine", "wsd", "trilm"):
        with_transition = make_config(f"optim.schedule={schedule}")
        without = make_config(f"optim.schedule={schedule}", "transition.at=null")
        assert rates(with_transition) == rates(without)


def test_rewarm_repeats_the_warmup_and_rejoins(make_config: MakeConfig) -> None:
    changes = ["optim.schedule=cosine", "optim.lr=1.0"]
    plain = rates(make_config(*changes))
    got = rates(make_config(*changes, "transition.lr=rewarm", "transition.lr_rewarm.steps=5"))
    assert got[:40] == plain[:40]
    np.testing.assert_allclose(
        np.array(got[40:45]) / np.array(plain[40:45]), [0.2, 0.4, 0.6, 0.8, 1.0]
    )
    assert got[44:] == plain[44:]


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_decay_is_fused_with_the_transition(schedule: str, make_config: MakeConfig) -> None:
    cfg = make_config("optim.lr=1.0", f"optim.schedule={schedule}", "transition.lr=decay")
    got = rates(cfg, 101)
    assert got[9:41] == [1.0] * 32
    np.testing.assert_allclose(got[40:], 1.0 - 0.9 * np.arange(61) / 60)
    np.testing.assert_allclose(got, np.minimum.accumulate(got[9:])[0] * np.array(got))


@pytest.mark.parametrize("policy", ["rewarm", "decay"])
def test_policies_need_a_transition(policy: str, make_config: MakeConfig) -> None:
    never = make_config("transition.at=null", f"transition.lr={policy}")
    assert rates(never) == rates(make_config("transition.at=null"))


# --- Weight decay ---


def decays(cfg: Config) -> list[float]:
    return [weight_decay(step, cfg) for step in range(100)]


def test_weight_decay_policies(make_config: MakeConfig) -> None:
    assert decays(make_config()) == [0.1] * 100
    off = make_config("transition.weight_decay=off")
    assert decays(off) == [0.1] * 40 + [0.0] * 60
    off_at = make_config("transition.weight_decay=off_at")  # TriLM: at two thirds
    assert decays(off_at) == [0.1] * 67 + [0.0] * 33
    at_70 = make_config("transition.weight_decay=off_at", "transition.weight_decay_off_at.step=70")
    assert decays(at_70) == [0.1] * 70 + [0.0] * 30


def test_weight_decay_without_transition(make_config: MakeConfig) -> None:
    assert decays(make_config("transition.at=null", "transition.weight_decay=off")) == [0.1] * 100
    twin = make_config("transition.at=null", "transition.weight_decay=off_at")
    assert decays(twin) == [0.1] * 67 + [0.0] * 33  # a 16-bit twin keeps the comparison fair


def test_only_matrices_decay() -> None:
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 4), "norm": torch.nn.LayerNorm(4)})
    model["frozen"] = torch.nn.Linear(2, 2).requires_grad_(False)
    decayed, others = decayed_and_not(model.parameters())
    assert [id(p) for p in decayed] == [id(model["linear"].weight)]
    assert {id(p) for p in others} == {
        id(p) for p in (model["linear"].bias, model["norm"].weight, model["norm"].bias)
    }


# --- Four independent knobs ---


def test_reset_does_not_rewarm_and_rewarm_does_not_reset(make_config: MakeConfig) -> None:
    """The paper's code did both under one name."""
    from bitscale.engine import Fragment
    from bitscale.transition import apply_optimizer_policy

    def state_after(cfg: Config) -> list[list[float]]:
        values = [torch.full((3,), float(i)) for i in (1, 2, 3)]
        fragment = Fragment("w", 0, *values, step=torch.tensor(40.0))
        apply_optimizer_policy([fragment], cfg.transition.optimizer_state)
        return [x.flatten().tolist() for x in (*values, fragment.step)]

    untouched = [[1.0] * 3, [2.0] * 3, [3.0] * 3, [40.0]]
    keep, reset = make_config(), make_config("transition.optimizer_state=reset")
    rewarm = make_config("transition.lr=rewarm", "transition.lr_rewarm.steps=20")
    momentum = make_config("transition.optimizer_state=keep_second_moment")
    assert state_after(keep) == untouched
    assert state_after(reset) == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [0.0]]
    assert state_after(momentum) == [[1.0] * 3, [0.0] * 3, [3.0] * 3, [40.0]]
    assert state_after(rewarm) == untouched

    assert rates(keep) == rates(reset) == rates(momentum)
    assert rates(rewarm) != rates(keep)
    assert decays(keep) == decays(reset) == decays(rewarm)


# --- The drawing in docs/schedules.md ---


def test_every_schedule_is_drawn(tmp_path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools/draw_schedules.py"))
    tool["draw"](tmp_path / "schedules.png")
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")
    document = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
    assert "images/schedules.png" in document
    assert "tools/draw_schedules.py" in document
    named = {*SHAPES, "none", "constant", "wsd", "trilm", "continue", "rewarm", "decay", "off_at"}
    assert [name for name in named if f"`{name}`" not in document] == []
