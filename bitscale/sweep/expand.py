"""A sweep as cells: every point of it with every seed, each a whole, checked configuration."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitscale.config import (
    Config,
    RampConfig,
    TransitionConfig,
    config_hash,
    interpolate,
    merge,
    parse_config,
)
from bitscale.errors import ConfigError
from bitscale.sweep.derive import Derivation, Tree, get, nested
from bitscale.sweep.spec import Draw, Keys, Sweep, Value

_MAX_CELLS = 10_000
_DEFAULTS = TransitionConfig()


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. Cells of several sweeps with the same `key` are one run."""

    sweep: str
    label: str  # the point; the same for all seeds
    seed: int
    cfg: Config  # run.dir is "cell": the runner says where
    values: Mapping[str, Any]  # varied keys with their values
    keep: str  # checkpoints of the finished run: none or last

    @cached_property
    def key(self) -> str:
        """Hash of everything that can change the numbers; names the run's directory."""
        return config_hash(self.cfg)


def expand(sweep: Sweep) -> list[Cell]:
    """Every cell, seeds innermost. Raises ConfigError, naming the cell, for one that cannot run."""
    spec = sweep.spec
    points = list(_points(sweep))
    if len(points) * len(spec.seeds.values) > _MAX_CELLS:
        raise ConfigError(
            f"{sweep.path}: {len(points)} points x {len(spec.seeds.values)} seeds are more than "
            f"{_MAX_CELLS:,} cells; split the sweep"
        )
    labels = [label for label, _ in points]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{sweep.path}: two cells are named {label!r}; name arms apart")
    varied = list(dict.fromkeys(key for _, keys in points for key in keys))
    varied = [key for key in varied if not any(k.startswith(f"{key}.") for k in varied)]
    cells = []
    for label, keys in points:
        for seed in spec.seeds.values:
            tree = _tree(sweep, label, keys, seed)
            cfg = _config(tree, f"{sweep.path}, cell {label!r}, seed {seed}")
            values = {key: get(tree, key) for key in varied}
            cells.append(Cell(sweep.name, label, seed, cfg, values, spec.keep))
    _check_claims(sweep, set(labels))
    return cells


def _config(tree: Tree, where: str) -> Config:
    try:
        cfg = canonical(parse_config(tree, where=where))
        if cfg.train.stop_step is not None:
            raise ConfigError(
                f"train.stop_step={cfg.train.stop_step} would leave the cell unfinished; take it "
                "out, or set train.steps"
            )
        return cfg
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None


def canonical(cfg: Config) -> Config:
    """`cfg` without settings that cannot act: cells that are the same run get the same hash."""
    if cfg.transition.at is None:
        return sixteen_bit(cfg)
    changes: dict[str, Any] = {}
    if cfg.transition.lr != "rewarm":
        changes["lr_rewarm"] = _DEFAULTS.lr_rewarm
    if cfg.transition.weight_decay != "off_at":
        changes["weight_decay_off_at"] = _DEFAULTS.weight_decay_off_at
    if cfg.transition.ramp.shape == "none":
        changes["ramp"] = RampConfig()
    return cfg.model_copy(update={"transition": cfg.transition.model_copy(update=changes)})


def sixteen_bit(cfg: Config) -> Config:
    """`cfg` without its transition; what acts without one stays."""
    kept = cfg.transition
    alone = TransitionConfig(guard=kept.guard)
    if kept.weight_decay == "off_at":
        alone = alone.model_copy(
            update={
                "weight_decay": kept.weight_decay,
                "weight_decay_off_at": kept.weight_decay_off_at,
            }
        )
    return cfg.model_copy(update={"transition": alone})


def _points(sweep: Sweep) -> Iterator[tuple[str, Keys]]:
    """(label, keys over the base) of every point, in the order of the file."""
    spec = sweep.spec
    arms: list[tuple[str, Keys]] = list(spec.arms.items()) or [("", {})]
    axes = [[(key, value) for value in values] for key, values in spec.grid.items()]
    draws = list(_draws(sweep)) or [("", {})]
    for (arm, arm_keys), chosen, (draw, draw_keys) in itertools.product(
        arms, list(itertools.product(*axes)), draws
    ):
        parts = [arm, *(f"{key.rsplit('.', 1)[-1]}={_shown(value)}" for key, value in chosen), draw]
        yield " ".join(filter(None, parts)) or "all", arm_keys | dict(chosen) | draw_keys


def _draws(sweep: Sweep) -> Iterator[tuple[str, Keys]]:
    wanted = sweep.spec.random
    if wanted is None:
        return
    for number in range(wanted.count):
        # A generator for each value: another key, or a larger count, changes no other value.
        yield (
            f"draw-{number:03d}",
            {
                key: _draw(draw, random.Random(f"{wanted.seed}/{number}/{key}"))
                for key, draw in wanted.keys.items()
            },
        )


def _draw(draw: Draw, source: random.Random) -> Value:
    if draw.uniform is not None:
        return source.uniform(*draw.uniform)
    if draw.log_uniform is not None:
        low, high = map(math.log, draw.log_uniform)
        return math.exp(source.uniform(low, high))
    if draw.integer is not None:
        return source.randint(*draw.integer)
    assert draw.choice is not None
    return source.choice(draw.choice)


def _shown(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tree(sweep: Sweep, label: str, keys: Keys, seed: int) -> Tree:
    """The configuration of one cell, all expressions evaluated."""
    where = f"{sweep.path}, cell {label!r}"
    tree = sweep.tree
    assigned = sweep.spec.set | keys | dict.fromkeys(sweep.spec.seeds.keys, seed)
    for key, value in assigned.items():
        tree = merge(tree, nested(key, value))
    tree = interpolate(merge(tree, {"run": {"dir": "cell"}}), where)
    if get(tree, "engine.num_threads") == 0:  # all cores would be as many as there are workers
        tree = merge(tree, {"engine": {"num_threads": 1}})
    try:
        return Derivation(tree, sweep.tree, seed).whole()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_claims(sweep: Sweep, labels: set[str]) -> None:
    for claim in sweep.spec.claims:
        for label in (*claim.contrast, *claim.best):
            if label not in labels:
                raise ConfigError(
                    f"{sweep.path}: claim {claim.id!r} names the cell {label!r}; there are "
                    f"{', '.join(sorted(labels))}"
                )


def check_names(sweeps: list[Sweep]) -> None:
    """Raises ConfigError if two files of one command have one name: the results would mix."""
    names = [sweep.name for sweep in sweeps]
    for sweep in sweeps:
        if names.count(sweep.name) > 1:
            raise ConfigError(f"two sweeps are named {sweep.name!r}; rename a file")


def sweep_paths(paths: list[Path]) -> list[Path]:
    """The sweep files among `paths`, a directory standing for every *.yaml in it."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not found:
        raise ConfigError(f"{', '.join(map(str, paths))}: no sweep file here")
    return found
