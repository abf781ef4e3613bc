"""Save at every layout and resume at every other, through the transition; write what differs.

    python tools/compare_resume.py [--text FILE_OR_FOLDER] [--out docs/results/resume-matrix.md]

Ranks are processes on gloo, one CPU thread each. Exit code 1 if a restored state is not equal to
the bit, a resume at the same layout is not, or another leaves its tolerance. About five minutes on
two idle cores.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "dist"))
sys.path.insert(0, str(Path(__file__).parent))

from resume_runs import (
    SAVED_STEPS,
    Difference,
    Kept,
    Layout,
    resume_runs,
    run_config,
    save_run,
)

from bitscale import run
from bitscale.recorder import format_duration
from compare_zero import commit
from tiny_runs import TERNARY_STEP, TRANSITION_STEP
from world import World

ROOT = Path(__file__).parents[1]
LAYOUTS: dict[Layout, str | dict[str, float]] = {  # with the policy of the run that saves there
    Layout(1): "keep",
    Layout(2, stage=2): {"scale": 0.3},
    Layout(2, stage=3): "keep_second_moment",
    Layout(4, stage=3, tp=2, sequence_parallel=True): "reset",
    Layout(4, tp=2, pp=2): "keep",
}
LOSS_TOLERANCE = 5e-6  # nats; one unit in the last place of an fp32 loss of 6 is 4.8e-7
MODEL = {"vocab_size": 512, "num_layers": 2, "d_model": 64, "d_ff": 128}
CHANGES: dict[str, dict[str, Any]] = {"model": MODEL, "data": {"seq_len": 64}}
SECONDS = 1800.0  # for one layout, on a busy machine
Results = dict[Layout, dict[Layout, list[Difference]]]  # by where it was saved, then resumed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="builtin:python-docs", help="real text to train on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/resume-matrix.md")
    parser.add_argument("--work", type=Path, default=Path("runs/compare-resume"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    corpus = prepare(args.text, args.work / "corpus")
    results = compare(args.work.resolve(), corpus.resolve())
    args.out.write_text(render(results, args.text), encoding="utf-8")
    print(f"wrote {args.out}")
    wrong = faults(results)
    print("\n".join(wrong) or "everything is equal, or within its tolerance")
    return 1 if wrong else 0


def prepare(text: str, directory: Path) -> Path:
    """The prefix of a training shard of `text`."""
    size = str(MODEL["vocab_size"])
    command = ["prepare", text, "--out", str(directory), "--vocab-size", size, "--split", "1,0,0"]
    subprocess.run([sys.executable, "-m", "bitscale.cli.main", *command], check=True)
    return directory / "train"


def compare(work: Path, corpus: Path) -> Results:
    """Every run once without a break, then every checkpoint at every layout."""
    begin, done = time.perf_counter(), 0

    def say(text: str) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - begin) / done * (2 * len(LAYOUTS) - done)
        print(f"{text}; ETA {format_duration(left)}", flush=True)

    sizes = {layout.world_size for layout in LAYOUTS}
    worlds = {size: World(size, start_seconds=SECONDS) for size in sizes}
    kept: dict[Layout, Kept] = {}
    for index, (layout, policy) in enumerate(LAYOUTS.items()):
        arguments = (run_config(layout, policy, **CHANGES), corpus, work / f"run{index}")
        world = worlds[layout.world_size]
        kept[layout] = world.run(save_run, *arguments, seconds=SECONDS)[0]
        say(f"saved at {layout.name}")
    results: Results = {layout: {} for layout in LAYOUTS}
    for here in LAYOUTS:
        arguments = (run_config(here, "keep", **CHANGES), corpus, list(kept.values()))
        rows = worlds[here.world_size].run(resume_runs, *arguments, seconds=SECONDS)[0]
        for there, differences in zip(LAYOUTS, rows, strict=True):
            results[there][here] = differences
        say(f"resumed at {here.name}")
    for world in worlds.values():
        world.close()
    return results


def faults(results: Results) -> list[str]:
    """What is not as promised, in words."""
    wrong = []
    for there, row in results.items():
        for here, differences in row.items():
            for d in differences:
                where = f"{there.name} -> {here.name}, {d.moment}"
                if d.restored or d.begun:
                    wrong.append(f"{where}: not equal to the bit: {d.restored or d.begun}")
                if here == there and (d.loss, d.masters, d.moments) != (0.0, 0.0, 0.0):
                    wrong.append(f"{where}: the same layout goes on otherwise: {d}")
                if not d.loss <= LOSS_TOLERANCE:
                    wrong.append(f"{where}: the first loss differs by {d.loss:.1e}")
    return wrong


def render(results: Results, text: str) -> str:
    everything = [d for row in results.values() for ds in row.values() for d in ds]
    exact = sum(not d.restored and not d.begun for d in everything)
    versions = ", ".join(f"{name} {version}" for name, version in run.versions().items())
    return TEXT.format(
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        commit=commit(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=versions,
        text=text,
        moments="; ".join(f"{name}: after step {step}" for name, step in SAVED_STEPS.items()),
        transition=TRANSITION_STEP,
        ternary=TERNARY_STEP,
        exact=exact,
        total=len(everything),
        tolerance=LOSS_TOLERANCE,
        losses=table(results, "loss"),
        states=table(results, "moments"),
        by_moment="\n".join(moment_row(results, moment) for moment in SAVED_STEPS),
        verdict="; ".join(faults(results)) or "nothing was outside",
    )


def table(results: Results, field: str) -> str:
    """The largest difference over the moments of a run: rows saved, columns resumed."""
    lines = ["| saved at, policy | " + " | ".join(here.name for here in LAYOUTS) + " |"]
    lines.append("|---" * (len(LAYOUTS) + 1) + "|")
    for there, policy in LAYOUTS.items():
        name = policy if isinstance(policy, str) else f"scale {policy['scale']}"
        cells = [max(getattr(d, field) for d in results[there][here]) for here in LAYOUTS]
        shown = [f"{cell:.1e}" if cell else "0" for cell in cells]
        lines.append(f"| {there.name}; {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def moment_row(results: Results, moment: str) -> str:
    """Over all pairs of different layouts."""
    rows = [
        d
        for there, row in results.items()
        for here, differences in row.items()
        for d in differences
        if here != there and d.moment == moment
    ]
    cells = [max(getattr(d, field) for d in rows) for field in ("loss", "masters", "moments")]
    return f"| {moment} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |"


TEXT = """\
# Saved at one layout, resumed at another, through the transition

Written by `python tools/compare_resume.py --text TEXT`: {date}, commit {commit}; {machine};
{versions}. Text: `{text}`.

A decoder of 2 layers, width 64 and vocabulary 512 trains in fp32 with AdamW, gradients clipped;
the transition is at step {transition}, λ = 1 from step {ternary}. Each row below is one run that
is never interrupted and keeps four checkpoints ({moments}). Each column resumes all of them on
other ranks and takes one step. The policy for the optimizer's state acts at the transition: in
the resumed run, if it resumes there.

**Restored to the bit**: in {exact} of {total} resumes every parameter's master, both moments and
step count, gathered from all ranks by name, equal what the uninterrupted run held, and again
after the policy has acted.

## The first step's loss
Largest |difference| to the uninterrupted run over the four checkpoints, in nats. The diagonal is
the same layout, and has to be 0.

{losses}

## Moments after that step
Largest |difference| / |value| (2-norms) of a parameter's moments. 0 on the diagonal: bit for bit
the run that was not interrupted.

{states}

## By the moment of the resume
Largest differences between two different layouts.

| resumed | loss | masters after the step | moments after the step |
|---|---|---|---|
{by_moment}

What differs is the order of summation: the same weights and batches, gradients added up by other
ranks. Allowed for the loss: {tolerance:.0e}; {verdict}. bf16, and ZeRO 0 to 3 on 1, 2 and 4 ranks
each from each, are in `tests/dist/test_layouts.py`; a part of this table runs in CI
(`tests/dist/test_resume_matrix.py`).
"""

if __name__ == "__main__":
    sys.exit(main())
