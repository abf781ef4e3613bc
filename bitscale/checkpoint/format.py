"""What is in a checkpoint: `meta.json`, and the keys of the tensors in its state files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitscale.engine.fragments import MOMENTS, Fragment
from bitscale.errors import CheckpointError

FORMAT = "bitscale-checkpoint-1"
KINDS = ("master", *MOMENTS)
ANY = "any"  # in Meta.identity: what a run that starts from this checkpoint may choose


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    step: int  # optimizer steps completed
    tokens: int  # tokens consumed
    lambda_weight: float
    lambda_activation: float
    config: dict[str, Any]  # resolved configuration, as in config.yaml
    config_hash: str
    identity: dict[str, str]  # what a resumed run must share, see run.identity
    shapes: dict[str, list[int]]  # logical shape of every parameter
    world_size: int
    versions: dict[str, str]
    adam_steps: dict[str, int] = field(default_factory=dict)  # Adam's own count, by parameter
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {bytes, sha256}
    format: str = FORMAT


def read_meta(path: Path) -> Meta:
    """Parse `path/meta.json`."""
    file = path / "meta.json"
    try:
        tree = json.loads(file.read_text())
        if tree.get("format") != FORMAT:
            raise CheckpointError(
                f"{file}: format {tree.get('format')!r}, this version reads {FORMAT!r}"
            )
        return Meta(**tree)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing; the checkpoint is incomplete: use another checkpoint"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); use another checkpoint") from error


def views(fragment: Fragment) -> tuple[Tensor, Tensor, Tensor]:
    return fragment.master, fragment.exp_avg, fragment.exp_avg_sq


def key_of(fragment: Fragment, kind: str) -> str:
    """`layers.0.attn.q.weight|exp_avg|4096`: parameter, kind, first flat element; and for a
    tensor-parallel part `|0:128:256`: of rows (0) or columns (1) 128 to 255, counted within it."""
    key, shard = f"{fragment.name}|{kind}|{fragment.start}", fragment.shard
    return key if shard is None else f"{key}|{shard.dim}:{shard.start}:{shard.end}"
