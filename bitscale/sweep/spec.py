"""A sweep file: what is varied, over which seeds, and what is claimed beforehand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitscale.config import explain, merge, override, read_tree, read_yaml
from bitscale.errors import ConfigError

Scalar = bool | int | float | str | None
Value = Scalar | list[Any] | dict[str, Any]  # an expression is a text that begins with "="
Keys = dict[str, Value]  # dotted configuration key -> value
Direction = Literal["negative", "positive", "zero", "at_most"]  # at_most: not above the margin


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Seeds(_Section):
    """Cells with the same seed are paired: every key in `keys` gets it."""

    values: tuple[int, ...] = (0,)
    keys: tuple[str, ...] = ("train.seed", "data.seed")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not self.values or len(set(self.values)) < len(self.values):
            raise ValueError("values: give one seed or more, each once")
        return self


class Draw(_Section):
    """One random key: exactly one of the four."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None  # both ends included
    choice: list[Value] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.uniform, self.log_uniform, self.integer, self.choice)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of uniform, log_uniform, integer, choice")
        if self.log_uniform is not None and min(self.log_uniform) <= 0:
            raise ValueError("log_uniform needs two numbers above 0")
        if self.choice is not None and not self.choice:
            raise ValueError("choice has no values")
        ends = self.uniform or self.log_uniform or self.integer
        if ends is not None and ends[0] > ends[1]:
            raise ValueError(f"{list(ends)}: the smaller number comes first")
        return self


class Random(_Section):
    """`count` points, drawn key by key, always the same ones for a `seed`."""

    count: Annotated[int, Field(gt=0)]
    seed: int = 0
    keys: Annotated[dict[str, Draw], Field(min_length=1)]


class Claim(_Section):
    """One statement, its prediction, and the figure that decides it (docs/sweeps.md).

    The figure of a seed is the sum of weight · measure over the cells of `contrast`, or, with
    `best`, the value of the key `of` in the cell whose measure is lowest.
    """

    id: str
    text: str  # the claim, one sentence
    source: str  # the paper or the note it is from
    measure: str = "valid_loss"  # a column of RESULTS
    contrast: dict[str, float] = {}  # label of a cell -> weight
    best: tuple[str, ...] = ()  # labels of the cells to choose among
    of: str = ""  # best: the key (a column of RESULTS) whose value is the figure
    predicted: Direction | tuple[float, float]  # sign of the contrast, or range of the best point
    margin: float = 0.0  # nats (or the unit of `measure`) that would matter

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.contrast) == bool(self.best):
            raise ValueError("give exactly one of contrast, best")
        if self.best and (not self.of or isinstance(self.predicted, str)):
            raise ValueError("best needs `of: KEY` and a range, predicted: [LOW, HIGH]")
        if self.contrast and not isinstance(self.predicted, str):
            raise ValueError("a contrast needs predicted: negative, positive, zero or at_most")
        if self.predicted in ("zero", "at_most") and self.margin <= 0:
            raise ValueError(f"predicted: {self.predicted} needs a margin above 0")
        return self


class SweepSpec(_Section):
    """The file. Cells are the product of arms, grid, random points and seeds."""

    title: str = ""
    base: str | tuple[str, ...]  # run configurations, relative to the file
    set: Keys = {}  # for all cells, over the base
    arms: dict[str, Keys] = {}  # named points
    grid: dict[str, list[Value]] = {}
    random: Random | None = None
    seeds: Seeds = Seeds()
    keep: Literal["none", "last"] = "none"  # checkpoints of a finished cell
    claims: tuple[Claim, ...] = ()

    @field_validator("grid")
    @classmethod
    def _not_empty(cls, grid: dict[str, list[Value]]) -> dict[str, list[Value]]:
        for key, values in grid.items():
            if not values:
                raise ValueError(f"{key} has no values")
        return grid


class Sweep(BaseModel):
    """A sweep file that was read, and the tree of its base configuration."""

    model_config = ConfigDict(frozen=True)

    name: str  # the file's name without .yaml
    path: Path
    spec: SweepSpec
    tree: dict[str, Any]  # of the base, with the command line's overrides


def read_seeds(text: str) -> tuple[int, ...]:
    """`5-9,12` -> (5, 6, 7, 8, 9, 12). Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdecimal() for end in ends):
            raise ConfigError(f"--seeds {text!r} is not of the form 0-4 or 0,1,2")
        found = range(int(ends[0]), int(ends[-1]) + 1)
        if not found or set(found) & set(seeds):
            raise ConfigError(f"--seeds {text!r}: the smaller number comes first, each seed once")
        seeds += found
    return tuple(seeds)


def read_sweep(
    path: Path,
    overrides: Sequence[str] = (),
    over: Path | None = None,
    seeds: Sequence[int] = (),
) -> Sweep:
    """Read `path` and its base; the file `over` and then `overrides` (KEY=VALUE) go over the base.

    `seeds` take the place of the file's. Raises ConfigError, naming file and key.
    """
    content = read_yaml(path)
    try:
        # As JSON: lists become tuples, but nothing else is converted.
        spec = SweepSpec.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, SweepSpec)}") from error
    if seeds:
        values = spec.seeds.model_copy(update={"values": tuple(seeds)})
        spec = spec.model_copy(update={"seeds": values})
    names = [spec.base] if isinstance(spec.base, str) else spec.base
    tree: dict[str, Any] = {}
    for name in names:
        tree = merge(tree, read_tree(path.parent / name))
    if over is not None:
        tree = merge(tree, read_tree(over))
    return Sweep(name=path.stem, path=path, spec=spec, tree=override(tree, overrides))
