#!/usr/bin/env python
"""Kill runs with SIGKILL at many moments, resume them, and compare bit for bit.

    python tools/kill_resume.py --minutes 12 --seed 1 --out docs/results/kill-and-resume.md

Every round takes one setting (ranks, ZeRO stage, dtype), kills one run of 40 steps several times,
lets it finish and compares it with an uninterrupted one (tests/e2e/runs.py says what is compared).
Exit code 1 if anything differs.
"""

import argparse
import datetime
import itertools
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

from bitscale.run import versions
from kill_points import MOMENTS, KillPoint, Process, random_aims, run_with_kills
from preloaded import Session, preload
from runs import (
    differences,
    prepare_corpus,
    python_text,
    start,
    train,
    train_command,
    write_config,
)

PHASES = ("16 bit", "ramp", "ternary")
FORKED_STARTUP_SECONDS = 0.5
MOMENT_NAMES = {
    "start-up": "start-up, up to the first step",
    "step": "in or between steps",
    "evaluation": "in an evaluation",
    "save": "while `.step-N.partial` is written",
    "publication": "after its rename, before `latest` names it",
    "pruning": "while an old checkpoint is deleted",
}
INTRODUCTION = """\
Compared: every field of every `train` and `valid` line of metrics.jsonl, zeros and scale of every
ternary layer, and all tensors (fp32 masters, Adam moments, RNG state) and metadata of the last two
checkpoints. Each run has 40 steps: 16 bit until step 16, the λ ramp until 27, then ternary; a
checkpoint every 5, an evaluation every 8. A killed run is started again with `--resume auto`, and
killed again, until it finishes.

## Where the kills hit

Judged from the files that each kill left, not from where it was aimed.
"""
SETTINGS_INTRODUCTION = """\
## Settings

Whole processes are started as a user does (`bitscale train`, `torchrun`), which takes 5 s a rank on
an idle machine; forked ones begin after the imports (`tests/e2e/preloaded.py`).
"""


class Setting(NamedTuple):
    num_ranks: int
    zero_stage: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.num_ranks} rank(s), ZeRO-{self.zero_stage}, {self.dtype}"

    @property
    def launcher(self) -> str:
        return "plain" if self.num_ranks == 1 else "torchrun"

    @property
    def overrides(self) -> list[str]:
        return [f"engine.zero_stage={self.zero_stage}", f"train.dtype={self.dtype}"]


SETTINGS = tuple(
    Setting(num_ranks, stage, dtype)
    for stage, dtype in ((1, "bf16"), (3, "bf16"), (0, "fp32"), (2, "bf16"))
    for num_ranks in (1, 2)
)


class Round(NamedTuple):
    setting: Setting
    forked: bool
    points: list[KillPoint]
    differences: list[str]


class Reference(NamedTuple):
    run_dir: Path
    wall_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description="kill, resume, compare")
    parser.add_argument("--minutes", type=float, default=12.0, help="no round begins later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=6, help="kills aimed at each run")
    parser.add_argument("--out", type=Path, help="also write the result there, as Markdown")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        rounds = _rounds(Path(folder), args.seed, args.kills, 60 * args.minutes)
    report = _report(rounds, (time.monotonic() - begin) / 60)
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")
    return 1 if any(done.differences for done in rounds) else 0


def _rounds(folder: Path, seed: int, num_kills: int, seconds: float) -> list[Round]:
    """Half of the time with whole processes, the rest with forked ones."""
    preload()
    rng = random.Random(seed)
    config = write_config(folder / "run.yaml", prepare_corpus(python_text(), folder / "corpus"))
    references: dict[Setting, Reference] = {}
    rounds: list[Round] = []
    begin = time.monotonic()
    for forked, deadline in ((False, begin + seconds / 2), (True, begin + seconds)):
        for setting in itertools.cycle(SETTINGS):
            if time.monotonic() > deadline:
                break
            if setting not in references:
                run_dir = folder / f"reference-{len(references)}"
                references[setting] = _uninterrupted(config, setting, run_dir)
            rounds.append(_round(config, setting, forked, references[setting], rng, num_kills))
            print(_line(rounds[-1]), flush=True)
    return rounds


def _uninterrupted(config: Path, setting: Setting, run_dir: Path) -> Reference:
    begin = time.monotonic()
    train(setting.launcher, config, f"run.dir={run_dir}", *setting.overrides)
    return Reference(run_dir, time.monotonic() - begin)


def _round(
    config: Path,
    setting: Setting,
    forked: bool,
    reference: Reference,
    rng: random.Random,
    num_kills: int,
) -> Round:
    run_dir, log = config.parent / "run", config.parent / "log"
    startup_seconds = FORKED_STARTUP_SECONDS if forked else reference.wall_seconds
    aims = random_aims(rng, num_kills, startup_seconds, several_ranks=setting.num_ranks > 1)
    arguments = [str(config), f"run.dir={run_dir}", *setting.overrides, "--resume", "auto"]

    def begin() -> Process:
        if forked:
            return Session(arguments, setting.num_ranks, log)
        return start(train_command(setting.launcher, *arguments), log)

    points = run_with_kills(begin, run_dir, log, aims)
    done = Round(setting, forked, points, differences(reference.run_dir, run_dir))
    shutil.rmtree(run_dir)
    return done


def _line(done: Round) -> str:
    hits = ", ".join(f"{point.moment} {point.step}" for point in done.points)
    verdict = "; ".join(done.differences[:3]) or "bitwise equal"
    processes = "forked" if done.forked else "whole"
    return f"{done.setting.name}, {processes}: killed at {hits}: {verdict}"


def _report(rounds: list[Round], minutes: float) -> str:
    points = [point for done in rounds for point in done.points]
    unequal = [done for done in rounds if done.differences]
    verdict = (
        f"**{len(unequal)} of {len(rounds)} runs ended different**"
        if unequal
        else f"all {len(rounds)} runs ended bitwise equal to the uninterrupted ones"
    )
    head = f"# Kill and resume\n\n{len(points)} SIGKILLs in {len(rounds)} runs: {verdict}.\n"
    num_single = sum(point.one_rank for point in points)
    single = f"In {num_single} of them one rank of two was killed; the launcher ended the other.\n"
    sections = [head, INTRODUCTION, _moments_table(points), single]
    sections += [SETTINGS_INTRODUCTION, _settings_table(rounds)]
    for done in unequal:
        bullets = [f"- {difference}" for difference in done.differences[:10]]
        sections.append("\n".join([f"Different in {done.setting.name}:", "", *bullets, ""]))
    return "\n".join([*sections, _provenance(minutes)])


def _moments_table(points: list[KillPoint]) -> str:
    count = Counter((point.moment, point.phase) for point in points)
    lines = [f"| moment | {' | '.join(PHASES)} | all |", f"|---|{'---:|' * (len(PHASES) + 1)}"]
    for moment in MOMENTS:
        total = sum(count[moment, phase] for phase in ("", *PHASES))
        cells = [str(count[moment, phase]) for phase in PHASES]
        cells = [""] * len(PHASES) if moment == "start-up" else cells
        lines.append(f"| {MOMENT_NAMES[moment]} | {' | '.join(cells)} | {total} |")
    sums = [str(sum(point.phase == phase for point in points)) for phase in PHASES]
    lines.append(f"| all | {' | '.join(sums)} | {len(points)} |")
    return "\n".join(lines) + "\n"


def _settings_table(rounds: list[Round]) -> str:
    lines = ["| setting | processes | runs | kills | bitwise equal |", "|---|---|---:|---:|---|"]
    for setting, forked in itertools.product(SETTINGS, (False, True)):
        mine = [done for done in rounds if (done.setting, done.forked) == (setting, forked)]
        if mine:
            num_kills = sum(len(done.points) for done in mine)
            equal = f"{sum(not done.differences for done in mine)} of {len(mine)}"
            cells = [setting.name, "forked" if forked else "whole", len(mine), num_kills, equal]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _provenance(minutes: float) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""\
## Provenance

{today}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, one thread a rank;
{found}.
{minutes:.0f} minutes by

```
python tools/kill_resume.py {" ".join(sys.argv[1:])}
```

The seed decides the aims; where they hit depends on the machine's load as well. CI runs seven kills
by the same code (`tests/e2e/test_kill_and_resume.py`).
"""


if __name__ == "__main__":
    sys.exit(main())
