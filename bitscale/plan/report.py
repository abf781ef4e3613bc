"""A plan: every figure of one layout in both phases, as a value that prints and becomes JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from bitscale.config import Config, num_steps, tokens_per_step
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.model.cost import Phase
from bitscale.plan.layout import GIB, Cluster, Layout, Stage, make_layout
from bitscale.plan.memory import Memory, checkpoint_bytes, memory
from bitscale.plan.speed import Bound, StepFlops, bound, phase_steps, run_days, step_flops
from bitscale.plan.wire import Traffic, traffic

# Megatron-LM's median share of this bound over 18 published A100 runs (docs/plan.md).
DEFAULT_EFFICIENCY = 0.5
# Left to the CUDA context, communicators and fragmentation.
DEFAULT_USABLE = 0.92


@dataclass(frozen=True)
class PhasePlan:
    """One phase of the run."""

    phase: Phase
    num_steps: int
    fullest: Stage  # whose ranks hold most
    memory: Memory  # of these
    busiest: Stage  # whose ranks send most
    traffic: list[Traffic]  # of these
    flops: StepFlops
    bound: Bound
    mfu: float  # that the time is reckoned with


@dataclass(frozen=True)
class Plan:
    layout: Layout
    phases: dict[Phase, PhasePlan]  # 16 bit and ternary, whether the run has both or not
    ramp: Memory | None  # of the fullest stage while 0 < λ < 1
    days: float
    usable: float

    @property
    def peak_bytes(self) -> float:
        peaks = [part.memory.peak for part in self.phases.values() if part.num_steps]
        return max([*peaks, *([self.ramp.peak] if self.ramp else [])])

    @property
    def usable_bytes(self) -> float:
        return self.usable * self.layout.cluster.gpu.memory_gib * GIB

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    def stage_peaks(self, phase: Phase) -> list[float]:
        """Bytes of a rank of each pipeline stage."""
        layout = self.layout
        return [memory(layout, stage, phase).peak for stage in layout.stages]

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.layout.cluster.world_size

    @property
    def unoverlapped_seconds(self) -> float:
        """Of all steps if no two limits overlapped: what ranks layouts of equal bound."""
        return sum(p.num_steps * sum(p.bound.seconds.values()) for p in self.phases.values())


def make_plan(
    cfg: Config,
    cluster: Cluster,
    *,
    mfu: float | None = None,
    efficiency: float = DEFAULT_EFFICIENCY,
    usable: float = DEFAULT_USABLE,
) -> Plan:
    """Reckon with `cfg` on `cluster`; `mfu` replaces the bound times `efficiency`.

    Raises:
        ConfigError: the layout cannot be, or a share is no share.
    """
    shares = {"efficiency": efficiency, "usable": usable} | ({} if mfu is None else {"mfu": mfu})
    for name, value in shares.items():
        if not 0 < value <= (2 if name == "mfu" else 1):
            raise ConfigError(f"--{name} {value:g} is not a share; use a number like 0.5")
    layout = make_layout(cfg, cluster)
    steps = phase_steps(layout)
    phases: dict[Phase, PhasePlan] = {}
    for phase in steps:
        limit = bound(layout, phase)
        stage, held = _fullest(layout, phase)
        busiest, sent = _busiest(layout, phase)
        phases[phase] = PhasePlan(
            phase,
            steps[phase],
            stage,
            held,
            busiest,
            sent,
            step_flops(layout, phase),
            limit,
            limit.mfu * efficiency if mfu is None else mfu,
        )
    ramps = cfg.transition.at is not None and cfg.transition.ramp.shape != "none"
    return Plan(
        layout,
        phases,
        _fullest(layout, "ramp")[1] if ramps else None,
        run_days(layout, {phase: part.mfu for phase, part in phases.items()}),
        usable,
    )


def to_tree(plan: Plan) -> dict[str, Any]:
    """For JSON: bytes, FLOPs and seconds as they are."""
    layout, cfg = plan.layout, plan.layout.cfg
    parallel = cfg.parallel
    return {
        "cluster": asdict(layout.cluster),
        "layout": {
            "tp": parallel.tp,
            "pp": parallel.pp,
            "dp": layout.dp,
            "sequence_parallel": parallel.sequence_parallel,
            "zero_stage": cfg.engine.zero_stage,
            "micro_batch_size": cfg.train.micro_batch_size,
            "num_micro_batches": layout.num_micro_batches,
            "activation_checkpointing": cfg.train.activation_checkpointing,
            "layers_per_stage": [stage.num_layers for stage in layout.stages],
            "bubble": layout.bubble,
        },
        "parameters": cost.parameters(cfg.model)._asdict()
        | {"total": cost.parameters(cfg.model).total},
        "tokens_per_step": tokens_per_step(cfg),
        "num_steps": num_steps(cfg),
        "phases": {phase: _phase_tree(plan, part) for phase, part in plan.phases.items()},
        "ramp_memory": None if plan.ramp is None else _memory_tree(plan.ramp),
        "peak_bytes": plan.peak_bytes,
        "usable_bytes": plan.usable_bytes,
        "fits": plan.fits,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "checkpoint_bytes": checkpoint_bytes(layout),
    }


def _phase_tree(plan: Plan, part: PhasePlan) -> dict[str, Any]:
    return {
        "num_steps": part.num_steps,
        "memory": {"stage": part.fullest.index, **_memory_tree(part.memory)},
        "stage_peak_bytes": plan.stage_peaks(part.phase),
        "wire": {
            "stage": part.busiest.index,
            "collectives": [asdict(t) | {"sent": t.sent} for t in part.traffic],
        },
        "flops_per_token": {
            name: flops._asdict() | {"total": flops.total}
            for name, flops in (
                ("forward", part.flops.forward),
                ("backward", part.flops.backward),
                ("recomputed", part.flops.recomputed),
            )
        },
        "bound": {
            "seconds": dict(part.bound.seconds),
            "limit": part.bound.limit,
            "mfu": part.bound.mfu,
        },
        "mfu": part.mfu,
        "step_seconds": part.bound.step_seconds * part.bound.mfu / part.mfu,
    }


def _memory_tree(held: Memory) -> dict[str, Any]:
    return asdict(held) | {"moments": held.moments, "peak": held.peak}


def _fullest(layout: Layout, phase: Phase) -> tuple[Stage, Memory]:
    pairs = [(stage, memory(layout, stage, phase)) for stage in layout.distinct_stages]
    return max(pairs, key=lambda pair: pair[1].peak)


def _busiest(layout: Layout, phase: Phase) -> tuple[Stage, list[Traffic]]:
    pairs = [(stage, traffic(layout, stage, phase)) for stage in layout.distinct_stages]
    return max(pairs, key=lambda pair: sum(t.sent for t in pair[1]))
