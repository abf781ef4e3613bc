"""A foreign checkpoint as one of ours, with masters, moments and step counts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from torch import Tensor

from bitscale.checkpoint.source import StateSource
from bitscale.config import Config, config_hash, to_tree
from bitscale.convert.to_checkpoint import write_state
from bitscale.engine.fragments import MOMENTS


def import_state(
    source: StateSource,
    cfg: Config,
    out: Path,
    identity: Mapping[str, str],
    versions: Mapping[str, str],
) -> None:
    """Write `source` as a checkpoint of the run `cfg` to the new directory `out`.

    One parameter is in memory at a time. `identity` is that of `cfg`, compared with the source's
    before. Raises CheckpointError if `out` exists, or the source is damaged.
    """
    meta = replace(
        source.meta,
        config=to_tree(cfg),
        config_hash=config_hash(cfg),
        identity=dict(identity),
        world_size=1,
        versions=dict(versions),
        files={},
    )
    write_state(out, meta, _values(source))


def _values(source: StateSource) -> Iterator[tuple[str, str, Tensor]]:
    for name, shape in source.meta.shapes.items():
        for kind in ("master", *MOMENTS):
            yield name, kind, source.read(name, kind, 0, prod(shape))
