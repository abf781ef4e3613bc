"""Train the same run over tensor-, sequence-, pipeline- and data-parallel layouts and compare.

    python tools/compare_layouts.py [--corpus DIR] [--out docs/results/parallel-equivalence.md]

Each run is a real launch (`bitscale train` under torchrun, gloo) of a small decoder on real text
through the transition, one CPU thread a rank. Then every layout reads the same checkpoint and
quantizes it: codes and scales are compared by checksum. At last a fault is planted, the scale of
each rank's part alone, which both comparisons have to notice. Exit code 1 if a curve leaves its
tolerance, a code differs, or the fault is not noticed. Runs that are finished in --work are not
repeated. About ten minutes on two idle cores.
"""

import argparse
import datetime
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from bitscale import checkpoint, run
from bitscale.cli.main import main as bitscale_main
from bitscale.config import num_kv_heads, parse_config
from bitscale.mesh import close_mesh, init_mesh, share_model
from bitscale.model.bitlinear import bit_linears, prepare_weights, set_strength
from bitscale.model.collectives import shard_of
from bitscale.model.decoder import Decoder
from bitscale.model.layers import ranks_of
from bitscale.model.parallel import ShardedLinear
from bitscale.quant.schedule import TERNARY
from compare_zero import (
    BUILTIN,
    CLIP,
    CONFIG,
    NUM_STEPS,
    TERNARY_STEP,
    TRANSITION_STEP,
    Curve,
    commit,
    differences,
    excesses,
    is_finished,
    launch,
    prepare,
    read_curve,
    train,
)

# bf16: what the yardstick differs by, one process with other micro-batches.
TOLERANCES = {"fp32": (1e-5, 1e-4, 1e-3), "bf16": (4e-3, 2e-3, 8e-3)}


class Layout(NamedTuple):
    dtype: str
    ranks: int
    tp: int
    sequence_parallel: bool
    stage: int
    pp: int = 1
    schedule: str = "1f1b"
    checkpointing: str = "none"
    micro_batch_size: int = 2

    @property
    def name(self) -> str:
        return "-".join(map(str, self[:-1] if self.micro_batch_size == 2 else self))

    @property
    def pp_name(self) -> str:
        return f"{self.pp}, V" if self.schedule == "dualpipev" else str(self.pp)

    @property
    def overrides(self) -> list[str]:
        return [
            f"train.dtype={self.dtype}",
            f"engine.zero_stage={self.stage}",
            f"parallel.tp={self.tp}",
            f"parallel.pp={self.pp}",
            f"parallel.pipeline_schedule={self.schedule}",
            f"train.activation_checkpointing={self.checkpointing}",
            f"train.micro_batch_size={self.micro_batch_size}",
            "model.num_layers=4",
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"checkpoint.every={TERNARY_STEP}",
            "checkpoint.keep_every=1",
        ]


SINGLE = {"fp32": Layout("fp32", 1, 1, False, 0), "bf16": Layout("bf16", 1, 1, False, 1)}
LAYOUTS = [
    SINGLE["fp32"],
    Layout("fp32", 2, 1, False, 1),
    Layout("fp32", 4, 1, False, 1),
    Layout("fp32", 2, 2, False, 1),
    Layout("fp32", 2, 2, True, 1),
    Layout("fp32", 2, 2, True, 2),
    Layout("fp32", 2, 2, True, 3),
    Layout("fp32", 4, 2, False, 1),
    Layout("fp32", 4, 2, True, 1),
    Layout("fp32", 4, 2, True, 2),
    Layout("fp32", 4, 2, True, 3),
    Layout("fp32", 4, 4, False, 1),
    Layout("fp32", 4, 4, True, 1),
    Layout("fp32", 2, 1, False, 1, pp=2),
    Layout("fp32", 4, 1, False, 1, pp=4),
    Layout("fp32", 4, 1, False, 1, pp=2),
    Layout("fp32", 4, 2, True, 1, pp=2),
    Layout("fp32", 4, 2, True, 1, pp=2, checkpointing="selective"),
    Layout("fp32", 4, 2, True, 1, pp=2, checkpointing="full"),
    Layout("fp32", 2, 1, False, 1, pp=2, schedule="dualpipev"),
    Layout("fp32", 4, 1, False, 1, pp=2, schedule="dualpipev"),
    SINGLE["bf16"],
    Layout("bf16", 2, 2, False, 1),
    Layout("bf16", 2, 2, True, 1),
    Layout("bf16", 2, 1, False, 1, pp=2),
    Layout("bf16", 2, 1, False, 1, pp=2, schedule="dualpipev"),
]
YARDSTICK = Layout("bf16", 1, 1, False, 1, micro_batch_size=4)
PLANTED = Layout("fp32", 2, 2, False, 1)  # where the fault is planted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help=f"prepared corpus (default: {BUILTIN})")
    parser.add_argument("--out", type=Path, default=Path("docs/results/parallel-equivalence.md"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare-layouts"))
    parser.add_argument("--codes-of", type=Path, help=argparse.SUPPRESS)  # what a rank runs
    parser.add_argument("--tp", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plant:
        plant_local_scale()
    if args.command:
        return bitscale_main(args.command)
    if args.codes_of:
        print_checksum(args.codes_of, args.tp)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "config.yaml").write_text(CONFIG, encoding="utf-8")
    corpus = args.corpus or prepare(args.work / "corpus")
    curves = {
        layout: train(layout.name, layout.ranks, layout.overrides, corpus, args.work)
        for layout in [*LAYOUTS, YARDSTICK]
    }
    saved = args.work / SINGLE["fp32"].name / "checkpoints" / f"step-{TERNARY_STEP:08d}"
    codes = {
        tp: launch([__file__, "--codes-of", str(saved), "--tp", str(tp)], tp).strip()
        for tp in (1, 2, 4)
    }
    planted = train_planted(corpus, args.work)
    faulty = excesses_of(PLANTED, planted, curves)
    program = [__file__, "--plant", "--codes-of", str(saved), "--tp", "2"]
    planted_codes = launch(program, 2).strip()
    if planted_codes != codes[1]:
        faulty.append(
            f"TP 2: codes and scales {planted_codes[:32]}, the single process's {codes[1][:32]}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = report(curves, codes, str(args.corpus or BUILTIN), faulty)
    args.out.write_text(text, encoding="utf-8")
    print(f"wrote {args.out}")
    failures = [line for layout in LAYOUTS for line in excesses_of(layout, curves[layout], curves)]
    if len(set(codes.values())) > 1:
        failures.append(f"codes or scales differ: {codes}")
    if len(faulty) < 2:
        failures.append(f"the planted local scale was not noticed by both comparisons: {faulty}")
    print("\n".join(failures) or "every curve is within its tolerance, and all codes are equal")
    return 1 if failures else 0


def excesses_of(layout: Layout, curve: Curve, curves: dict[Layout, Curve]) -> list[str]:
    """What is further from the single process than is allowed, in words."""
    single, limits = curves[SINGLE[layout.dtype]], TOLERANCES[layout.dtype]
    return excesses(layout.name, curve, single, limits)


def plant_local_scale() -> None:
    """Let each rank take the scale of its own part of a matrix, as Megatron's guidance has it."""
    ShardedLinear._scale_group = lambda _: None  # type: ignore[method-assign,assignment]


def train_planted(corpus: Path, work: Path) -> Curve:
    """`train` of PLANTED with the fault."""
    run_dir = work / f"{PLANTED.name}-planted"
    if not is_finished(run_dir):
        command = ["train", str(work / "config.yaml"), f"run.dir={run_dir}"]
        command += [f"data.corpora=[{{path: {corpus}}}]", *PLANTED.overrides]
        launch([__file__, "--plant", "--command", *command], PLANTED.ranks)
    return read_curve(run_dir)


def print_checksum(path: Path, tp: int) -> None:
    """Of the codes and scales of the checkpoint's weights, as `tp` ranks make them."""
    reader = checkpoint.Reader(path)
    cfg = parse_config(reader.meta.config, str(path))
    mesh = share_model(init_mesh("cpu", 1), tp, num_kv_heads(cfg))
    model = Decoder(cfg.model, cfg.quant, ranks=ranks_of(mesh, sequence_parallel=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = shard_of(parameter)
            values = reader.read(name, "master", 0, parameter.numel(), shard)
            parameter.copy_(values.view(parameter.shape))
    set_strength(model, TERNARY)
    prepare_weights(model)
    checksum = hashlib.sha256()
    for _, layer in bit_linears(model):
        assert layer.prepared is not None and layer.prepared.codes is not None
        codes, scale = layer.prepared.codes
        parts = [(shard_of(layer.weight), codes)]
        if mesh.world_size > 1:
            parts = [parts[0]] * mesh.world_size
            dist.all_gather_object(parts, (shard_of(layer.weight), codes))
        whole = codes
        if parts[0][0] is not None:
            whole = torch.empty(parts[0][0].whole, dtype=torch.int8)
            for shard, part in parts:
                assert shard is not None
                shard.of(whole).copy_(part)
        checksum.update(whole.contiguous().numpy().tobytes() + scale.numpy().tobytes())
    if mesh.is_main:
        print(checksum.hexdigest())
    close_mesh()


def report(
    curves: dict[Layout, Curve], codes: dict[int, str], corpus_name: str, faulty: list[str]
) -> str:
    rows = []
    for layout in LAYOUTS:
        place = (
            f"| {layout.dtype} | {layout.ranks} | {layout.tp} | "
            f"{'yes' if layout.sequence_parallel else 'no'} | {layout.pp_name} | "
            f"{layout.ranks // (layout.tp * layout.pp)} | {layout.stage} | "
            f"{layout.checkpointing} | "
        )
        if layout == SINGLE[layout.dtype]:
            rows.append(place + "the single process ||||")
            continue
        single = curves[SINGLE[layout.dtype]]
        figures = [*differences(curves[layout], single).values()]
        figures.append(abs(curves[layout].valid_loss - single.valid_loss))
        rows.append(place + " | ".join(f"{f:.1e}" if f else "0" for f in figures) + " |")
    return TEXT.format(
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        commit=commit(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=", ".join(f"{name} {version}" for name, version in run.versions().items()),
        corpus=corpus_name,
        size=YARDSTICK.micro_batch_size,
        yardstick=", ".join(
            f"{d:.1e}" for d in differences(curves[YARDSTICK], curves[SINGLE["bf16"]]).values()
        ),
        steps=NUM_STEPS,
        transition=TRANSITION_STEP,
        ternary=TERNARY_STEP,
        clip=CLIP,
        rows="\n".join(rows),
        codes="\n".join(f"| {tp} | `{checksum[:32]}` |" for tp, checksum in codes.items()),
        faulty="\n".join(faulty) or "nothing",
        tolerances="\n".join(
            f"| {dtype} | " + " | ".join(f"{limit:.0e}" for limit in limits) + " |"
            for dtype, limits in TOLERANCES.items()
        ),
    )


TEXT = """\
# Tensor, sequence, pipeline and data parallel layouts train the same model

Written by `python tools/compare_layouts.py`: {date}, commit {commit}; {machine}; {versions}. Corpus
`{corpus}`, one CPU thread a rank, gloo.

Each row is one real launch (`bitscale train` under torchrun) of a 4-layer decoder of width 64, 4
heads and 2 key/value heads (at TP 4 two ranks hold each) on real text: {steps} steps, AdamW,
gradients clipped at {clip}, transition at step {transition}, linear λ ramp to step {ternary}. PP
with V is the schedule DualPipeV. The figures are the largest |difference| of the training loss to
the single process over the steps of a phase, in nats, and that of the final validation loss.

| dtype | ranks | TP | SP | PP | DP | ZeRO | recomputed | 16 bit | ramp | ternary | validation |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

Allowed (the command fails beyond it):

| dtype | 16 bit | ramp | ternary |
|---|---|---|---|
{tolerances}

In bf16 one process alone, with micro-batches of {size} sequences instead of 2, differs from itself
by {yardstick} in the three phases: no layout should differ by more.

[zero-equivalence.md](zero-equivalence.md) explains the size of these differences: sums of
floating-point gradients in another order, and, once λ > 0, single weights on the border between
two codes that take the other one.

## The same weights give the same codes, to the bit

Every number of tensor-parallel ranks reads the single process's checkpoint of step {ternary} and
quantizes it. SHA-256 of all codes and scales, put together from the ranks:

| TP | codes and scales |
|---|---|
{codes}

That outputs and integer sums at λ = 1 are bitwise equal too is asserted in
`tests/dist/test_parallel_layers.py`.

## A local scale is noticed

The same command then lets each rank take the scale of its own part of a matrix, in a run in fp32 at
TP 2 and in the comparison of codes. What it says:

```
{faulty}
```
"""

if __name__ == "__main__":
    sys.exit(main())
