"""Do integer gradients of 24, 16 or 8 bits train as well as floating-point ones? Measure it.

    python tools/gradient_bits_gate.py [--seeds 0,1,2] [--corpus DIR] [--steps 250]

Trains configs/quickstart.yaml (1.1M parameters, 16 bit, then ternary) with quant.kernel=cpu, once
for each width of gradients and each seed (initial weights and order of the text), and compares the
final validation losses pair by pair. A run that has finished is kept: start again after an
interruption. Writes docs/results/gradient-bits.md. Exit code 1 if a width misses the gate: a mean
loss more than 0.01 nats above that of floating-point gradients. About 35 minutes on two idle cores.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from bitscale import run
from bitscale.recorder import METRICS_NAME, read_lines
from compare_zero import commit, is_finished, prepare

WIDTHS = ("null", "24", "16", "8")
GATE_NATS = 0.01
ROOT = Path(__file__).parents[1]
TEXT = """\
# Integer gradients: the convergence gate

`quant.gradient_bits` rounds the gradients of ternary layers to integers ([kernels](../kernels.md)).
24 and 16 bits are close to fp32; 8 bits are off by about 1% a product
([errors](../benchmarks/linear.md)), rounded stochastically. The gate: over the same seeds, the mean
final validation loss may lie at most {gate} nats above that of floating-point gradients.

`configs/quickstart.yaml`, {steps} steps, {corpus}, `quant.kernel=cpu`:

| gradient bits | {seeds} | mean difference, nats | standard error | gate |
|---|{rules}---|---|---|
{rows}

Each seed column: final validation loss in nats. The difference is paired: to floating-point
gradients of the same seed (initial weights and order of the text). {count} seeds give a standard
error, not a proof.

{date}, {machine}, {versions}, commit {commit}; `python tools/gradient_bits_gate.py`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--corpus", type=Path, help="default: Python's documentation, prepared")
    parser.add_argument("--work", type=Path, default=Path("runs/gradient-bits"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/gradient-bits.md")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = args.corpus or prepare(args.work / "corpus")
    cells = [(bits, seed) for seed in seeds for bits in WIDTHS]
    losses = {cell: train(*cell, args.steps, corpus, args.work) for cell in tqdm(cells)}
    above = {
        bits: [losses[bits, seed] - losses["null", seed] for seed in seeds] for bits in WIDTHS[1:]
    }
    args.out.write_text(report(losses, above, seeds, args), encoding="utf-8")
    print(f"wrote {args.out}")
    missed = [bits for bits, each in above.items() if not statistics.mean(each) <= GATE_NATS]
    print("\n".join(f"{bits} bits miss the gate" for bits in missed) or "every width passes")
    return 1 if missed else 0


def train(bits: str, seed: int, steps: int, corpus: Path, work: Path) -> float:
    """Final validation loss, nats."""
    run_dir = work / f"bits-{bits}-seed-{seed}"
    if not is_finished(run_dir):
        settings = [
            f"run.dir={run_dir}",
            f"data.corpora=[{{path: {corpus}}}]",
            f"data.seed={seed}",
            f"train.seed={seed}",
            f"train.steps={steps}",
            "train.eval_every=0",
            "quant.kernel=cpu",
            f"quant.gradient_bits={bits}",
            "log.tensorboard=false",
        ]
        config = str(ROOT / "configs/quickstart.yaml")
        command = [sys.executable, "-m", "bitscale.cli.main", "train", config, *settings]
        log_file = work / f"{run_dir.name}.log"
        with log_file.open("w") as log:
            done = subprocess.run([*command, "--resume", "auto"], stdout=log, stderr=log)
        if done.returncode:
            sys.exit(f"{run_dir.name} failed: see {log_file}")
    lines = [line for _, _, line in read_lines(run_dir / METRICS_NAME)]
    return float([line["loss"] for line in lines if line["kind"] == "valid"][-1])


def report(
    losses: dict[tuple[str, int], float],
    above: dict[str, list[float]],
    seeds: list[int],
    args: argparse.Namespace,
) -> str:
    rows = []
    for bits in WIDTHS:
        each = " | ".join(f"{losses[bits, seed]:.4f}" for seed in seeds)
        name = "floating point" if bits == "null" else bits
        if bits == "null":
            rows.append(f"| {name} | {each} | | | |")
            continue
        mean = statistics.mean(above[bits])
        error = statistics.stdev(above[bits]) / len(seeds) ** 0.5 if len(seeds) > 1 else 0.0
        verdict = "passed" if mean <= GATE_NATS else "missed"
        rows.append(f"| {name} | {each} | {mean:+.4f} | {error:.4f} | {verdict} |")
    versions = run.versions()
    return TEXT.format(
        gate=GATE_NATS,
        steps=args.steps,
        corpus=args.corpus or "the documentation inside Python",
        seeds=" | ".join(f"seed {seed}" for seed in seeds),
        rules="---|" * len(seeds),
        rows="\n".join(rows),
        count=len(seeds),
        date=datetime.date.today().isoformat(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        versions=", ".join(f"{name} {versions[name]}" for name in ("bitscale", "torch", "python")),
        commit=commit(),
    )


if __name__ == "__main__":
    sys.exit(main())
