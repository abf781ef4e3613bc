"""What the distributed tests train: a tiny decoder on a small corpus, crossing the transition.

`train` runs it on the ranks through TrainEngine; `reference` is the same run as a plain torch
loop in one process: no DeepSpeed, no ZeRO, no fragments.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitscale.config import Config, num_kv_heads, parse_config
from bitscale.data.batches import Batches, MicroBatch
from bitscale.data.shards import ShardWriter, TokenShard
from bitscale.engine import Fragment, TrainEngine
from bitscale.engine import make_engine as engine_of
from bitscale.engine.optimizers import make_optimizer
from bitscale.mesh import Mesh, share_model
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.decoder import Decoder
from bitscale.model.stages import make_model
from bitscale.optim import learning_rate, weight_decay
from bitscale.quant.schedule import quant_strength
from bitscale.transition import begin_transition

KINDS = ("master", "exp_avg", "exp_avg_sq")
NUM_STEPS = 14
TRANSITION_STEP = 5  # first step of the ramp; its λ is 0
TERNARY_STEP = 9  # first step with λ = 1
SNAPSHOTS = (1, TRANSITION_STEP, NUM_STEPS)
VOCAB_SIZE = 61

# No weight stays gathered between steps: at the default threshold all of a tiny model does.
NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# Norms stay gathered, matrices do not.
SOME_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 100}}


class Whole(NamedTuple):
    """A whole parameter and its optimizer state, flat fp32, put together from all ranks."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor  # 0 if the optimizer has no second moment
    step: int


@dataclass(frozen=True)
class Curve:
    losses: list[float]  # mean over the global batch, one a step
    grad_norms: list[float]
    states: dict[int, dict[str, Whole]]  # after so many steps, see SNAPSHOTS


def tiny_config(stage: int, dtype: str, **changes: dict[str, Any]) -> Config:
    """A run of NUM_STEPS; `changes` override whole keys of sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "model": {
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "d_model": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "d_ff": 48,
        },
        "data": {"corpora": [{"path": "unused"}], "seq_len": 16},
        "train": {
            "steps": NUM_STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "dtype": dtype,
        },
        # Steps 0 to 2 are clipped, the others are not.
        "optim": {"lr": 3e-3, "schedule": "constant", "warmup": {"steps": 0}, "clip": 0.97},
        "transition": {
            "at": {"step": TRANSITION_STEP},
            "ramp": {"shape": "linear", "over": {"steps": TERNARY_STEP - TRANSITION_STEP}},
        },
        "engine": {"zero_stage": stage, "device": "cpu"},
    }
    for section, keys in changes.items():
        tree.setdefault(section, {}).update(keys)
    return parse_config(tree, "test")


def odd_config(stage: int, dtype: str, **changes: dict[str, Any]) -> Config:
    """As tiny_config, with sizes that 2 and 4 ranks do not divide.

    `q_norm` and `k_norm` have 2 elements: fewer than 4 ranks.
    """
    model = {
        "vocab_size": 13,
        "num_layers": 2,
        "d_model": 6,
        "num_heads": 3,
        "num_kv_heads": 1,
        "d_ff": 7,
        "qk_norm": True,
        "bias": True,
        "tie_embeddings": False,
    }
    return tiny_config(stage, dtype, model=model | changes.pop("model", {}), **changes)


def write_corpus(prefix: Path) -> Path:
    """A shard of documents in which some tokens follow others: there is something to learn."""
    generator = np.random.default_rng(0)
    with ShardWriter(prefix, VOCAB_SIZE) as writer:
        for _ in range(40):
            steps = generator.choice([1, 2, 7], size=60, p=[0.6, 0.3, 0.1])
            writer.add_document(np.cumsum(steps) % VOCAB_SIZE)
    return prefix


def make_batches(cfg: Config, corpus: Path, rank: int = 0, world_size: int = 1) -> Batches:
    return Batches(
        [(TokenShard(corpus), 1.0)],
        seq_len=cfg.data.seq_len,
        global_batch_size=cfg.train.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        dp_rank=rank,
        dp_size=world_size,
        seed=cfg.data.seed,
        reset_attention=cfg.data.reset_attention,
    )


def micro_batches(cfg: Config, batches: Batches, step: int) -> list[MicroBatch]:
    """Those of `step`, with ids that fit the model's vocabulary."""
    size = cfg.model.vocab_size or VOCAB_SIZE
    return [
        MicroBatch(b.input_ids_BS % size, b.target_ids_BS % size, b.document_ids_BS)
        for b in batches.micro_batches(step)
    ]


def make_engine(cfg: Config, mesh: Mesh) -> TrainEngine:
    engine = engine_of(cfg, make_model(cfg, mesh), mesh)
    if not gc.get_freeze_count():
        # DeepSpeed collects garbage six times an engine, half a second each with all imported.
        gc.freeze()
    return engine


def train_step(engine: TrainEngine, batches: Batches, step: int, mesh: Mesh) -> tuple[float, float]:
    """One optimizer step; (loss over all ranks, gradient norm)."""
    cfg = engine.cfg
    set_strength(engine.module, quant_strength(step, cfg))
    result = engine.train_step(
        micro_batches(cfg, batches, step),
        lr=learning_rate(step, cfg),
        weight_decay=weight_decay(step, cfg),
    )
    return float(mesh.sum(result.loss)) / mesh.world_size, float(result.grad_norm)


def train(mesh: Mesh, cfg: Config, corpus: Path) -> Curve:
    """The whole run on this world."""
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    curve = Curve([], [], {})
    for step in range(NUM_STEPS):
        if step == TRANSITION_STEP:
            begin_transition(engine, mesh, "keep")
        loss, norm = train_step(engine, batches, step, mesh)
        curve.losses.append(loss)
        curve.grad_norms.append(norm)
        if step + 1 in SNAPSHOTS:
            curve.states[step + 1] = whole_state(engine, mesh)
    return curve


def whole_state(engine: TrainEngine, mesh: Mesh) -> dict[str, Whole]:
    """Every parameter's state from all ranks' fragments (a collective).

    Fails unless the fragments with `saved_here` cover each element exactly once and agree on
    the step count.
    """
    shapes = engine.parameter_shapes()
    mine = [
        (
            f.name,
            _places(f, shapes[f.name]),
            f.master.clone(),
            f.exp_avg.clone(),
            torch.zeros_like(f.master) if f.exp_avg_sq is None else f.exp_avg_sq.clone(),
            int(f.step),
        )
        for f in engine.fragments()
        if f.saved_here
    ]
    pieces = [piece for rank in mesh.gather_objects(mine) for piece in rank]
    return dict(_put_together(shapes, pieces))


def _places(fragment: Fragment, shape: tuple[int, ...]) -> Tensor:
    """Where the fragment's elements lie in the flattened whole parameter."""
    places = torch.arange(torch.Size(shape).numel()).view(shape)
    part = places if fragment.shard is None else fragment.shard.of(places)
    return part.reshape(-1)[fragment.start : fragment.start + fragment.numel]


def _put_together(
    shapes: dict[str, tuple[int, ...]], pieces: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[str, Whole]]:
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        covered = torch.zeros(numel, dtype=torch.int64)
        views = [torch.full((numel,), torch.nan) for _ in KINDS]
        steps = set()
        for piece_name, places, *tensors, step in pieces:
            if piece_name == name:
                covered[places] += 1
                steps.add(step)
                for view, tensor in zip(views, tensors, strict=True):
                    view[places] = tensor
        assert covered.eq(1).all(), f"{name} {shape}: elements are covered {covered.tolist()} times"
        assert len(steps) == 1, f"{name}: step counts {steps}"
        yield name, Whole(views[0], views[1], views[2], steps.pop())


def reference(cfg: Config, corpus: Path, *, regroup: bool = False, fault: str = "") -> Curve:
    """The same run in plain torch, one thread: fp32 masters and AdamW, weights in train.dtype.

    Args:
        regroup: add gradients where branches meet in ZeRO-3's order. Its hooks put an autograd
            node at every module's input, so that what several paths inside a module contribute
            is added up first; fp32 sums of three terms then end in other last bits.
        fault: "" or one of FAULTS, an error to be found by whoever compares with the result.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _reference(cfg, corpus, regroup, fault)
    finally:
        torch.set_num_threads(num_threads)


# The first two are what DeepSpeed 0.19.8 does by default (docs/results/zero-equivalence.md).
FAULTS = ("bf16 gradients", "idle first step", "lost micro-batch", "decayed norms")


def _reference(cfg: Config, corpus: Path, regroup: bool, fault: str) -> Curve:
    model = Decoder(cfg.model, cfg.quant, seed=cfg.train.seed).train()
    model.to(torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32)
    if regroup:
        for module in model.modules():
            module.register_forward_pre_hook(_with_node)
    weights = dict(model.named_parameters())
    masters = {name: weight.detach().float().clone() for name, weight in weights.items()}
    adam = _adam(cfg, masters, fault)
    batches = make_batches(cfg, corpus)
    curve = Curve([], [], {})
    for step in range(NUM_STEPS):
        if step == TRANSITION_STEP:
            _start_scales(model, masters)
        set_strength(model, quant_strength(step, cfg))
        loss = _accumulate(model, masters, micro_batches(cfg, batches, step), fault)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), cfg.optim.clip or math.inf)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, cfg)
            group["weight_decay"] = weight_decay(step, cfg) if group["decayed"] else 0.0
        adam.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
        curve.losses.append(loss)
        curve.grad_norms.append(float(norm))
        if step + 1 in SNAPSHOTS:
            curve.states[step + 1] = {n: _whole(master, adam) for n, master in masters.items()}
    return curve


@torch.no_grad()
def _start_scales(model: Decoder, masters: dict[str, Tensor]) -> None:
    for name, layer in bit_linears(model):
        if layer.alpha is not None:
            layer.alpha.copy_(layer.weight.abs().amax(1))
            masters[f"{name}.alpha"].copy_(layer.alpha)


def _adam(cfg: Config, masters: dict[str, Tensor], fault: str) -> torch.optim.Optimizer:
    groups = [
        {"params": [m for m in masters.values() if m.ndim >= 2], "decayed": True},
        {
            "params": [m for m in masters.values() if m.ndim < 2],
            "decayed": fault == "decayed norms",
        },
    ]
    adam = make_optimizer(cfg.optim, groups, fused=False)
    if fault == "idle first step":
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        adam.step()
    return adam


def _accumulate(
    model: Decoder, masters: dict[str, Tensor], micro_batches: list[MicroBatch], fault: str
) -> float:
    """Put the mean gradient, summed in fp32, into the masters; the mean loss."""
    total = 0.0
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    for index, (input_ids_BS, target_ids_BS, document_ids_BS) in enumerate(micro_batches):
        model.zero_grad()
        loss = model(input_ids_BS, target_ids_BS, document_ids_BS) / len(micro_batches)
        loss.backward()
        total += float(loss.detach())
        if fault == "lost micro-batch" and index == len(micro_batches) - 1:
            break
        for name, weight in model.named_parameters():
            sum_so_far = masters[name].grad
            assert weight.grad is not None and sum_so_far is not None
            grad = weight.grad.bfloat16() if fault == "bf16 gradients" else weight.grad
            sum_so_far += grad.float()
    return total


def _with_node(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating inputs behind an autograd node that does nothing."""
    return tuple(
        a.view_as(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def _whole(master: Tensor, adam: torch.optim.Optimizer) -> Whole:
    state = adam.state[master]
    first = state["exp_avg"].flatten().clone()
    second = state["exp_avg_sq"].flatten().clone() if "exp_avg_sq" in state else None
    moments = (first, torch.zeros_like(first) if second is None else second)
    return Whole(master.detach().flatten().clone(), *moments, int(state["step"]))
