"""Keep or reset Adam's state at the transition? Five paired seeds, measured, drawn, judged.

    python tools/optimizer_state.py --text /path/to/texts [--jobs 2] [--out docs/results]

For each seed one 16-bit trunk, which goes on in 16 bit; at its step 400 forks turn ternary under
{keep, reset} x {continue, rewarm the learning rate}, at once and with a ramp of λ. Every run is
`bitscale train`. Stop it when you like: finished runs are kept, the same command goes on and in
the end writes optimizer-state.md, .json and the figure. About 20 minutes of one idle CPU core.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bitscale import run
from bitscale.recorder import METRICS_NAME, format_duration, read_lines

sys.path.insert(0, str(Path(__file__).parent))
from optimizer_state_report import (
    AFTER_STEPS,
    FORK_STEP,
    RAMP_STEPS,
    REWARM_STEPS,
    SEEDS,
    SHAPES,
    Policy,
    policies,
    write_report,
)

CONFIG = f"""\
run: {{dir: unset}}
model: {{num_layers: 4, d_model: 128, num_heads: 4, num_kv_heads: 2, d_ff: 512}}
data: {{corpora: [{{path: unset}}], seq_len: 128}}
train:
  steps: {FORK_STEP + AFTER_STEPS}
  global_batch_size: 8
  micro_batch_size: 8
  dtype: fp32
  eval_batches: 64
optim: {{lr: 2e-3, schedule: constant, warmup: {{steps: {REWARM_STEPS}}}}}
engine: {{device: cpu, num_threads: 1}}
quant: {{kernel: auto}}
checkpoint: {{every: {FORK_STEP}, keep_every: {FORK_STEP}}}
log: {{every: 40, telemetry_every: 0, tensorboard: false}}
"""


class Cell(NamedTuple):
    """One run: the trunk of a seed, or (with a policy) a ternary fork of it."""

    seed: int
    shape: str = ""
    policy: Policy | None = None

    @property
    def name(self) -> str:
        policy = self.policy
        kind = "trunk" if policy is None else f"{self.shape}-{policy.state}-{policy.lr}"
        return f"seed{self.seed}/{kind}"

    def overrides(self, work: Path) -> list[str]:
        keys = [f"train.seed={self.seed}", f"data.seed={self.seed}"]
        if self.policy is None:
            return keys
        ramp = {"jump": "none", "ramp": "linear"}[self.shape]
        keys += [
            f"transition.at.step={FORK_STEP}",
            f"transition.ramp.shape={ramp}",
            f"transition.ramp.over.steps={RAMP_STEPS if self.shape == 'ramp' else 0}",
            f"transition.optimizer_state={self.policy.state}",
            f"transition.lr={self.policy.lr}",
            f"transition.lr_rewarm.steps={REWARM_STEPS}",
        ]
        trunk = work / Cell(self.seed).name / "checkpoints" / f"step-{FORK_STEP:08d}"
        return [*keys, "--resume", str(trunk)]


class Progress:
    """Counts finished runs of all threads and says how long the rest will take."""

    def __init__(self, total: int) -> None:
        self._lock = threading.Lock()
        self._total, self._done, self._trained = total, 0, 0
        self._begin = time.perf_counter()

    def add(self, name: str, *, trained: bool) -> None:
        with self._lock:
            self._done += 1
            self._trained += trained
            seconds = time.perf_counter() - self._begin
            left = (self._total - self._done) * seconds / max(self._trained, 1)
            eta = f", ETA {format_duration(left)}" if self._trained else ""
            how = "finished" if trained else "was finished before"
            print(f"[{self._done}/{self._total}] {name} {how}{eta}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="file or folder of text")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    parser.add_argument("--work", type=Path, default=Path("runs/optimizer-state"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    if not args.report:
        train_cells(args.text, args.work, args.jobs)
    provenance = record_provenance(args.work)
    for path in write_report(args.work, args.out, provenance):
        print(f"wrote {path}")
    return 0


def train_cells(text: Path, work: Path, jobs: int) -> None:
    """Every run that is not finished yet."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "config.yaml").write_text(CONFIG, encoding="utf-8")
    corpus = prepare(text, work / "corpus")
    progress = Progress(len(SEEDS) * (1 + len(SHAPES) * len(policies())))
    groups = [[Cell(seed)] + [Cell(seed, SHAPES[0], p) for p in policies()] for seed in SEEDS]
    groups += [[Cell(seed, s, p) for p in policies()] for s in SHAPES[1:] for seed in SEEDS]
    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[None]] = []
        for index, group in enumerate(groups):
            # Those of the first shape have trained the trunks of the others.
            trunk = futures[index % len(SEEDS)] if index >= len(SEEDS) else None
            futures.append(pool.submit(train_all, group, corpus, work, progress, trunk))
        for future in futures:
            future.result()


def prepare(text: Path, directory: Path) -> Path:
    if not (directory / "corpus.json").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        command = ["prepare", str(text), "--out", str(directory), "--vocab-size", "512"]
        call([*command, "--split", "0.97,0.03,0"])
    return directory


def train_all(
    cells: list[Cell], corpus: Path, work: Path, progress: Progress, after: Future[None] | None
) -> None:
    if after is not None:
        after.result()
    for cell in cells:
        trained = not is_finished(work / cell.name)
        if trained:
            train(cell, corpus, work)
        progress.add(cell.name, trained=trained)


def train(cell: Cell, corpus: Path, work: Path) -> None:
    run_dir = work / cell.name
    shutil.rmtree(run_dir, ignore_errors=True)
    command = ["train", str(work / "config.yaml"), f"run.dir={run_dir}"]
    call([*command, f"data.corpora=[{{path: {corpus}}}]", *cell.overrides(work)])


def call(arguments: list[str]) -> None:
    """`bitscale` with these arguments; raises with its output if it fails."""
    command = [sys.executable, "-m", "bitscale.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def is_finished(run_dir: Path) -> bool:
    metrics = run_dir / METRICS_NAME
    return metrics.is_file() and any(
        line.get("event") == "finished" for _, _, line in read_lines(metrics)
    )


def record_provenance(work: Path) -> str:
    """Where and with what the runs were made: written once, when the last of them is done."""
    file = work / "provenance.json"
    if not file.is_file():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        folder = Path(__file__).parent
        git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        versions = ", ".join(f"{name} {version}" for name, version in run.versions().items())
        date = datetime.datetime.now(tz=datetime.UTC).date()
        machine = f"{platform.machine()}, {os.cpu_count()} cores (busy with other work)"
        text = f"{date}, commit {git.stdout.strip() or 'unknown'}; {machine}; {versions}"
        file.write_text(json.dumps(text), encoding="utf-8")
    return str(json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
