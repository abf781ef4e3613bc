"""How a training step grows: with layers, width, tokens, and ranks that share it in each way.

    python tools/bench_scale.py --json scale.json --figure scale.png
    python tools/bench_scale.py --ranks 1 --json one.json       # only what needs one process
    python tools/bench_scale.py --draw one.json two.json --figure scale.png

For each point, in 16 bit and ternary: processor seconds of a step (of the busiest rank, one thread
each; medians), the most bytes of tensors alive at once, and bytes sent by a rank, beside what
`bitscale plan` predicts for a "cpu" of its table: the shortest time at peak rates without waiting
for others, memory, bytes. All points but those of "tokens" accumulate micro-batches of 2 sequences
up to 8; there a step is one micro-batch. Ranks are processes of this machine (gloo): their
wall-clock time says nothing, as they share its cores. Some minutes.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from count_bytes import CountSent, PeakBytes
from tqdm import tqdm

from bitscale.config import Config, num_kv_heads, parse_config
from bitscale.data.batches import MicroBatch
from bitscale.engine import TrainEngine, make_engine
from bitscale.mesh import Mesh, close_mesh, init_mesh, share_model
from bitscale.model.bitlinear import set_strength
from bitscale.model.cost import Phase
from bitscale.model.stages import make_model
from bitscale.plan.gpus import find_gpu
from bitscale.plan.layout import Cluster, Layout, make_layout
from bitscale.plan.memory import memory
from bitscale.plan.speed import bound
from bitscale.plan.wire import traffic
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY, Strength
from provenance import provenance

PACKAGES = ("torch", "deepspeed", "megatron-core")
WARM_UPS = 2
PHASES: dict[Phase, Strength] = {"16 bit": SIXTEEN_BIT, "ternary": TERNARY}
BASE: dict[str, Any] = {
    "run": {"dir": "unused"},
    "model": {
        "vocab_size": 1024, "num_layers": 4, "d_model": 256, "num_heads": 4, "d_ff": 704,
        "tie_embeddings": False,
    },
    "data": {"corpora": [{"path": "unused"}], "seq_len": 256},
    "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "dtype": "fp32"},
    "optim": {"lr": 1e-4},
    "engine": {
        "device": "cpu", "num_threads": 1,
        # DeepSpeed's default bucket of 2 GB would hide everything else.
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 1_000_000}},
    },
    "quant": {"kernel": "cpu"},
}  # fmt: skip
# Panel -> label of a point -> (ranks, what it changes).
POINTS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "layers": {str(n): (1, {"model": {"num_layers": n}}) for n in (1, 2, 4, 8)},
    "width": {str(d): (1, {"model": {"d_model": d, "d_ff": d * 11 // 4}}) for d in (128, 256, 512)},
    "tokens": {
        str(256 * n): (1, {"train": {"global_batch_size": n, "micro_batch_size": n}})
        for n in (1, 2, 4, 8)
    },
    "ranks": {
        "1": (1, {}),
        **{f"tp {n}": (n, {"parallel": {"tp": n}}) for n in (2, 4)},
        **{f"pp {n}": (n, {"parallel": {"pp": n}}) for n in (2, 4)},
        **{f"dp {n}": (n, {}) for n in (2, 4)},
    },
}
MEASURES = {
    "seconds": ("processor seconds a step", 1.0),
    "peak_bytes": ("MiB alive", 2.0**20),
    "sent": ("MiB sent by a rank", 2.0**20),
}


# --- One point, on every rank ---


def config(changes: dict[str, Any]) -> Config:
    tree = {key: dict(value) for key, value in BASE.items()}
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return parse_config(tree, "bench_scale")


def measure(mesh: Mesh, cfg: Config, repeats: int) -> dict[Phase, dict[str, Any]]:
    """By phase: this rank's medians, and the plan's figures for it."""
    forget_groups()
    gc.collect()
    gc.freeze()  # what is there now is not this point's
    mesh = share_model(mesh, cfg.parallel.tp, num_kv_heads(cfg), cfg.parallel.pp)
    engine = make_engine(cfg, make_model(cfg, mesh), mesh)
    batches = random_batches(cfg, mesh)
    layout = make_layout(cfg, Cluster(1, mesh.world_size, find_gpu("cpu")))
    found: dict[Phase, dict[str, Any]] = {}
    for phase, strength in PHASES.items():
        set_strength(engine.module, strength)
        times = [step_seconds(engine, batches) for _ in range(WARM_UPS + repeats)][WARM_UPS:]
        with CountSent() as sent:
            step_seconds(engine, batches)
        gc.collect()
        with PeakBytes() as held:
            step_seconds(engine, batches)
        found[phase] = {
            "seconds": statistics.median(times),
            "all_seconds": times,
            "peak_bytes": held.peak,
            "sent": sent.num_bytes,
            "planned": planned(layout, mesh.pp_rank, phase),
        }
    return found


def forget_groups() -> None:
    """DeepSpeed remembers the tensor-parallel groups of an engine for the next."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups.mpu = None  # type: ignore[attr-defined]


def random_batches(cfg: Config, mesh: Mesh) -> list[MicroBatch]:
    assert cfg.model.vocab_size is not None
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    size = cfg.train.micro_batch_size
    count = cfg.train.global_batch_size // (size * mesh.dp_size)
    shape = (count, size, cfg.data.seq_len + 1)
    ids = torch.randint(cfg.model.vocab_size, shape, generator=generator)
    return [MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None) for rows in ids]


def step_seconds(engine: TrainEngine, batches: list[MicroBatch]) -> float:
    begun = time.process_time()
    engine.train_step(batches, lr=1e-4, weight_decay=0.1)
    return time.process_time() - begun


def planned(layout: Layout, stage_index: int, phase: Phase) -> dict[str, float]:
    stage, limit = layout.stages[stage_index], bound(layout, phase)
    busy = max(limit.seconds["compute"], limit.seconds["memory"]) / (1 + layout.bubble)
    return {
        "seconds": busy,
        "peak_bytes": memory(layout, stage, phase).peak,
        "sent": sum(t.sent for t in traffic(layout, stage, phase)),
    }


def work(num_ranks: int, repeats: int, out: Path) -> None:
    """Every point of so many ranks, in a process of each rank; rank 0 writes the largest of the
    ranks' figures (of the plan's likewise)."""
    mesh = init_mesh("cpu", 1)
    points = [
        (panel, label, changes)
        for panel, of_panel in POINTS.items()
        for label, (ranks, changes) in of_panel.items()
        if ranks == num_ranks
    ]
    found: dict[str, dict[str, Any]] = {}
    for panel, label, changes in tqdm(points, desc=f"{num_ranks} ranks", disable=mesh.rank > 0):
        ranks = mesh.gather_objects(measure(mesh, config(changes), repeats))
        found.setdefault(panel, {})[label] = {phase: largest(ranks, phase) for phase in PHASES}
        if mesh.is_main:  # what is there survives an interruption
            out.write_text(json.dumps(found))
    close_mesh()


def largest(ranks: list[dict[Phase, dict[str, Any]]], phase: Phase) -> dict[str, Any]:
    of_ranks = [rank[phase] for rank in ranks]
    figures: dict[str, Any] = {name: max(one[name] for one in of_ranks) for name in MEASURES}
    plan = {name: max(one["planned"][name] for one in of_ranks) for name in MEASURES}
    times = [one["all_seconds"] for one in of_ranks]
    return figures | {"planned": plan, "all_seconds": times}


# --- All points ---


def run(num_ranks: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"{num_ranks}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *launcher, __file__, "--repeats", str(args.repeats)]
    subprocess.run([*command, "--work", str(num_ranks), "--json", str(out)], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The panels of several runs, their points in the order of POINTS."""
    return {
        panel: {
            label: part[panel][label]
            for label in of_panel
            for part in parts
            if label in part.get(panel, {})
        }
        for panel, of_panel in POINTS.items()
    }


def table(panels: dict[str, Any]) -> str:
    lines = [
        "| | | step s, 16 bit | ternary | over plan | MiB, ternary | planned | "
        "MiB sent, 16 bit | ternary | planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    mib = 2**20
    for panel, points in panels.items():
        for label, phases in points.items():
            plain, ternary = phases["16 bit"], phases["ternary"]
            plan = ternary["planned"]
            lines.append(
                f"| {panel} | {label} | {plain['seconds']:.3f} | {ternary['seconds']:.3f} | "
                f"{ternary['seconds'] / plan['seconds']:.1f}x | "
                f"{ternary['peak_bytes'] / mib:.1f} | {plan['peak_bytes'] / mib:.1f} | "
                f"{plain['sent'] / mib:.2f} | {ternary['sent'] / mib:.2f} | "
                f"{plan['sent'] / mib:.2f} |"
            )
    return "\n".join(lines)


def draw(panels: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(MEASURES), len(panels), figsize=(13, 8), sharex="col", squeeze=False
    )
    for column, (panel, points) in enumerate(panels.items()):
        labels = list(points)
        for row, (name, (title, unit)) in enumerate(MEASURES.items()):
            axis = axes[row][column]
            for phase, colour in zip(PHASES, ("tab:blue", "tab:orange"), strict=True):
                measured = [points[label][phase][name] / unit for label in labels]
                plan = [points[label][phase]["planned"][name] / unit for label in labels]
                axis.plot(labels, measured, "o-", color=colour, label=f"{phase}, measured")
                axis.plot(labels, plan, "x--", color=colour, label=f"{phase}, planned")
            axis.set_ylim(bottom=0)
            if name == "sent" and all(ranks == 1 for ranks, _ in POINTS[panel].values()):
                axis.text(0.5, 0.5, "one rank: none", ha="center", transform=axis.transAxes)
            if column == 0:
                axis.set_ylabel(title)
            if row == len(MEASURES) - 1:
                axis.set_xlabel(panel)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write figures and provenance here")
    parser.add_argument("--figure", type=Path, help="draw them here (PNG)")
    parser.add_argument("--draw", type=Path, nargs="+", help="take figures of earlier runs")
    parser.add_argument("--note", default="", help="on the state of the machine, for the records")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.work:
        work(args.work, args.repeats, args.json)
        return 0
    if args.draw:
        runs = [json.loads(path.read_text()) for path in args.draw]
        origins = [origin for run in runs for origin in run["provenance"]]
        panels = merge([run["panels"] for run in runs])
    else:
        load = [os.getloadavg()]
        with tempfile.TemporaryDirectory() as folder:
            panels = merge([run(ranks, args, Path(folder)) for ranks in args.ranks])
        load.append(os.getloadavg())
        origin = provenance("CPU", PACKAGES) | {"note": args.note, "load_average": load}
        origins = [origin]
    print(table(panels))
    if args.json:
        args.json.write_text(json.dumps({"provenance": origins, "panels": panels}, indent=1) + "\n")
    if args.figure:
        draw({name: points for name, points in panels.items() if points}, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
