"""Training without a 16-bit copy of ternary matrices: the same bits, on fewer bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from test_fragments import same
from test_layouts import save
from test_plan_bytes import CountPayload
from tiny_runs import (
    NUM_STEPS,
    TERNARY_STEP,
    TRANSITION_STEP,
    make_batches,
    make_engine,
    micro_batches,
    odd_config,
    tiny_config,
    train_step,
    whole_state,
)
from torch import Tensor
from world import World

from bitscale import checkpoint
from bitscale.config import Config, Packing, num_kv_heads
from bitscale.data.batches import evaluation_batches
from bitscale.data.shards import TokenShard
from bitscale.engine import TrainEngine
from bitscale.engine.ternary_gather import TernaryGather
from bitscale.mesh import Mesh, share_model
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.quant import pack, packed_matrix, sharded
from bitscale.quant.kernels import get_kernels
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY
from bitscale.telemetry import TernaryTelemetry
from bitscale.train import restore
from bitscale.transition import begin_transition

pytestmark = pytest.mark.dist

ON = {"ternary_gather": True}
# What ZeRO-3 keeps of the weights that it has gathered: at its defaults all of a tiny model,
# between steps too; or the larger matrices for some time; or nothing longer than a layer needs it.
KEPT: dict[str, dict[str, int]] = {
    "all": {},
    "some": {"stage3_param_persistence_threshold": 36, "stage3_max_reuse_distance": 100},
    "none": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}
# One element: a NaN that stands for a matrix.
ABSENT_BYTES = {"bf16": 2, "fp32": 4}


class Case(NamedTuple):
    world_size: int
    stage: int
    dtype: str
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    packed: bool | None = False
    packing: str = "2bit"
    kept: str = "all"
    checkpointing: str = "none"

    def config(self, *, on: bool) -> Config:
        # Sizes that ranks do not divide: matrices lie across the cuts.
        make = odd_config if self.tp * self.pp == 1 else tiny_config
        parallel = {"tp": self.tp, "pp": self.pp, "pipeline_schedule": self.schedule}
        changes: dict[str, Any] = {"model": {"num_layers": 4}} if self.pp > 1 else {}
        raw = {"deepspeed": {"zero_optimization": KEPT[self.kept]}} if self.stage == 3 else {}
        codes = {"packed_codes": self.packed, "code_packing": self.packing}
        return make(
            self.stage,
            self.dtype,
            parallel=parallel,
            engine=raw | (ON | codes if on else {}),
            train={"activation_checkpointing": self.checkpointing},
            **changes,
        )


def cases() -> list[Any]:
    quick = [Case(1, 1, "fp32"), Case(2, 1, "bf16"), Case(4, 2, "bf16", packed=True, packing="base3")]
    quick += [Case(2, 3, "bf16", packed=None, kept="some", checkpointing="full")]
    every = [Case(n, s, d) for n in (1, 2, 4) for s in (1, 2) for d in ("bf16", "fp32")]
    shared = [Case(2, 1, "bf16", tp=2), Case(4, 2, "bf16", tp=2), Case(4, 1, "bf16", pp=2)]
    shared += [Case(4, 1, "bf16", tp=2, pp=2), Case(2, 1, "bf16", pp=2, schedule="dualpipev")]
    shared += [Case(4, 1, "bf16", tp=2, packed=True), Case(4, 1, "bf16", pp=2, packed=True)]
    shared += [Case(4, 2, "bf16", packed=True)]
    zero3 = [Case(n, 3, d, kept=k) for n, k in ((1, "all"), (2, "some")) for d in ("bf16", "fp32")]
    zero3 += [Case(4, 3, d, packed=None, kept=k) for d, k in (("bf16", "some"), ("fp32", "none"))]
    zero3 += [Case(2, 3, "bf16", packed=True, kept="none", checkpointing="selective")]
    zero3 += [Case(2, 3, "bf16", packed=p, packing="base3", kept="some") for p in (None, False)]
    zero3 += [Case(4, 3, "bf16", tp=2, packed=None, kept="none"), Case(2, 3, "fp32", tp=2)]
    slow = [case for case in every if case not in quick] + shared + zero3
    return quick + [pytest.param(case, marks=pytest.mark.slow) for case in slow]


class Seen(NamedTuple):
    """What a run says of itself, to be compared as it is."""

    steps: list[tuple[float, float]]  # loss and gradient norm
    held_out: list[Tensor]
    figures: list[Any]
    weights: dict[str, Tensor]


def run(mesh: Mesh, cfg: Config, corpus: Path) -> tuple[Seen, Any]:
    """The whole run through the transition, with evaluations and telemetry between its steps."""
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    telemetry = TernaryTelemetry(engine.module)
    largest = watch_weights(engine) if engine.stage == 3 else {}
    seen = Seen([], [], [], {})
    for step in range(NUM_STEPS):
        if step == TRANSITION_STEP:
            begin_transition(engine, mesh, "keep")
        largest.clear()
        seen.steps.append(train_step(engine, batches, step, mesh))
        is_absent = step >= TERNARY_STEP and cfg.engine.ternary_gather
        assert_resident(engine, is_absent)
        if engine.stage == 3:
            is_fetched = largest["within a pass"] > ABSENT_BYTES[cfg.train.dtype]
            assert is_fetched != is_absent, "for a layer's use"
        if step in (1, TRANSITION_STEP + 1, TERNARY_STEP, TERNARY_STEP + 1):
            seen.held_out.append(held_out(engine, corpus, mesh))
            seen.figures.append(telemetry.read(engine.gathered, compute=True))
            seen.held_out.append(held_out(engine, corpus, mesh))
    # There and back without a step between.
    for strength in (TERNARY, SIXTEEN_BIT, TERNARY):
        set_strength(engine.module, strength)
        seen.held_out.append(held_out(engine, corpus, mesh))
    for name, parameter in engine.module.named_parameters():
        with engine.gathered(parameter) as whole:
            seen.weights[name] = whole.clone()
    return seen, whole_state(engine, mesh)


def held_out(engine: TrainEngine, corpus: Path, mesh: Mesh) -> Tensor:
    (batch,) = evaluation_batches(
        TokenShard(corpus), seq_len=8, batch_size=2, dp_rank=0, dp_size=1, max_batches=1
    )
    size = engine.cfg.model.vocab_size or 0
    return engine.token_losses(
        batch._replace(
            input_ids_BS=batch.input_ids_BS % size, target_ids_BS=batch.target_ids_BS % size
        )
    )


def watch_weights(engine: TrainEngine) -> dict[str, int]:
    """The most bytes of a ternary weight's storage while layers compute; to be cleared."""
    largest: dict[str, int] = {}
    weights = [layer.weight for _, layer in bit_linears(engine.module)]

    def look(*_: object) -> None:
        sizes = [weight.untyped_storage().nbytes() for weight in weights]
        largest["within a pass"] = max(*sizes, largest.get("within a pass", 0))

    for _, layer in bit_linears(engine.module):
        # Before ZeRO-3's own hook, which drops the weight.
        layer.register_forward_hook(look, prepend=True)
        layer.register_full_backward_hook(look, prepend=True)
    return largest


def assert_resident(engine: TrainEngine, is_absent: bool) -> None:
    """Between steps the flat 16-bit tensor of the ternary matrices is there, or has no bytes; of
    ZeRO-3's, each rank has its share."""
    if engine.stage == 3:
        kept = [bool(layer.weight.numel()) for _, layer in bit_linears(engine.module)]
        assert not (is_absent and any(kept))
        return
    absent = ABSENT_BYTES[engine.cfg.train.dtype]
    for name, layer in bit_linears(engine.module):
        assert (layer.weight.untyped_storage().nbytes() == absent) == is_absent, name
        assert bool(layer.weight.isnan().all()) == is_absent, "whoever reads it notices"
    if isinstance(engine._ternary_gather, TernaryGather):
        flat = engine._ternary_gather._flat
        expected = 0 if is_absent else flat.numel() * flat.element_size()
        assert flat.untyped_storage().nbytes() == expected


def compare(mesh: Mesh, case: Case, corpus: Path) -> None:
    mesh = share_model(mesh, case.tp, num_kv_heads(case.config(on=True)), case.pp)
    plain, plain_state = run(mesh, case.config(on=False), corpus)
    ours, our_state = run(mesh, case.config(on=True), corpus)
    assert ours.steps == plain.steps
    assert {norm > 0.97 for _, norm in ours.steps} == {True, False}, "clipped in some steps"
    assert all(map(torch.equal, ours.held_out, plain.held_out))
    assert ours.figures == plain.figures
    assert [n for n in plain_state if not same(plain_state[n], our_state[n])] == []
    assert [n for n, w in plain.weights.items() if not torch.equal(w, ours.weights[n])] == []


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_the_same_training_to_the_bit(
    world_of: Callable[[int], World], corpus_prefix: Path, case: Case
) -> None:
    """Losses, gradient norms, masters, moments, weights, evaluations and telemetry."""
    world_of(case.world_size).run(compare, case, corpus_prefix, seconds=230.0)


# --- Checkpoints, and the way back to 16 bit ---


def there_and_back(mesh: Mesh, stage: int, root: Path, corpus: Path) -> None:
    """A checkpoint of 16 bit and one of λ = 1, from either kind of run, continued by either."""
    case = Case(2, stage, "bf16", kept="some")
    engines = [make_engine(case.config(on=on), mesh) for on in (False, True)]
    batches = make_batches(engines[0].cfg, corpus, mesh.dp_rank, mesh.dp_size)
    last, states, readers = NUM_STEPS - 1, [], []
    for index, engine in enumerate(engines):
        for step in range(last):
            if step in (2, TERNARY_STEP + 1):
                folder = root / f"{index}-{step}"
                save(engine, mesh, folder, step, engine.fragments())
                readers.append((step, checkpoint.Reader(checkpoint.resolve(folder))))
            train_step(engine, batches, step, mesh)
        states.append(whole_state(engine, mesh))
    # Now both are ternary, and go back: to either kind of weights, of either kind of run.
    for step, reader in readers:
        for engine in engines:
            for fragment in engine.fragments():
                fragment.master.fill_(torch.nan)
            engine.publish_masters()
            result = engine.train_step(micro_batches(engine.cfg, batches, 0), lr=0, weight_decay=0)
            assert result.loss.isnan()
            restore(engine, mesh, reader)
            for later in range(step, last):
                train_step(engine, batches, later, mesh)
            again = whole_state(engine, mesh)
            for state in states:
                assert [n for n in state if not same(state[n], again[n])] == []


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_checkpoints_and_rollback_to_16_bit(
    world_of: Callable[[int], World], tmp_path: Path, corpus_prefix: Path, stage: int
) -> None:
    world_of(2).run(there_and_back, stage, tmp_path, corpus_prefix)


# --- Bytes ---


def sent_in_a_ternary_step(mesh: Mesh, cfg: Config, corpus: Path) -> tuple[int, int, int]:
    """(gathered bytes, ternary elements, other elements)."""
    engine = make_engine(cfg, mesh)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    set_strength(engine.module, TERNARY)
    steps = [micro_batches(cfg, batches, step) for step in range(2)]
    engine.train_step(steps[0], lr=1e-3, weight_decay=0.0)
    with CountPayload("allgather", ignored=0) as counted:
        engine.train_step(steps[1], lr=1e-3, weight_decay=0.0)
    shapes = engine.parameter_shapes()
    num_ternary = sum(torch.Size(shapes[name]).numel() for name in engine.ternary_weights())
    num_others = sum(torch.Size(shape).numel() for shape in shapes.values()) - num_ternary
    return counted.payload["allgather"], num_ternary, num_others


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_bits_a_weight_are_sent_or_fewer_and_no_sixteen(
    world_of: Callable[[int], World], corpus_prefix: Path, stage: int
) -> None:
    for engine, num_codes in (({}, 0), (ON, 4), (ON | {"code_packing": "base3"}, 5)):
        cfg = tiny_config(stage, "bf16", engine=engine)
        (sent, num_ternary, num_others), _ = world_of(2).run(
            sent_in_a_ternary_step, cfg, corpus_prefix
        )
        of_ternary = num_ternary // num_codes if num_codes else 2 * num_ternary
        # What pads the ends of shares and packed pieces.
        assert 0 <= sent - (of_ternary + 2 * num_others) <= 64, engine


# --- Codes of any cut ---


def matrices() -> list[Tensor]:
    """Masters; in bf16 some of the largest lie on the other side of a rounding boundary."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(s, generator=generator) * 0.02 for s in ((5, 7), (64, 96), (1, 3))]
    ties = torch.tensor([[1.0, -1.0, 3.0], [-3.0, 1.0, 3.0]])  # s = 2, of which 1 is the half
    spoilt = [torch.tensor([[0.1, torch.nan, -0.2, 0.3]]), torch.tensor([[torch.inf, -1.0]])]
    tiny = [torch.zeros(3, 3), torch.full((2, 2), 1e-7)]
    return [*normal, ties, *spoilt, *tiny]


def check_cuts(mesh: Mesh) -> None:
    group = torch.distributed.group.WORLD
    for dtype in (torch.bfloat16, torch.float32):
        whole = matrices()
        flat = torch.cat([m.flatten() for m in whole])
        starts = [sum(m.numel() for m in whole[:i]) for i in range(len(whole))]
        # Fair shares; two ranks that have everything; one rank; cuts inside of bytes.
        for size in (-(-flat.numel() // 4), -(-flat.numel() // 2), flat.numel(), 1601):
            padded = torch.nn.functional.pad(flat, (0, 4 * size - flat.numel()))
            own = padded[mesh.rank * size : (mesh.rank + 1) * size]
            for packing in get_args(Packing):
                layout = sharded.partitioned(
                    [m.shape for m in whole], starts, size, group, own.device, packing
                )
                check_layout(own, layout, dtype)
        for packing in get_args(Packing):
            check_shares(mesh, dtype, packing)


def check_shares(mesh: Mesh, dtype: torch.dtype, packing: Packing) -> None:
    """Each matrix cut for itself; the padding of a share may be anything. Some ranks have none."""
    shares, places = [], []
    for matrix in matrices():
        size = -(-matrix.numel() // 4)
        padded = torch.full((4 * size,), torch.nan)
        padded[: matrix.numel()] = matrix.flatten()
        places.append(sum(share.numel() for share in shares))
        shares.append(padded[mesh.rank * size : (mesh.rank + 1) * size].to(dtype))
    own = torch.cat(shares)
    shapes = [matrix.shape for matrix in matrices()]
    group = torch.distributed.group.WORLD
    layout = sharded.partitioned_each(shapes, places, group, own.device, packing)
    assert [sum(p.rank == rank for p in layout.pieces) for rank in range(4)] == [8, 8, 7, 4]
    check_layout(own, layout, dtype)


def check_layout(own: Tensor, layout: sharded.Partitioned, dtype: torch.dtype) -> None:
    codes = [matrix.unpack() for matrix in sharded.gather_codes(own, layout, dtype, 1e-5)]
    for index, (matrix, ours) in enumerate(zip(matrices(), codes, strict=True)):
        theirs = get_kernels("reference", "cpu").ternarize(matrix.to(dtype), "absmean", 1e-5)
        assert torch.equal(ours.codes_FD, theirs.codes_FD), (dtype, layout.pieces, index)
        assert torch.equal(ours.scale.nan_to_num(9), theirs.scale.nan_to_num(9))
        again = sharded.gather_matrix(own, layout, dtype, index)
        assert torch.equal(again.nan_to_num(9), matrix.to(dtype).nan_to_num(9))


def check_cuts_with_and_without_c(mesh: Mesh) -> None:
    check_cuts(mesh)
    in_c = sharded.runs_in_c
    modules: list[Any] = [sharded, pack, packed_matrix]
    for module in modules:
        module.runs_in_c = lambda tensor, kernel: False
    try:
        check_cuts(mesh)
    finally:
        for module in modules:
            module.runs_in_c = in_c


def test_codes_of_any_cut_are_those_of_the_whole(world_of: Callable[[int], World]) -> None:
    """ZeRO's cuts: uneven and empty partitions, matrices over several ranks, halves, NaN and infinity."""
    world_of(4).run(check_cuts_with_and_without_c)
