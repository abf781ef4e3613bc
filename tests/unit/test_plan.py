"""`bitscale plan`: against a counted peak, published figures, hand calculation."""

import itertools
import json
import statistics
import weakref
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitscale.config import Checkpointing, Config, check_world_size
from bitscale.config.checks import check
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.model.bitlinear import prepare_weights, set_strength
from bitscale.model.cost import Phase
from bitscale.model.decoder import Decoder
from bitscale.plan import DEFAULT_EFFICIENCY, Cluster, find_gpu, make_plan, search, to_tree
from bitscale.plan.layout import GIB, Layout, make_layout
from bitscale.plan.memory import checkpoint_bytes, memory
from bitscale.plan.speed import bound, phase_steps, run_days, step_flops
from bitscale.plan.wire import Traffic, traffic
from bitscale.plan.zero3 import Use, gathered
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY

pytestmark = pytest.mark.unit


# --- Against a counted peak ---


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors that were alive at once; weights count once they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)


@pytest.mark.parametrize(
    ("ckpt", "vocab_size", "batch_size"),
    [*((ckpt, 512, 8) for ckpt in get_args(Checkpointing)), ("full", 8192, 32), ("none", 8192, 32)],
)
@pytest.mark.parametrize("phase", ["16 bit", "ternary"])
def test_peak_is_that_of_a_forward_and_backward_pass(
    phase: Phase,
    ckpt: Checkpointing,
    vocab_size: int,
    batch_size: int,
    make_config: Callable[..., Config],
) -> None:
    """Also of a loss in slices of its 2,048 tokens."""
    sizes = {"vocab_size": vocab_size, "num_layers": 6, "d_model": 128, "d_ff": 384}
    cfg = make_config(
        *(f"model.{key}={value}" for key, value in sizes.items()),
        "data.seq_len=64",
        f"train.micro_batch_size={batch_size}",
        f"train.global_batch_size={batch_size}",
        f"train.activation_checkpointing={ckpt}",
        "quant.kernel=reference",
        "train.dtype=bf16",
    )
    layout = make_layout(cfg, Cluster(1, 1, find_gpu("cpu")))
    model = Decoder(cfg.model, cfg.quant, activation_checkpointing=ckpt).bfloat16().train()
    set_strength(model, SIXTEEN_BIT if phase == "16 bit" else TERNARY)
    ids = torch.randint(512, (batch_size, 64))
    with torch.no_grad():
        model(ids, ids)
    with PeakBytes() as counted:
        prepare_weights(model)
        model(ids, ids).backward()
    held = memory(layout, layout.stages[0], phase)
    # Without the engine: neither sums, masters, moments nor reductions.
    engine = ("fp32 accumulation", "optimizer", "communication buffers")
    without = sum(held.parts[part] for part in engine)
    moments = {k: v - without for k, v in held.moments.items() if "reduction" not in k}
    assert max(moments.values()) == pytest.approx(counted.peak, rel=0.1)


# --- Against published figures ---

# Megatron-LM's repository, by commit: what its own documents and scripts say.
# 50a4b5fa, images/cases_april2021.png, and d98e8a64, examples/academic_paper_scripts/sc21/
# run_table_1.sh (both of arXiv:2104.04473, table 1). 2,048 tokens, a vocabulary of 51,200, full
# recomputation. (billions of parameters, (heads, width, layers, tp, pp, GPUs, batch), micro-batch,
# TFLOP/s of an A100 of 80 GB).
SC21 = [
    (1.7, (24, 2304, 24, 1, 1, 32, 512), 16, 137),
    (3.6, (32, 3072, 30, 2, 1, 64, 512), 16, 138),
    (7.5, (32, 4096, 36, 4, 1, 128, 512), 16, 142),
    (18.4, (48, 6144, 40, 8, 1, 256, 1024), 8, 135),
    (39.1, (64, 8192, 48, 8, 2, 512, 1536), 4, 138),
    (76.1, (80, 10240, 60, 8, 4, 1024, 1792), 2, 140),
    (145.6, (96, 12288, 80, 8, 8, 1536, 2304), 2, 148),
    (310.1, (128, 16384, 96, 8, 16, 1920, 2160), 1, 155),
    (529.6, (128, 20480, 105, 8, 35, 2520, 2520), 1, 163),
    (1008.0, (160, 25600, 128, 8, 64, 3072, 3072), 1, 163),
]
# d98e8a64, README.md and images/model_table.png: 4,096 tokens, a vocabulary of 131,072, H100;
# micro-batches are not published: one sequence. TFLOP/s are those of the model.
H100 = [
    (1.7, (16, 2048, 24, 1, 1, 48, 192), 408.8),
    (7.1, (32, 4096, 30, 2, 1, 96, 192), 465.9),
    (16, (48, 6144, 32, 4, 1, 192, 192), 489.1),
    (32, (56, 7168, 48, 8, 1, 384, 192), 459.6),
    (70, (64, 8192, 84, 8, 2, 768, 384), 419.7),
    (119, (80, 10240, 92, 8, 4, 1536, 768), 420.5),
    (177, (96, 12288, 96, 8, 6, 2304, 1152), 432.8),
    (314, (128, 16384, 96, 8, 8, 3072, 1536), 474.4),
    (462, (144, 18432, 112, 8, 16, 6144, 3072), 459.9),
]


def gpt(
    shape: tuple[int, ...], make_config: Callable[..., Config], *overrides: str, gpu: str
) -> Layout:
    """Megatron-LM's GPT, its GELU replaced by a squared ReLU."""
    heads, width, layers, tp, pp, gpus, batch_size = shape
    cfg = make_config(
        f"model={{vocab_size: 51200, num_layers: {layers}, d_model: {width}, num_heads: {heads}, "
        f"num_kv_heads: {heads}, d_ff: {4 * width}, mlp: relu2, norm: layernorm, bias: true}}",
        "data.seq_len=2048",
        f"train={{steps: 100, global_batch_size: {batch_size}, micro_batch_size: 1, dtype: bf16}}",
        f"parallel={{tp: {tp}, pp: {pp}}}",
        *overrides,
    )
    return make_layout(cfg, Cluster(gpus // 8, 8, find_gpu(gpu)))


def sc21(shape: tuple[int, ...], size: int, make_config: Callable[..., Config]) -> Layout:
    recompute = (f"train.micro_batch_size={size}", "train.activation_checkpointing=full")
    return gpt(shape, make_config, *recompute, gpu="a100-80")


def h100(shape: tuple[int, ...], make_config: Callable[..., Config]) -> Layout:
    longer = ("data.seq_len=4096", "model.vocab_size=131072", "model.tie_embeddings=false")
    split = f"parallel.sequence_parallel={str(shape[3] > 1).lower()}"
    return gpt(shape, make_config, *longer, split, gpu="h100")


def test_parameters_are_the_published_ones(make_config: Callable[..., Config]) -> None:
    for billions, shape, size, _ in SC21:
        # The table rounds to 0.1; position embeddings, which rotary ones replace, are below 0.3%.
        total = cost.parameters(sc21(shape, size, make_config).cfg.model).total / 1e9
        assert total == pytest.approx(billions, rel=0.003, abs=0.055)
    for billions, shape, _ in H100:
        total = cost.parameters(h100(shape, make_config).cfg.model).total / 1e9
        assert total == pytest.approx(billions, rel=0.02, abs=0.055)


def test_published_runs_reach_the_default_share_of_the_bound(
    make_config: Callable[..., Config],
) -> None:
    """No run is faster than its bound; the default efficiency is the median of them all."""
    shares = []
    for _, shape, size, tflops in SC21:
        layout = sc21(shape, size, make_config)
        _, width, layers, *_, gpus, batch_size = shape
        # Their equation 3.
        terms = 1 + 2048 / (6 * width) + 51200 / (16 * layers * width)
        flops = 96 * batch_size * 2048 * layers * width**2 * terms
        shares.append(bound(layout, "16 bit").step_seconds / (flops / (gpus * tflops * 1e12)))
    for _, shape, tflops in H100:
        layout = h100(shape, make_config)
        seconds = dict(bound(layout, "16 bit").seconds)
        # Megatron-LM scatters the sums of gradients, which DeepSpeed's stage 1 sends to all.
        reduced = sent(layout, "16 bit")["gradients"]
        rate = 1e9 * layout.link_gb_per_second(reduced.num_ranks, reduced.stride)
        seconds["wire"] -= reduced.sent / 2 / rate
        flops = step_flops(layout, "16 bit").model * shape[-1] * 4096
        shares.append(max(seconds.values()) / (flops / (shape[-2] * tflops * 1e12)))
    assert all(0.35 < share < 0.75 for share in shares), shares
    assert statistics.median(shares) == pytest.approx(DEFAULT_EFFICIENCY, abs=0.03)


def test_seconds_are_the_published_ones(make_config: Callable[..., Config]) -> None:
    """GPT-3 on 1,024 A100s at 138 TFLOP/s with recomputation: around 32 s a step (Megatron-LM
    2e90a342, README.md). Their 8 P T FLOPs are our 6 P T of the model and a quarter."""
    layout = gpt((96, 12288, 96, 8, 16, 1024, 1536), make_config, gpu="a100-80")
    mfu = 138 / 312 * 6 / 8
    days = run_days(layout, {"16 bit": mfu, "ternary": mfu})
    assert days * 86400 / 100 == pytest.approx(32, rel=0.05)


def test_activation_memory_against_the_published_formula(
    make_config: Callable[..., Config],
) -> None:
    """34 s b h a layer without scores (arXiv:2205.05198, table 2, at t = 1). Ours in 16 bit: 2 less
    for no dropout masks, 8 more for norms in fp32."""
    layout = gpt((96, 12288, 96, 1, 8, 64, 64), make_config, gpu="a100-80")
    for phase, expected in (("16 bit", 34 - 2 + 8), ("ternary", 35)):
        at = layout.setting(phase)  # type: ignore[arg-type]
        per_token = sum(cost.block_saved_bytes(layout.cfg.model, at).values())
        assert per_token / 12288 == pytest.approx(expected, rel=0.01)
    # With an RMSNorm, whose codes come in the same pass: a fifth less than Megatron's.
    rms = layout.cfg.model.model_copy(update={"norm": "rmsnorm"})
    per_token = sum(cost.block_saved_bytes(rms, layout.setting("ternary")).values())
    assert per_token / 12288 == pytest.approx(27, rel=0.01)


# --- Layouts, by hand ---


PLANNED = ("model.vocab_size=96", "train.dtype=bf16")


def planned(
    make_config: Callable[..., Config], *overrides: str, nodes: int = 1, gpus: int = 8
) -> Layout:
    cfg = make_config(*PLANNED, *overrides)
    return make_layout(cfg, Cluster(nodes, gpus, find_gpu("h200")))


def test_blocks_are_shared_out_by_what_they_compute(make_config: Callable[..., Config]) -> None:
    layers = [
        [s.num_layers for s in planned(make_config, f"parallel.pp={pp}", *more).stages]
        for pp, more in (
            (1, ("model.num_layers=7", "train.micro_batch_size=1")),
            (4, ("model.num_layers=9", "model.vocab_size=8")),
            # A head as costly as several blocks.
            (4, ("model.num_layers=9", "model.vocab_size=1024")),
            (8, ("model.num_layers=8", "model.vocab_size=100000")),
        )
    ]
    assert layers == [[7], [2, 2, 3, 2], [2, 3, 3, 1], [1] * 8]


def test_bubble_and_micro_batches_in_flight(make_config: Callable[..., Config]) -> None:
    layout = planned(
        make_config, "parallel.pp=4", "model.num_layers=4", "train.micro_batch_size=1",
        "train.global_batch_size=12",
    )  # fmt: skip
    assert layout.num_micro_batches == 6
    assert layout.bubble == pytest.approx(3 / 6)
    assert [stage.in_flight for stage in layout.stages] == [4, 3, 2, 1]


def sent(layout: Layout, phase: Phase, stage: int = 0) -> dict[str, Traffic]:
    return {t.name: t for t in traffic(layout, layout.stages[stage], phase)}


def test_sequence_parallel_gathers_half_the_bytes_when_ternary(
    make_config: Callable[..., Config],
) -> None:
    layout = planned(
        make_config, "parallel={tp: 4, sequence_parallel: true}",
        "model={vocab_size: 96, num_layers: 2, d_model: 4096, num_heads: 32, d_ff: 8192}",
    )  # fmt: skip
    plain = sent(layout, "16 bit")["sequence"]
    codes = sent(layout, "ternary")["sequence, int8 codes"]
    tokens = 8 // 2 * layout.cfg.data.seq_len  # a pipeline's part of the batch
    # What q, k, v read and what gate, up read, in two layers.
    assert plain.payload == 2 * 2 * tokens * 4096 * 2
    assert plain.sent == plain.payload * 3 / 4
    assert codes.payload / plain.payload == pytest.approx(0.5 + 2 / 4096)
    # Integer sums are exact in fp32 and travel so.
    sums = [sent(layout, phase)["sums of outputs"].payload for phase in ("16 bit", "ternary")]
    assert sums == [2 * 2 * tokens * 4096 * 2, 2 * 2 * tokens * 4096 * 4]


def test_pipeline_sends_and_the_tied_embedding(make_config: Callable[..., Config]) -> None:
    layout = planned(
        make_config, "parallel.pp=2", "train.micro_batch_size=1", "model.tie_embeddings=true"
    )
    first, last = sent(layout, "16 bit"), sent(layout, "16 bit", stage=-1)
    residual = layout.num_micro_batches * layout.micro_batch_tokens * 32 * 2
    assert first["activations onward"].sent == last["gradients back"].sent == residual
    assert "gradients back" not in first
    assert first["tied embedding"].sent == last["tied embedding"].sent == 4 * 96 * 32
    assert first["updated tied embedding"].sent == 2 * 96 * 32
    # The last stage's copy has no optimizer: its data-parallel ranks reduce a block and a norm.
    reduced = [part["gradients"].payload for part in (first, last)]
    assert reduced[0] - reduced[1] == 4 * (96 * 32 - 32)
    held = [memory(layout, stage, "16 bit").parts for stage in layout.stages]
    assert held[0]["weights"] - held[1]["weights"] == -2 * 32
    assert held[0]["optimizer"] - held[1]["optimizer"] == 12 * (96 * 32 - 32) / layout.dp


def test_lion_holds_one_moment(make_config: Callable[..., Config]) -> None:
    for stage, adamw_bytes, lion_bytes in ((0, 8, 4), (2, 12, 8)):
        keys = ("train.dtype=fp32", f"engine.zero_stage={stage}", "train.micro_batch_size=1")
        adamw = planned(make_config, *keys)
        lion = planned(make_config, *keys, "optim.name=lion")
        theirs, ours = (memory(plan, plan.stages[0], "16 bit").parts for plan in (adamw, lion))
        assert ours["optimizer"] * adamw_bytes == theirs["optimizer"] * lion_bytes
        assert {**ours, "optimizer": 0} == {**theirs, "optimizer": 0}
        assert checkpoint_bytes(lion) * 12 == checkpoint_bytes(adamw) * 8


def test_links_within_and_between_nodes(make_config: Callable[..., Config]) -> None:
    layout = planned(make_config, "train.micro_batch_size=1", "train.global_batch_size=16", nodes=2)
    gpu = find_gpu("h200")
    assert layout.link_gb_per_second(8, 1) == gpu.node_gb_per_second
    assert layout.link_gb_per_second(16, 1) == 8 * gpu.network_gb_per_second
    assert layout.link_gb_per_second(2, 8) == gpu.network_gb_per_second


def test_zero3_replay() -> None:
    a, b = Use("a", 10), Use("b", 10)
    passes = (a, b, b, a)  # forward and backward
    assert gathered(passes, 0, 0, 0) == (40, 10)
    assert gathered(passes, 1, 0, 0) == (30, 10)  # b is used again at once
    assert gathered(passes, 21, 0, 0) == (20, 20)
    assert gathered(passes, 0, 100, 100) == (20, 20)  # a prefetch has counted on both


def test_zero3_without_checkpointing_keeps_codes_of_every_layer(
    make_config: Callable[..., Config],
) -> None:
    options = ("engine.zero_stage=3", "train.micro_batch_size=1", "model.num_layers=8")
    copies = []
    for checkpointing in ("none", "selective", "full"):
        layout = planned(make_config, *options, f"train.activation_checkpointing={checkpointing}")
        held = memory(layout, layout.stages[0], "ternary")
        copies.append(held.parts["codes and copies"])
    m = layout.cfg.model
    matrices, behind = cost.parameters(m).matrices, cost.recomputed_matrices(m, "selective")
    # Selective: those of o and down are made again.
    assert copies == [matrices, matrices - 7 * behind, matrices / 8]


def test_reference_kernels_multiply_in_fp32(make_config: Callable[..., Config]) -> None:
    seconds = {
        kernel: bound(
            planned(make_config, f"quant.kernel={kernel}", "train.micro_batch_size=1"), "ternary"
        ).seconds["compute"]
        for kernel in ("auto", "reference")
    }
    assert seconds["reference"] > 5 * seconds["auto"]


def test_phases_share_the_steps(make_config: Callable[..., Config]) -> None:
    options = ("train.micro_batch_size=1",)
    assert phase_steps(planned(make_config, *options)) == {"16 bit": 40, "ternary": 60}
    never = planned(make_config, *options, "transition.at=null")
    assert phase_steps(never) == {"16 bit": 100, "ternary": 0}


# --- Search ---


def test_search_finds_only_what_can_be_and_ranks_it(make_config: Callable[..., Config]) -> None:
    cfg = make_config(
        "model={vocab_size: 32000, num_layers: 8, d_model: 4096, num_heads: 32, d_ff: 11008}",
        "data.seq_len=2048", "train.global_batch_size=32", "train.dtype=bf16",
    )  # fmt: skip
    cluster = Cluster(1, 4, find_gpu("a100-80"))
    found = search(cfg, cluster, mfu=None, efficiency=0.5, usable=0.3)
    assert 0 < len(found.fitting) < found.num_admitted
    for plan in found.fitting:
        check(plan.layout.cfg)
        check_world_size(plan.layout.cfg, 4)
        assert plan.peak_bytes <= 0.3 * 79.1 * GIB
    days = [plan.days for plan in found.fitting]
    # Three digits decide: what is within one percent is ordered by something else.
    assert all(after >= 0.99 * before for before, after in itertools.pairwise(days))
    assert len({json.dumps(to_tree(plan)["layout"]) for plan in found.fitting}) == len(days)
    # Nothing else about the run has changed.
    first = found.fitting[0].layout.cfg
    assert (first.model, first.data, first.optim) == (cfg.model, cfg.data, cfg.optim)
    tight = search(cfg, cluster, mfu=None, efficiency=0.5, usable=0.2)
    assert len(tight.fitting) < len(found.fitting)


def test_a_share_that_is_none_is_refused(make_config: Callable[..., Config]) -> None:
    cfg = make_config(*PLANNED)
    with pytest.raises(ConfigError, match=r"--efficiency 1\.5 is not a share"):
        make_plan(cfg, Cluster(1, 1, find_gpu("cpu")), efficiency=1.5)


def test_a_schedule_that_is_not_reckoned_with(
    make_config: Callable[..., Config],
) -> None:
    layout = "parallel={pp: 2, pipeline_schedule: dualpipev}"
    cfg = make_config(*PLANNED, layout, "model.num_layers=4")
    with pytest.raises(ConfigError, match="'dualpipev' is not reckoned with; plan with 1f1b"):
        make_plan(cfg, Cluster(1, 2, find_gpu("cpu")))
