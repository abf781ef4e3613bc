"""`bitscale plan` against pipelines: bytes that live and bytes that are sent, on every stage."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from test_plan_bytes import CountPayload, live_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitscale.config import Checkpointing, Config, num_kv_heads
from bitscale.mesh import Mesh, share_model
from bitscale.model.bitlinear import set_strength
from bitscale.plan.gpus import find_gpu
from bitscale.plan.layout import Cluster, make_layout
from bitscale.plan.memory import memory
from bitscale.plan.wire import traffic
from bitscale.quant.schedule import TERNARY
from tiny_runs import make_batches, make_engine, micro_batches, tiny_config
from world import World

pytestmark = pytest.mark.dist

TOLERANCE = 0.1
BUCKET = 1000  # elements of a reduction


class Case(NamedTuple):
    world_size: int
    pp: int
    dtype: str
    tied: bool
    checkpointing: Checkpointing


class Measured(NamedTuple):
    """On one rank."""

    stage: int
    parts: dict[str, int]  # bytes before the update
    peak: int  # bytes
    payload: Counter[str]


CASES = {
    "pp2, tied": Case(2, 2, "bf16", True, "none"),
    "pp2, untied, selective": Case(2, 2, "bf16", False, "selective"),
    "pp2, dp2": Case(4, 2, "fp32", True, "none"),
    "pp4, full": Case(4, 4, "bf16", True, "full"),
}


class PeakBytes(TorchDispatchMode):
    """Most bytes of storages that were alive at once: those counted, and what operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)


def config(case: Case) -> Config:
    return tiny_config(
        1,
        case.dtype,
        model={
            "vocab_size": 192, "num_layers": 6, "d_model": 64, "num_heads": 4, "d_ff": 160,
            "tie_embeddings": case.tied,
        },
        data={"seq_len": 32},
        train={
            "global_batch_size": 64, "micro_batch_size": 8,
            "activation_checkpointing": case.checkpointing,
        },
        parallel={"pp": case.pp},
        engine={"deepspeed": {"zero_optimization": {"reduce_bucket_size": BUCKET}}},
        quant={"kernel": "reference"},
    )  # fmt: skip


def measure(mesh: Mesh, cfg: Config, corpus: Any) -> Measured:
    gc.freeze()  # only what comes now is walked
    mesh = share_model(mesh, 1, num_kv_heads(cfg), cfg.parallel.pp)
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    set_strength(engine.module, TERNARY)
    engine.train_step(micro_batches(cfg, batches, 0), lr=1e-3, weight_decay=0.0)
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    peak = PeakBytes()
    for tensor in tensors:
        peak.count(tensor.untyped_storage())
    del tensors, tensor
    parts: dict[str, int] = {}
    pipeline = engine._engine
    update = pipeline._exec_optimizer_step

    def look_and_update(*args: Any, **kwargs: Any) -> None:
        parts.update(live_bytes(engine))
        update(*args, **kwargs)

    instructions = dict(pipeline._INSTRUCTION_MAP)
    (name,) = [kind for kind in instructions if kind.__name__ == "OptimizerStep"]
    instructions[name] = lambda _, *args, **kwargs: look_and_update(*args, **kwargs)
    pipeline._INSTRUCTION_MAP = instructions
    with CountPayload("allreduce", "allgather", "send", "broadcast") as counted, peak:
        engine.train_step(micro_batches(cfg, batches, 1), lr=1e-3, weight_decay=0.0)
    return Measured(mesh.pp_rank, parts, peak.peak, counted.payload)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "pp4, full" else n for n in CASES]
)
def test_bytes_of_pipeline_stages(
    name: str, world_of: Callable[[int], World], corpus_prefix: Any
) -> None:
    case = CASES[name]
    cfg = config(case)
    layout = make_layout(cfg, Cluster(1, case.world_size, find_gpu("cpu")))
    ranks: list[Measured] = world_of(case.world_size).run(
        measure, cfg, corpus_prefix, seconds=300
    )
    for seen in ranks:
        stage = layout.stages[seen.stage]
        held = memory(layout, stage, "ternary")
        planned: Counter[str] = Counter()
        for t in traffic(layout, stage, "ternary"):
            planned[t.collective] += round(t.payload)
        assert held.peak == pytest.approx(seen.peak, rel=TOLERANCE)
        for part in ("weights", "gradients", "optimizer", "codes and copies"):
            if part in seen.parts:  # fp32 gradients have become the sums by then
                assert held.parts[part] == pytest.approx(seen.parts[part], rel=0.01), part
        # The updated tied weight is broadcast to the one other end.
        sent = {"allreduce": "all-reduce", "allgather": "gather", "send": "send"}
        assert seen.payload.keys() <= {*sent, "broadcast"}
        seen.payload["send"] += seen.payload["broadcast"] if stage.has_embedding else 0
        for key, kind in sent.items():
            assert planned[kind] == pytest.approx(seen.payload[key], rel=0.01), kind
