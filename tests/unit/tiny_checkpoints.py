"""Checkpoints of two small parameters, for tests."""

from pathlib import Path

import torch

from bitscale import checkpoint
from bitscale.checkpoint import Meta
from bitscale.engine.fragments import Fragment
from bitscale.mesh import single_process_mesh

SHAPES = {"w": [3, 5], "b": [7]}
STATE_FILE = "state-00000-of-00001.safetensors"


def meta_at(step: int) -> Meta:
    return Meta(
        step=step,
        tokens=step * 1000,
        lambda_weight=0.5,
        lambda_activation=0.25,
        config={"optim": {"lr": 3e-4}},
        config_hash="abc",
        identity={"data.seed": "0"},
        shapes=SHAPES,
        world_size=1,
        versions={"torch": "2"},
    )


def make_fragments(seed: int = 0) -> list[Fragment]:
    """`w` in two pieces as ZeRO would cut it, `b` whole, and a replica that others save."""
    torch.manual_seed(seed)
    return [
        fragment("w", 0, torch.randn(3, 4), 11),
        fragment("w", 4, torch.randn(3, 11), 11),
        fragment("b", 0, torch.randn(3, 7), 12),
        fragment("b", 0, torch.randn(3, 7), 12, saved_here=False),
    ]


def fragment(
    name: str, start: int, rows: torch.Tensor, step: int = 0, saved_here: bool = True
) -> Fragment:
    """`rows` [3, numel] are the master and the two moments."""
    master, exp_avg, exp_avg_sq = rows
    return Fragment(name, start, master, exp_avg, exp_avg_sq, torch.tensor(float(step)), saved_here)


def save(root: Path, step: int = 1, seed: int = 0) -> Path:
    rng_state = torch.Generator().manual_seed(step).get_state()
    mesh = single_process_mesh("cpu")
    return checkpoint.save(root, meta_at(step), make_fragments(seed), mesh, rng_state=rng_state)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]
