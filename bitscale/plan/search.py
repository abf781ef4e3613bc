"""Every layout of a model on a cluster that the configuration checks admit, ranked."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from bitscale.config import Checkpointing, Config
from bitscale.config.checks import check
from bitscale.errors import ConfigError
from bitscale.plan.layout import GIB, Cluster
from bitscale.plan.report import Plan, make_plan

MAX_MICRO_BATCH_SIZE = 64


@dataclass(frozen=True)
class Found:
    num_admitted: int
    fitting: list[Plan]  # best first


def search(
    cfg: Config, cluster: Cluster, *, mfu: float | None, efficiency: float, usable: float
) -> Found:
    """Layouts by days to the budget, then by time if nothing overlapped, then by memory.

    Tensor parallelism stays within a node. Raises ConfigError if none is admitted or none fits.
    """
    fitting, num_admitted, least = [], 0, math.inf
    reason = (
        f"train.global_batch_size={cfg.train.global_batch_size} is no multiple of any number of "
        f"data-parallel ranks; use a multiple of {cluster.world_size}"
    )
    for candidate in candidates(cfg, cluster):
        try:
            check(candidate)
            plan = make_plan(candidate, cluster, mfu=mfu, efficiency=efficiency, usable=usable)
        except ConfigError as error:
            reason = str(error)
            continue
        num_admitted, least = num_admitted + 1, min(least, plan.peak_bytes)
        if plan.fits:
            fitting.append(plan)
    if not num_admitted:
        raise ConfigError(f"no layout of {cluster.world_size} ranks is admitted: {reason}")
    if not fitting:
        room = usable * cluster.gpu.memory_gib
        raise ConfigError(
            f"none of {num_admitted} admitted layouts fits: the smallest needs "
            f"{least / GIB:.1f} GiB and --gpu {cluster.gpu.name} has {room:.1f} usable; use more "
            "or larger GPUs"
        )
    # A thousandth of the time is no difference.
    fitting.sort(key=lambda p: (float(f"{p.days:.3g}"), p.unoverlapped_seconds, p.peak_bytes))
    return Found(num_admitted, fitting)


def candidates(cfg: Config, cluster: Cluster) -> Iterator[Config]:
    """`cfg` with every combination of what a layout consists of that fills the cluster."""
    for tp in _divisors(cluster.gpus_per_node):
        for pp in _divisors(cluster.world_size // tp):
            dp = cluster.world_size // (tp * pp)
            if pp > cfg.model.num_layers or cfg.train.global_batch_size % dp:
                continue
            sizes = _divisors(cfg.train.global_batch_size // dp)
            for size in (s for s in sizes if s <= MAX_MICRO_BATCH_SIZE):
                for sequence_parallel in (False, True)[: 1 + (tp > 1)]:
                    for zero_stage in (1,) if pp > 1 else (0, 1, 2, 3):
                        for checkpointing in get_args(Checkpointing):
                            yield with_layout(
                                cfg, tp, pp, size, sequence_parallel, zero_stage, checkpointing
                            )


def with_layout(
    cfg: Config,
    tp: int,
    pp: int,
    micro_batch_size: int,
    sequence_parallel: bool,
    zero_stage: int,
    checkpointing: Checkpointing,
) -> Config:
    """Not checked: the caller does."""
    parallel = {"tp": tp, "pp": pp, "sequence_parallel": sequence_parallel}
    train = {"micro_batch_size": micro_batch_size, "activation_checkpointing": checkpointing}
    return cfg.model_copy(
        update={
            "parallel": cfg.parallel.model_copy(update=parallel),
            "train": cfg.train.model_copy(update=train),
            "engine": cfg.engine.model_copy(update={"zero_stage": zero_stage}),
        }
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
