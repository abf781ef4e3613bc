"""A plan and a ranking as text."""

from collections.abc import Sequence

from bitscale.config import num_steps, tokens_per_step
from bitscale.model import cost
from bitscale.model.cost import Flops
from bitscale.plan.layout import GIB, Layout
from bitscale.plan.memory import PARTS, Memory, checkpoint_bytes
from bitscale.plan.report import PhasePlan, Plan
from bitscale.plan.search import Found

_TERA = 1e12


def show(plan: Plan) -> str:
    """The whole plan."""
    phases = list(plan.phases.values())
    lines = [
        *_header(plan),
        "",
        *_memory_table(plan),
        "",
        *_wire_table(phases),
        "",
        *_flops_table(plan.layout, phases),
        "",
        *_time_table(plan, phases),
        *_notes(plan),
    ]
    return "\n".join(lines) + "\n"


def show_ranking(found: Found, limit: int) -> str:
    """The best layouts, one a line."""
    head = (
        "tp",
        "pp",
        "dp",
        "sp",
        "zero",
        "micro",
        "ckpt",
        "GiB",
        "bubble",
        "limit",
        "MFU",
        "days",
    )
    rows = [
        (
            plan.layout.tp,
            plan.layout.pp,
            plan.layout.dp,
            "yes" if plan.layout.cfg.parallel.sequence_parallel else "no",
            plan.layout.cfg.engine.zero_stage,
            plan.layout.cfg.train.micro_batch_size,
            plan.layout.cfg.train.activation_checkpointing,
            f"{plan.peak_bytes / GIB:.1f}",
            f"{plan.layout.bubble:.1%}",
            _main_phase(plan).bound.limit,
            f"{_main_phase(plan).mfu:.1%}",
            f"{plan.days:.3g}",
        )
        for plan in found.fitting[:limit]
    ]
    text = f"{len(found.fitting)} of {found.num_admitted} admitted layouts fit; the best:\n"
    return text + "\n".join(_table([head, *rows])) + "\n"


def _main_phase(plan: Plan) -> PhasePlan:
    return max(plan.phases.values(), key=lambda part: part.num_steps)


def _header(plan: Plan) -> list[str]:
    layout, cfg = plan.layout, plan.layout.cfg
    cluster, held = layout.cluster, cost.parameters(cfg.model)
    layers = sorted({stage.num_layers for stage in layout.stages})
    of_layers = "-".join(str(n) for n in layers) if len(layers) > 1 else str(layers[0])
    return [
        f"{held.total / 1e9:.3f}B parameters, {held.matrices / 1e9:.3f}B of them ternary at λ = 1; "
        f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name}",
        f"tp {layout.tp}  pp {layout.pp} ({of_layers} layers a stage)  dp {layout.dp}  "
        f"sequence parallel {'yes' if cfg.parallel.sequence_parallel else 'no'}  "
        f"ZeRO {cfg.engine.zero_stage}  {cfg.train.dtype}",
        f"micro-batch {cfg.train.micro_batch_size} x {cfg.data.seq_len:,} tokens, "
        f"{layout.num_micro_batches} a step; activation checkpointing "
        f"{cfg.train.activation_checkpointing}; pipeline bubble "
        f"{layout.bubble:.1%}",
    ]


def _memory_table(plan: Plan) -> list[str]:
    columns: list[tuple[str, Memory]] = [
        (phase, part.memory) for phase, part in plan.phases.items()
    ]
    if plan.ramp is not None:
        columns.insert(1, ("ramp", plan.ramp))
    kinds = dict.fromkeys(kind for _, held in columns for kind in held.activations)
    rows: list[tuple[object, ...]] = [("memory of a rank, GiB", *(name for name, _ in columns))]
    rows += [
        (part, *(_gib(held.parts[part]) for _, held in columns))
        for part in PARTS
        if any(held.parts[part] for _, held in columns)
    ]
    rows += [
        (f"activations: {kind}", *(_gib(held.activations.get(kind, 0)) for _, held in columns))
        for kind in kinds
    ]
    rows.append(("logits", *(_gib(held.logits) for _, held in columns)))
    rows.append(("a block in the backward pass", *(_gib(held.block) for _, held in columns)))
    if any(held.reduction_copy for _, held in columns):
        rows.append(("copy for the reduction", *(_gib(held.reduction_copy) for _, held in columns)))
    rows.append(("peak, not all at once", *(_gib(held.peak) for _, held in columns)))
    lines = _table(rows)
    lines += [f"peak in {name}: {held.peak_moment}" for name, held in columns]
    if plan.layout.pp > 1:
        stages = sorted({part.fullest.index for part in plan.phases.values()})
        lines.append(f"of stage {', '.join(str(s) for s in stages)}, the fullest; by stage:")
        for phase in plan.phases:
            peaks = " ".join(f"{peak / GIB:.1f}" for peak in plan.stage_peaks(phase))
            lines.append(f"  {phase}: {peaks}")
    word = "fits" if plan.fits else "does NOT fit"
    lines.append(
        f"{word}: {_gib(plan.peak_bytes)} of {_gib(plan.usable_bytes)} GiB usable "
        f"({plan.usable:.0%} of {plan.layout.cluster.gpu.memory_gib:g})"
    )
    return lines


def _wire_table(phases: Sequence[PhasePlan]) -> list[str]:
    names = dict.fromkeys((t.name, t.collective) for part in phases for t in part.traffic)
    rows: list[tuple[object, ...]] = [
        ("sent by a rank in a step, GiB", *(part.phase for part in phases))
    ]
    for name, collective in names:
        sent = (
            sum(t.sent for t in part.traffic if (t.name, t.collective) == (name, collective))
            for part in phases
        )
        rows.append((f"{name} ({collective})", *(_gib(s) for s in sent)))
    rows.append(("total", *(_gib(sum(t.sent for t in part.traffic)) for part in phases)))
    return _table(rows)


def _flops_table(layout: Layout, phases: Sequence[PhasePlan]) -> list[str]:
    tokens = tokens_per_step(layout.cfg)

    def row(name: str, flops: Flops) -> tuple[object, ...]:
        parts = (flops.matrices, flops.attention, flops.head)
        per_token = (f"{part / 1e9:.3f}" for part in parts)
        return (
            name,
            *per_token,
            f"{flops.total / 1e9:.3f}",
            f"{flops.total * tokens / _TERA:,.4g}",
        )

    first = phases[0].flops
    head = ("GFLOP a token", "matrices", "attention", "head", "total", "TFLOP a step")
    rows = [head, row("forward", first.forward), row("backward", first.backward)]
    if first.recomputed.total:
        rows += [row(f"recomputed, {part.phase}", part.flops.recomputed) for part in phases]
    return _table(rows)


def _time_table(plan: Plan, phases: Sequence[PhasePlan]) -> list[str]:
    def line(name: str, *cells: str) -> tuple[object, ...]:
        return (name, *cells)

    rows = [line("", *(part.phase for part in phases))]
    for limit in ("compute", "memory", "wire"):
        seconds = (part.bound.seconds[limit] for part in phases)
        rows.append(line(f"{limit}, s a step at least", *(f"{s:.4g}" for s in seconds)))
    rows.append(
        line("MFU at most", *(f"{part.bound.mfu:.1%} ({part.bound.limit})" for part in phases))
    )
    rows.append(line("MFU reckoned with", *(f"{part.mfu:.1%}" for part in phases)))
    rows.append(
        line(
            "s a step",
            *(f"{p.bound.step_seconds * p.bound.mfu / p.mfu:.4g}" for p in phases),
        )
    )
    rows.append(line("steps", *(f"{part.num_steps:,}" for part in phases)))
    cfg = plan.layout.cfg
    tokens = num_steps(cfg) * tokens_per_step(cfg)
    size = checkpoint_bytes(plan.layout)
    world_size = plan.layout.cluster.world_size
    return [
        *_table(rows),
        f"{plan.days:.3g} days, {plan.gpu_hours:,.0f} GPU-hours to {tokens / 1e9:,.4g}B tokens",
        f"a checkpoint: {_gib(size)} GiB in {world_size} files of {_gib(size / world_size)}",
    ]


def _notes(plan: Plan) -> list[str]:
    cfg, notes = plan.layout.cfg, []
    if cfg.transition.at is None:
        notes.append("transition.at is null: the run stays in 16 bit")
    if cfg.quant.kernel == "reference" and plan.layout.way == "kernels":
        notes.append(
            "quant.kernel=reference multiplies ternary codes in fp32; quant.kernel=auto uses int8"
        )
    return [f"note: {note}" for note in notes]


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _gib(bytes_: float) -> str:
    gib = bytes_ / GIB
    return f"{gib:.3f}" if gib >= 0.01 or not gib else f"{gib:.2g}"
