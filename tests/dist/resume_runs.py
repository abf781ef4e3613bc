"""Runs through the transition, saved on the way at one layout and resumed at others.

For tests/dist/test_resume_matrix.py and tools/compare_resume.py: `save_run` trains without a break
and keeps checkpoints and what it held; `resume_runs` restores them and compares.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from test_layouts import save
from tiny_runs import (
    KINDS,
    NO_PERSISTENCE,
    TERNARY_STEP,
    TRANSITION_STEP,
    Whole,
    make_batches,
    make_engine,
    tiny_config,
    train_step,
    whole_state,
)

from bitscale import checkpoint
from bitscale.config import Config, OptimizerState, num_kv_heads
from bitscale.data.batches import Batches
from bitscale.engine import TrainEngine
from bitscale.mesh import Mesh, share_model
from bitscale.transition import begin_transition

# Steps done when a checkpoint is saved. The second is the transition's own: its policy acts in the
# resumed run; the third lies inside the ramp, the last has λ = 1.
SAVED_STEPS = {
    "before": TRANSITION_STEP - 2,
    "at the transition": TRANSITION_STEP,
    "in the ramp": TRANSITION_STEP + 2,
    "after": TERNARY_STEP + 1,
}


class Layout(NamedTuple):
    world_size: int
    stage: int = 1
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    @property
    def name(self) -> str:
        dp = self.world_size // (self.tp * self.pp)
        parts = [f"TP {self.tp}" + (" SP" if self.sequence_parallel else "")] * (self.tp > 1)
        parts += [f"PP {self.pp}"] * (self.pp > 1) + [f"DP {dp}"] * (dp > 1)
        ranks = f"{self.world_size} rank" + "s" * (self.world_size > 1)
        return f"{ranks}: {', '.join([*parts, f'ZeRO-{self.stage}'])}"


class Saved(NamedTuple):
    """What the uninterrupted run held at a checkpoint, and did in the step after it."""

    state: dict[str, Whole]
    begun: dict[str, Whole]  # after the policy, at the transition; elsewhere the same
    next_loss: float
    next_state: dict[str, Whole]


class Kept(NamedTuple):
    """An uninterrupted run: its checkpoints, and what it held and did."""

    root: Path
    policy: OptimizerState
    saved: dict[str, Saved]


class Difference(NamedTuple):
    """Between a resumed run and the uninterrupted one, at one checkpoint."""

    moment: str  # of SAVED_STEPS
    restored: list[str]  # parameters whose master, moments or count are not equal to the bit
    begun: list[str]  # the same after the policy has acted
    loss: float  # |difference| of the first step's, nats
    masters: float  # largest |difference| / |value| (2-norms) of a parameter after that step
    moments: float


def run_config(layout: Layout, policy: str | dict[str, float], **changes: Any) -> Config:
    """A run of tiny_runs at `layout`; `changes` override whole keys of sections."""
    parallel = {
        "tp": layout.tp,
        "pp": layout.pp,
        "sequence_parallel": layout.sequence_parallel,
    }
    transition = {
        "at": {"step": TRANSITION_STEP},
        "ramp": {"shape": "linear", "over": {"steps": TERNARY_STEP - TRANSITION_STEP}},
        "optimizer_state": policy,
    }
    engine = {"deepspeed": NO_PERSISTENCE} if layout.stage == 3 else {}
    return tiny_config(
        layout.stage, "fp32", parallel=parallel, transition=transition, engine=engine, **changes
    )


def build(mesh: Mesh, cfg: Config) -> tuple[TrainEngine, Mesh]:
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    return make_engine(cfg, mesh), mesh


def save_run(mesh: Mesh, cfg: Config, corpus: Path, root: Path) -> Kept:
    """Train past the last of SAVED_STEPS, and keep a checkpoint at each under `root`."""
    engine, mesh = build(mesh, cfg)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    moment_at = {step: moment for moment, step in SAVED_STEPS.items()}
    saved = {}
    for step in range(max(moment_at) + 1):
        if step in moment_at:
            state = whole_state(engine, mesh)
            save(engine, mesh, root, step, engine.fragments())
        if step == TRANSITION_STEP:
            begin_transition(engine, mesh, cfg.transition.optimizer_state)
        begun = whole_state(engine, mesh) if step == TRANSITION_STEP else {}
        loss, _ = train_step(engine, batches, step, mesh)
        if step in moment_at:
            after = whole_state(engine, mesh)
            saved[moment_at[step]] = Saved(state, begun or state, loss, after)
    return Kept(root, cfg.transition.optimizer_state, saved)


def resume_runs(
    mesh: Mesh, cfg: Config, corpus: Path, runs: list[Kept]
) -> list[list[Difference]]:
    """Restore every checkpoint of `runs` into one engine, and train one step from each."""
    engine, mesh = build(mesh, cfg)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    return [
        [resume(engine, mesh, batches, run, moment) for moment in run.saved] for run in runs
    ]


def resume(
    engine: TrainEngine, mesh: Mesh, batches: Batches, run: Kept, moment: str
) -> Difference:
    """What one checkpoint of a run gives here, compared with the run that went on."""
    then, step = run.saved[moment], SAVED_STEPS[moment]
    reader = checkpoint.Reader(run.root / f"step-{step:08d}")
    reader.restore(engine.fragments(), engine.parameter_shapes())
    engine.publish_masters()
    restored = begun = differing(whole_state(engine, mesh), then.state)
    if step == TRANSITION_STEP:
        begin_transition(engine, mesh, run.policy)
        begun = differing(whole_state(engine, mesh), then.begun)
    loss, _ = train_step(engine, batches, step, mesh)
    after = whole_state(engine, mesh)
    return Difference(
        moment,
        restored,
        begun,
        abs(loss - then.next_loss),
        distance(after, then.next_state, ("master",)),
        distance(after, then.next_state, ("exp_avg", "exp_avg_sq")),
    )


def differing(ours: dict[str, Whole], theirs: dict[str, Whole]) -> list[str]:
    """Parameters whose master, moments or step count differ in a bit."""
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, a in ours.items()
        if a.step != theirs[name].step
        or not all(torch.equal(getattr(a, kind), getattr(theirs[name], kind)) for kind in KINDS)
    ]


def distance(ours: dict[str, Whole], theirs: dict[str, Whole], kinds: tuple[str, ...]) -> float:
    """Largest |difference| / |value| of a parameter, 0 where both are 0."""
    pairs = [
        (getattr(ours[name], kind), getattr(whole, kind))
        for name, whole in theirs.items()
        for kind in kinds
    ]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
