"""Which cells begin alike: the 16-bit part that several share is trained once.

A cell that turns ternary at step K is, up to K, a 16-bit run. Two cells whose first K steps are
decided by equal values share a trunk: a 16-bit run that saves at K. The cell then begins with
`--resume TRUNK/step-K`, which continues bit for bit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bitscale.config import (
    Config,
    config_hash,
    num_steps,
    quant_spec,
    to_tree,
    transition_step,
)
from bitscale.optim import learning_rate, weight_decay
from bitscale.sweep.expand import Cell, sixteen_bit


class Fork(NamedTuple):
    """Where a run begins: `step` of the run `trunk`."""

    trunk: str
    step: int


@dataclass(frozen=True)
class Run:
    """One training run of the plan."""

    key: str
    cfg: Config
    last_step: int  # where it may end: the budget, or the last fork of a trunk nobody asked for
    fork: Fork | None = None
    save_at: tuple[int, ...] = ()  # steps at which others begin
    seeds: tuple[int, ...] = ()  # of the cells it serves; orders the work
    keep: str = "none"

    @property
    def is_trunk(self) -> bool:
        return bool(self.save_at)


@dataclass
class _Trunk:
    cfg: Config
    end: int
    forks: dict[str, int] = field(default_factory=dict)  # run -> step


def plan_runs(cells: Sequence[Cell]) -> list[Run]:
    """The runs of `cells`, trunks included, those of early seeds first, trunks before forks."""
    wanted = {cell.key: cell.cfg for cell in cells}
    forks = _find_trunks(wanted)
    trunks = {key: trunk for key, trunk in forks.items() if trunk.forks}
    parent = {run: Fork(key, step) for key, t in trunks.items() for run, step in t.forks.items()}
    by_key: dict[str, list[Cell]] = {}
    for cell in cells:
        by_key.setdefault(cell.key, []).append(cell)
    runs: dict[str, Run] = {}
    for key in [*wanted, *(key for key in trunks if key not in wanted)]:
        cfg = wanted[key] if key in wanted else trunks[key].cfg
        steps = tuple(sorted(set(trunks[key].forks.values()))) if key in trunks else ()
        served = [key, *(trunks[key].forks if key in trunks else ())]
        runs[key] = Run(
            key=key,
            cfg=cfg,
            last_step=num_steps(cfg) if key in wanted else max(steps),
            fork=parent.get(key),
            save_at=steps,
            seeds=tuple(sorted({cell.seed for k in served for cell in by_key.get(k, [])})),
            keep="last" if any(c.keep == "last" for c in by_key.get(key, [])) else "none",
        )
    # A stable order: by the first seed served, trunks first, else as in the file.
    return sorted(runs.values(), key=lambda run: (run.seeds[0], not run.is_trunk))


def _find_trunks(wanted: dict[str, Config]) -> dict[str, _Trunk]:
    """16-bit runs, asked for or not, with the runs that can begin from each."""
    starts = {key: transition_step(cfg) for key, cfg in wanted.items()}
    trunks = {
        key: _Trunk(cfg, num_steps(cfg)) for key, cfg in wanted.items() if starts[key] is None
    }
    # A guard remembers the losses before a fork, which the forked run has not seen.
    waiting = [
        (start, key)
        for key, start in starts.items()
        if start and wanted[key].transition.guard.spike is None
    ]
    beginnings = Beginnings()
    # The latest transition first: its 16-bit part can hold the others'.
    for step, key in sorted(waiting, key=lambda pair: -pair[0]):
        cfg = wanted[key]
        if step > num_steps(cfg):
            continue
        twin = trunks.get(config_hash(sixteen_bit(cfg)))  # first: it goes on beside the fork
        for trunk in [twin, *trunks.values()] if twin else trunks.values():
            if trunk.end >= step and beginnings.equal(trunk.cfg, cfg, step):
                trunk.forks[key] = step
                break
        else:
            shared = any(
                other != key and earlier <= step and beginnings.equal(wanted[other], cfg, earlier)
                for earlier, other in waiting
            )
            if shared:  # else nothing would be saved
                alone = sixteen_bit(cfg)
                trunks[config_hash(alone)] = _Trunk(alone, step, {key: step})
    return trunks


class Beginnings:
    """Compares the first steps of configurations, what is costly computed once for each."""

    def __init__(self) -> None:
        self._fixed: dict[int, str] = {}
        self._rates: dict[int, list[tuple[float, float]]] = {}
        self._kept: list[Config] = []  # alive, as they are known by their id

    def equal(self, one: Config, other: Config, steps: int) -> bool:
        """Whether the first `steps`, in 16 bit, of both are equal bit for bit.

        Schedules count by their values, so that a longer run with the same first part is a trunk
        too. Of the quantizer only what acts, or has parameters, at λ = 0 counts.
        """
        if self._fixed_of(one) != self._fixed_of(other):
            return False
        return self._rates_of(one, steps) == self._rates_of(other, steps)

    def _fixed_of(self, cfg: Config) -> str:
        if id(cfg) not in self._fixed:
            self._kept.append(cfg)
            self._fixed[id(cfg)] = _fixed(cfg)
        return self._fixed[id(cfg)]

    def _rates_of(self, cfg: Config, steps: int) -> list[tuple[float, float]]:
        """Learning rate and weight decay of the first `steps`."""
        known = self._rates.setdefault(id(cfg), [])
        known += [
            (learning_rate(step, cfg), weight_decay(step, cfg)) for step in range(len(known), steps)
        ]
        return known[:steps]


def _fixed(cfg: Config) -> str:
    """What decides the steps of a 16-bit run besides its schedules."""
    tree = to_tree(cfg)
    for section in ("run", "log", "checkpoint", "transition", "optim"):
        tree.pop(section, None)
    for key in ("steps", "tokens", "stop_step", "eval_every", "eval_batches"):
        tree["train"].pop(key, None)
    spec = quant_spec(cfg.quant)
    tree["quant"] = {
        "norm": spec.norm,
        "learned": spec.weight.measure == "learned",
        "gradient_bits": spec.gradient_bits,
        "kernel": cfg.quant.kernel,
    }
    o = cfg.optim
    tree["optim"] = [o.name, o.betas, o.eps, o.clip]
    tree["guard"] = cfg.transition.guard.model_dump()
    return json.dumps(tree, sort_keys=True)


def run_config(run: Run, directory: str) -> Config:
    """The configuration with which `run` is started in `directory`."""
    cfg = run.cfg
    saved = cfg.checkpoint.model_copy(update={"at": run.save_at})
    if cfg.transition.guard.spike is None:  # which needs something to go back to
        saved = saved.model_copy(update={"keep_last": 1})
    trained = cfg.train
    if run.last_step < num_steps(cfg):
        trained = trained.model_copy(update={"stop_step": run.last_step})
    return cfg.model_copy(
        update={
            "run": cfg.run.model_copy(update={"dir": directory}),
            "checkpoint": saved,
            "train": trained,
        }
    )
