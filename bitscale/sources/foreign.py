"""A checkpoint of another program, seen as ours: one `StateSource` for all formats.

A format's reader gives `Tensors` under its own names; `names.py` says where in them our parameters
are. One parameter at a time is in memory, or none where the file is mapped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitscale.checkpoint import Meta
from bitscale.checkpoint.source import StateSource
from bitscale.config import Config, tokens_per_step
from bitscale.convert.model_source import parameter_shapes
from bitscale.errors import CheckpointError
from bitscale.model.collectives import ParameterShard
from bitscale.sources.names import Place, find_places, tied_copies

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """The state in a foreign checkpoint, under its own names."""

    path: Path
    format: str  # as a user calls it
    shapes: Mapping[str, Shape]
    # (name, kind) -> tensor of that shape; kind is "master", "exp_avg" or "exp_avg_sq".
    read: Callable[[str, str], Tensor]
    step: int  # optimizer steps done
    # Adam's own count, by name; empty: the checkpoint has no optimizer state.
    adam_steps: Mapping[str, int]
    # What it says of the run, by the keys of run.identity.
    stated: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1
    # The keys of `model` and `quant`, where it describes its model; else empty.
    model: Mapping[str, Any] = field(default_factory=dict)
    quant: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["bf16", "fp32"] = "bf16"  # in which it was computed


class ForeignSource(StateSource):
    """`Tensors` by our names. Without optimizer state the moments are 0 and so are the counts."""

    def __init__(self, tensors: Tensors, cfg: Config) -> None:
        self.path, self.tensors = tensors.path, tensors
        shapes = parameter_shapes(cfg.model, cfg.quant)
        self._places = find_places(shapes, tensors.shapes, cfg.model, tensors.path)
        self._last: tuple[tuple[str, str], Tensor] | None = None
        for copy, original in tied_copies(tensors.shapes) if cfg.model.tie_embeddings else ():
            self._check_tied(copy, original)
        self.meta = Meta(
            step=tensors.step,
            tokens=tensors.step * tokens_per_step(cfg),
            lambda_weight=0.0,
            lambda_activation=0.0,
            config={},
            config_hash="",
            identity=dict(tensors.stated),
            shapes={name: list(shapes[name]) for name in self._places},
            world_size=tensors.world_size,
            versions=dict(tensors.versions),
            adam_steps={
                name: tensors.adam_steps.get(place.tensor, 0)
                for name, place in self._places.items()
            },
        )

    @property
    def has_optimizer_state(self) -> bool:
        return bool(self.tensors.adam_steps)

    def read(
        self, name: str, kind: str, start: int, numel: int, shard: ParameterShard | None = None
    ) -> Tensor:
        if kind != "master" and not self.has_optimizer_state:
            return torch.zeros(numel)
        if self._last is None or self._last[0] != (name, kind):
            self._last = ((name, kind), self._whole(self._places[name], kind))
        whole = self._last[1]
        flat = (whole if shard is None else shard.of(whole)).reshape(-1)
        return flat[start : start + numel].float()

    def rng_state(self, rank: int) -> Tensor | None:
        return None  # of another program's draws

    def _whole(self, place: Place, kind: str) -> Tensor:
        tensor = self.tensors.read(place.tensor, kind)
        found, wanted = tuple(tensor.shape), self.tensors.shapes[place.tensor]
        if found != wanted:
            raise CheckpointError(
                f"{self.path}: {place.tensor} ({kind}) has shape {list(found)} instead of "
                f"{list(wanted)}; damaged: use another checkpoint"
            )
        return place.take(tensor)

    def _check_tied(self, copy: str, original: str) -> None:
        read = self.tensors.read
        if not torch.equal(read(copy, "master"), read(original, "master")):
            raise CheckpointError(
                f"{self.path}: {copy} differs from {original}, but model.tie_embeddings=true "
                "makes them one; set model.tie_embeddings=false"
            )
