"""Pipelines of 2 and 4 stages against one process, through the transition; their checkpoints."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_fragments import same
from test_layouts import SAVED_STEP, save
from test_zero_equivalence import PHASES
from tiny_runs import (
    NO_PERSISTENCE,
    NUM_STEPS,
    SNAPSHOTS,
    TERNARY_STEP,
    TRANSITION_STEP,
    Curve,
    Whole,
    make_batches,
    make_engine,
    micro_batches,
    reference,
    tiny_config,
    train,
    train_step,
    whole_state,
)
from torch import Tensor
from world import World

from bitscale import checkpoint
from bitscale.config import Config, num_kv_heads
from bitscale.data.batches import EvaluationBatch
from bitscale.engine import PipelineEngine, TrainEngine
from bitscale.mesh import Mesh, share_model
from bitscale.model.bitlinear import bit_linears, set_strength
from bitscale.model.decoder import Decoder
from bitscale.quant.schedule import quant_strength
from bitscale.telemetry import TernaryTelemetry
from bitscale.transition import begin_transition

pytestmark = pytest.mark.dist

World_of = Callable[[int], World]
V = "dualpipev"
SECONDS = 300.0  # for one world; a busy machine needs many times what an idle one does


class Layout(NamedTuple):
    world_size: int
    pp: int
    tp: int = 1
    sequence_parallel: bool = False
    stage: int = 1
    schedule: str = "1f1b"

    @property
    def folder(self) -> str:
        return "-".join(map(str, self))


# What else may go wrong in a pipeline; each is a change of tiny_config's sections.
TIED: dict[str, dict[str, Any]] = {}
UNTIED = {"model": {"tie_embeddings": False, "bias": True, "qk_norm": True}}
UNEVEN = {"model": UNTIED["model"] | {"num_layers": 5}}
DOCUMENTS = {"data": {"reset_attention": True}, "train": {"activation_checkpointing": "full"}}
FEW_DOCUMENTS = DOCUMENTS | {
    "train": {"activation_checkpointing": "selective", "micro_batch_size": 2},
}
LEARNED = {"quant": {"preset": "paretoq"}}
RESIDUAL = {"transition": {"residual": {"peak": 0.2, "over": {"steps": 6}}}}
WIDE = {"model": {"head_bits": 8}, "train": {"micro_batch_size": 2}}

RUNS = {
    "pp2": (Layout(2, 2), "fp32", TIED),
    "pp2-documents": (Layout(2, 2), "fp32", DOCUMENTS),
    "pp2-residual": (Layout(2, 2), "fp32", RESIDUAL),
    "pp2-bf16-uneven": (Layout(2, 2), "bf16", UNEVEN),
    "pp4": (Layout(4, 4), "fp32", TIED),
    "pp4-bf16-documents": (Layout(4, 4), "bf16", UNTIED | DOCUMENTS),
    "pp2-dp2": (Layout(4, 2), "fp32", WIDE),
    "pp2-dp2-learned": (Layout(4, 2), "fp32", LEARNED),
    "pp2-dp2-bf16": (Layout(4, 2), "bf16", TIED),
    "pp2-tp2-bf16": (Layout(4, 2, 2), "bf16", WIDE | UNTIED),
    "pp2-tp2-sp": (Layout(4, 2, 2, True), "fp32", FEW_DOCUMENTS),
    "v2-bf16-untied-documents": (Layout(2, 2, schedule=V), "bf16", UNTIED | DOCUMENTS),
    "v2-dp2-bf16": (Layout(4, 2, schedule=V), "bf16", TIED),
    "v2-tp2-sp": (Layout(4, 2, 2, True, schedule=V), "fp32", TIED),
}


# What they combine is in the other runs, too.
SLOW_RUNS = ("pp2-bf16-uneven", "pp4", "pp2-tp2-bf16", "v2-dp2-bf16", "v2-tp2-sp")


def layout_config(layout: Layout, dtype: str = "fp32", **changes: Any) -> Config:
    model = {"num_layers": 4} | changes.pop("model", {})
    parallel = {
        "pp": layout.pp,
        "tp": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_schedule": layout.schedule,
    }
    engine = {"deepspeed": NO_PERSISTENCE} if layout.stage == 3 else {}
    return tiny_config(
        layout.stage, dtype, model=model, parallel=parallel, engine=engine, **changes
    )


class Seen(NamedTuple):
    curve: Curve
    num_layers: list[int]  # BitLinears of each stage
    num_quantized: list[Counter[str]]  # weights quantized in each step, by kernel
    figures: dict[str, dict[str, float | None]]  # telemetry of this rank's stage
    losses_BS: Tensor  # of a batch, at the end
    ternary: set[str]


def build(mesh: Mesh, cfg: Config) -> tuple[TrainEngine, Mesh]:
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    return make_engine(cfg, mesh), mesh


def run(mesh: Mesh, cfg: Config, corpus: Path) -> Seen:
    engine, mesh = build(mesh, cfg)
    assert isinstance(engine, PipelineEngine)
    has_two = type(engine._engine).__name__ == "DualPipeVEngine"
    assert has_two == (cfg.parallel.pipeline_schedule == V)
    calls = count_quantizations(engine)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    curve, counts = Curve([], [], {}), []
    for step in range(NUM_STEPS):
        if step == TRANSITION_STEP:
            begin_transition(engine, mesh, "keep")
        calls.clear()
        loss, norm = train_step(engine, batches, step, mesh)
        counts.append(Counter(calls))
        curve.losses.append(loss)
        curve.grad_norms.append(norm)
        if step + 1 in SNAPSHOTS:
            curve.states[step + 1] = whole_state(engine, mesh)
    telemetry = TernaryTelemetry(engine.module)
    figures = telemetry.read(engine.gathered, compute=mesh.speaks_for_stage)
    losses_BS = engine.token_losses(evaluation_batch(cfg, corpus))
    layers = mesh.gather_objects(len(list(bit_linears(engine.module))))
    return Seen(curve, layers, counts, figures, losses_BS, engine.ternary_weights())


def count_quantizations(engine: TrainEngine) -> Counter[str]:
    """Counts, by kernel, of the weights that this rank quantizes from now on."""
    calls: Counter[str] = Counter()
    layers = [layer for _, layer in bit_linears(engine.module)]
    kernels = layers[0].kernels
    if kernels is None or engine.mesh.tp_size > 1:
        return calls

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(kernels, name)

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    table = kernels._replace(
        ternarize=counted("ternarize"), blend_weight=counted("blend_weight")
    )
    for layer in layers:
        layer.kernels = table
    return calls


def evaluation_batch(cfg: Config, corpus: Path) -> EvaluationBatch:
    batch = micro_batches(cfg, make_batches(cfg, corpus), NUM_STEPS)[0]
    return EvaluationBatch(*batch, batch.target_ids_BS.numel())


def without_pipeline(name: str, world_of: World_of, corpus: Path) -> Curve:
    """The run in one process, without DeepSpeed; or of as many tensor-parallel ranks, whose own
    rounding is held to one process elsewhere (test_tensor_parallel_training.py)."""
    layout, dtype, changes = RUNS[name]
    if layout.tp == 1:
        return reference(layout_config(layout, dtype, **changes), corpus)
    cfg = layout_config(layout._replace(pp=1, schedule="1f1b"), dtype, **changes)
    curve: Curve = world_of(layout.tp).run(train, cfg, corpus, seconds=SECONDS)[0]
    return curve


# Loss (absolute) and gradient norm (relative) in PHASES, and the weights' relative distance when
# the transition begins. About 5 times what was seen; from the ramp on a code may flip.
TOLERANCES = {
    "fp32": ((2e-6, 2e-5, 1e-3), (1e-6, 2e-5, 3e-3), 1e-4),
    # Tied: the reference adds both ends' gradients in bf16, the pipeline in fp32.
    "bf16": ((1e-4, 6e-4, 5e-3), (2e-3, 4e-3, 2e-2), 5e-3),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW_RUNS else n for n in RUNS],
)
def test_the_run_is_that_without_a_pipeline(
    name: str, world_of: World_of, corpus_prefix: Path
) -> None:
    """Clipped steps, the ramp and the ternary phase; evaluation and telemetry at the end."""
    layout, dtype, changes = RUNS[name]
    cfg = layout_config(layout, dtype, **changes)
    ranks: list[Seen] = world_of(layout.world_size).run(run, cfg, corpus_prefix, seconds=SECONDS)
    seen, expected = ranks[0], without_pipeline(name, world_of, corpus_prefix)
    for other in ranks[1:]:
        assert other.curve.losses == seen.curve.losses
        assert other.curve.grad_norms == seen.curve.grad_norms
    check_curve(seen.curve, expected, dtype)
    check_quantizations(ranks, layout, cfg)
    check_finished_model(ranks, cfg, corpus_prefix)


def check_curve(curve: Curve, expected: Curve, dtype: str) -> None:
    loss_limits, norm_limits, state_limit = TOLERANCES[dtype]
    losses = [abs(a - b) for a, b in zip(curve.losses, expected.losses, strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(curve.grad_norms, expected.grad_norms, strict=True)]
    for phase, loss_limit, norm_limit in zip(PHASES, loss_limits, norm_limits, strict=True):
        assert max(losses[phase]) < loss_limit, losses
        assert max(norms[phase]) < norm_limit, norms
    assert curve.states[1].keys() == expected.states[1].keys()
    for step, state in curve.states.items():
        assert {whole.step for whole in state.values()} == {step}
    for parameter, whole in expected.states[TRANSITION_STEP].items():
        got = curve.states[TRANSITION_STEP][parameter].master
        error = float((got - whole.master).norm() / whole.master.norm().clamp(min=1e-3))
        assert error < state_limit, parameter


def check_quantizations(ranks: list[Seen], layout: Layout, cfg: Config) -> None:
    """Each weight once a step, whatever the number of micro-batches (2 or more everywhere)."""
    assert sum(ranks[0].num_layers) == num_linears(cfg) * layout.world_size // layout.pp
    if layout.tp > 1 or cfg.quant.preset != "b158" or cfg.transition.residual.peak:
        return
    for seen, num_layers in zip(ranks, ranks[0].num_layers, strict=True):
        for step, calls in enumerate(seen.num_quantized):
            if step <= TRANSITION_STEP:
                assert not calls
            elif step < TERNARY_STEP:
                assert calls == {"blend_weight": num_layers}
            else:
                assert calls == {"ternarize": num_layers}


def num_linears(cfg: Config) -> int:
    return 7 * cfg.model.num_layers


def check_finished_model(ranks: list[Seen], cfg: Config, corpus: Path) -> None:
    """Held-out losses and telemetry are those of the whole decoder with the final weights."""
    dtype = torch.bfloat16 if cfg.train.dtype == "bf16" else torch.float32
    model = Decoder(cfg.model, cfg.quant).to(dtype).eval()
    state = ranks[0].curve.states[NUM_STEPS]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name].master.view_as(parameter))
    set_strength(model, quant_strength(NUM_STEPS - 1, cfg))
    batch = evaluation_batch(cfg, corpus)
    with torch.no_grad():
        losses_BS = model(*batch[:3], reduction="none")
    for seen in ranks:
        assert torch.equal(seen.losses_BS, ranks[0].losses_BS)
    error = (ranks[0].losses_BS - losses_BS).abs().max()
    assert error < (1e-4 if dtype == torch.float32 else 0.1), error

    wanted = TernaryTelemetry(model).read(lambda weight: nullcontext(weight.data), compute=True)
    got = [(name, figures) for seen in ranks for name, figures in seen.figures.items()]
    assert len(got) == len(wanted) == num_linears(cfg)
    assert dict(got) == wanted
    assert ranks[0].ternary == {f"{name}.weight" for name in wanted}


SAVING = {
    "tied": (TIED, [Layout(1, 1), Layout(2, 2), Layout(4, 4), Layout(4, 2, 2, True)]),
    "untied": (
        UNTIED,
        [Layout(1, 1), Layout(2, 2, schedule=V), Layout(2, 1, stage=3), Layout(4, 2)],
    ),
}


def save_layout(
    mesh: Mesh, cfg: Config, folder: Path, corpus: Path
) -> tuple[dict[str, Whole], float]:
    """The state saved after SAVED_STEP steps, and the loss of the next."""
    engine, mesh = build(mesh, cfg)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    for step in range(SAVED_STEP):
        train_step(engine, batches, step, mesh)
    state = whole_state(engine, mesh)
    save(engine, mesh, folder, SAVED_STEP, engine.fragments())
    return state, train_step(engine, batches, SAVED_STEP, mesh)[0]


def restore_all(
    mesh: Mesh, cfg: Config, saved: dict[Path, tuple[dict[str, Whole], float]], corpus: Path
) -> None:
    engine, mesh = build(mesh, cfg)
    batches = make_batches(cfg, corpus, mesh.dp_rank, mesh.dp_size)
    for folder, (state, next_loss) in saved.items():
        reader = checkpoint.Reader(checkpoint.resolve(folder))
        assert reader.meta.shapes == {
            name: list(parameter.shape)
            for name, parameter in Decoder(cfg.model, cfg.quant).named_parameters()
        }
        reader.restore(engine.fragments(), engine.parameter_shapes())
        engine.publish_masters()
        restored = whole_state(engine, mesh)
        assert [name for name in state if not same(restored[name], state[name])] == []
        for name, parameter in engine.module.named_parameters():
            with engine.gathered(parameter) as whole:  # the last stage's tied copy, too
                assert torch.equal(whole.flatten(), state[name].master), name
        loss, _ = train_step(engine, batches, SAVED_STEP, mesh)
        assert loss == pytest.approx(next_loss, abs=2e-6), folder


@pytest.mark.parametrize("kind", ["tied", pytest.param("untied", marks=pytest.mark.slow)])
def test_checkpoints_between_layouts(
    world_of: World_of, tmp_path: Path, corpus_prefix: Path, kind: str
) -> None:
    """What any number of stages saved, any other restores, bitwise, and so does one process."""
    changes, layouts = SAVING[kind]
    saved = {}
    for layout in layouts:
        cfg, folder = layout_config(layout, **changes), tmp_path / layout.folder
        ranks = world_of(layout.world_size).run(
            save_layout, cfg, folder, corpus_prefix, seconds=SECONDS
        )
        saved[folder] = ranks[0]
    for layout in layouts:
        cfg = layout_config(layout, **changes)
        world_of(layout.world_size).run(restore_all, cfg, saved, corpus_prefix, seconds=SECONDS)
    for folder, (state, _) in saved.items():
        reader = checkpoint.Reader(checkpoint.resolve(folder))
        masters = dict(reader.parameters())
        assert masters.keys() == state.keys()
        for name, master in masters.items():
            assert torch.equal(master.flatten(), state[name].master)
