"""`bitscale plan` against tensor-parallel decoders: bytes that are sent, bytes that are saved."""

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from test_plan_bytes import CountPayload
from torch import Tensor

from bitscale.config import Checkpointing, Config, parse_config
from bitscale.mesh import Mesh, share_model
from bitscale.model import cost
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.model.decoder import Decoder
from bitscale.model.layers import ranks_of
from bitscale.plan.gpus import find_gpu
from bitscale.plan.layout import Cluster, make_layout
from bitscale.plan.wire import traffic
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY
from world import World

pytestmark = pytest.mark.dist

NUM_TOKENS = 256

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "sub-norm, untied": {"sub_norm": True, "mlp": "relu2_glu", "tie_embeddings": False},
    "one key/value head": {"num_kv_heads": 1},
}


def config(tp: int, variant: str, sequence_parallel: bool, checkpointing: Checkpointing) -> Config:
    model = {
        "vocab_size": 192, "num_layers": 3, "d_model": 128, "num_heads": 8, "num_kv_heads": 4,
        "d_ff": 256,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": model | VARIANTS[variant],
        "data": {"corpora": [{"path": "unused"}], "seq_len": 32},
        "train": {
            "steps": 1, "global_batch_size": 8, "micro_batch_size": 8, "dtype": "bf16",
            "activation_checkpointing": checkpointing,
        },
        "optim": {"lr": 1e-3},
        "parallel": {"tp": tp, "sequence_parallel": sequence_parallel},
    }  # fmt: skip
    return parse_config(tree, "test")


def measure(mesh: Mesh, cfg: Config, ternary: bool) -> tuple[Counter[str], int]:
    """(payload of a forward and backward pass by collective, bytes saved for the latter)."""
    m = cfg.model
    mesh = share_model(mesh, cfg.parallel.tp, m.num_kv_heads or m.num_heads)
    model = Decoder(
        m,
        cfg.quant,
        activation_checkpointing=cfg.train.activation_checkpointing,
        ranks=ranks_of(mesh, sequence_parallel=cfg.parallel.sequence_parallel),
    )
    model = model.bfloat16().train()
    set_strength(model, TERNARY if ternary else SIXTEEN_BIT)
    ids = torch.arange(NUM_TOKENS).view(-1, 32) % 192
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with CountPayload(ignored=0) as counted:
        prepare_weights(model)
        known |= {
            p.codes.codes_FD.untyped_storage().data_ptr()
            for _, layer in bit_linears(model)
            if (p := layer.prepared) is not None and p.codes is not None
        }
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, ids)
        loss.backward()
    return counted.payload, sum(storage.nbytes() for storage in kept.values())


# Biases, query and key norms are not reckoned with: their gradients are small.
@pytest.mark.parametrize("checkpointing", get_args(Checkpointing))
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_of_tensor_parallel_ranks(
    variant: str,
    sequence_parallel: bool,
    checkpointing: Checkpointing,
    world_of: Callable[[int], World],
) -> None:
    cfg = config(2, variant, sequence_parallel, checkpointing)
    layout = make_layout(cfg, Cluster(1, 2, find_gpu("cpu")))
    names = {"all-reduce": "allreduce", "gather": "allgather", "reduce-scatter": "reduce_scatter"}
    for phase in ("16 bit", "ternary"):
        sent, kept = world_of(2).run(measure, cfg, phase == "ternary")[0]
        payload: Counter[str] = Counter()
        for t in traffic(layout, layout.stages[0], phase):  # type: ignore[arg-type]
            payload[names[t.collective]] += round(t.payload)
        at, m = layout.setting(phase), cfg.model  # type: ignore[arg-type]
        per_token = cost.embedding_saved_bytes() + sum(cost.head_saved_bytes(m, at).values())
        per_token += m.num_layers * sum(cost.block_saved_bytes(m, at).values())
        tables = 2 * 4 * 32 * m.d_model // m.num_heads
        others = tables + cost.loss_saved_bytes(m, at, NUM_TOKENS)
        assert set(payload) == set(sent), phase
        for name, size in sent.items():
            assert payload[name] == pytest.approx(size, rel=1e-3), (phase, name)
        assert NUM_TOKENS * per_token + others == pytest.approx(kept, rel=0.01), phase
