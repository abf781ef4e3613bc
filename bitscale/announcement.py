"""What a run says of itself when it begins, turns ternary, or goes back."""

from collections.abc import Sequence

import torch

from bitscale.config import Amendment, Config, ScaledMoments, num_steps, transition_step
from bitscale.engine import TrainEngine
from bitscale.mesh import Mesh
from bitscale.model.bitlinear import bit_linears
from bitscale.recorder import format_count


def run_summary(cfg: Config, mesh: Mesh, engine: TrainEngine, num_tokens: int) -> str:
    """The line with which a run of `num_tokens` begins."""
    shapes, ternary = engine.parameter_shapes(), engine.ternary_weights()
    count = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return (
        f"run {cfg.run.dir}: {format_count(sum(count.values()))} parameters "
        f"({format_count(sum(count[name] for name in ternary))} in ternary layers), "
        f"{num_steps(cfg):,} steps, {format_count(num_tokens)} tokens, "
        f"{cfg.train.dtype}, ZeRO-{cfg.engine.zero_stage}, {mesh.world_size} rank(s) on "
        f"{mesh.device.type}{_layout(cfg)}, kernel {_kernel(engine)}; {transition_summary(cfg)}"
    )


def host_lines(hosts: Sequence[str], per_line: int = 8) -> list[str]:
    """Which ranks are where, several hosts a line; `hosts[i]` has rank i. Nothing about one host.

    mpirun, pdsh and Slurm say of a host that is lost its name only."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    if len(ranks) < 2:
        return []
    named = [f"{_ranks(numbers)} on {host}" for host, numbers in ranks.items()]
    return [f"hosts: {', '.join(named[i : i + per_line])}" for i in range(0, len(named), per_line)]


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"ranks {' '.join(map(str, numbers))}"


def transition_summary(cfg: Config) -> str:
    """When and how the run turns ternary, in a few words."""
    start = transition_step(cfg)
    if start is None:
        return "16 bit throughout"
    t = cfg.transition
    policy = t.optimizer_state
    state = f"scaled by {policy.scale:g}" if isinstance(policy, ScaledMoments) else policy
    return (
        f"ternary from step {start:,} (ramp {t.ramp.shape}, optimizer state {state}, "
        f"LR {t.lr}, weight decay {t.weight_decay})"
    )


def amendment_summary(amendment: Amendment) -> str:
    """A rollback of the guard, in a few words."""
    change = (
        f"the ramp {amendment.slower:g} times slower"
        if amendment.slower > 1
        else f"without batch {', '.join(map(str, amendment.skipped_batches))}"
    )
    return (
        f"rollback {amendment.number} from step {amendment.detected_step} to "
        f"{amendment.from_step}, {change}"
    )


def _layout(cfg: Config) -> str:
    p = cfg.parallel
    shared = [
        f"tp {p.tp}" if p.tp > 1 else "",
        "sequence parallel" if p.sequence_parallel else "",
        f"pp {p.pp}" if p.pp > 1 else "",
    ]
    named = ", ".join(filter(None, shared))
    return f" ({named})" if named else ""


def _kernel(engine: TrainEngine) -> str:
    """What computes the ternary layers, whatever `auto` has chosen."""
    layers = bit_linears(engine.module)
    names = {"reference" if layer.kernels is None else layer.kernels.name for _, layer in layers}
    return " and ".join(sorted(names))
