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

from kill_points import MOMENTS, KillPoint, random_aims, run_with_kills
from runs import differences, prepare_corpus, python_text, train, train_command, write_config

from bitscale.run import versions

PHASES = ("16 bit", "ramp", "ternary")


class Setting(NamedTuple):
    launcher: str
    zero_stage: int
    dtype: str

    @property
    def name(self) -> str:
        ranks = "1 rank" if self.launcher == "plain" else f"2 ranks ({self.launcher})"
        return f"{ranks}, ZeRO-{self.zero_stage}, {self.dtype}"

    @property
    def overrides(self) -> list[str]:
        return [f"engine.zero_stage={self.zero_stage}", f"train.dtype={self.dtype}"]


class Round(NamedTuple):
    setting: Setting
    points: list[KillPoint]
    differences: list[str]


SETTINGS = (
    Setting("plain", 1, "bf16"),
    Setting("torchrun", 1, "bf16"),
    Setting("plain", 3, "bf16"),
    Setting("torchrun", 3, "bf16"),
    Setting("plain", 0, "fp32"),
    Setting("torchrun", 0, "fp32"),
    Setting("plain", 2, "bf16"),
    Setting("torchrun", 2, "bf16"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="begin no round after that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=6, help="kills aimed at each run")
    parser.add_argument("--out", type=Path, help="also write the result there, as Markdown")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        rounds = _rounds(Path(folder), args.seed, args.kills, begin + 60 * args.minutes)
    minutes = (time.monotonic() - begin) / 60
    report = _report(rounds, minutes, args.seed)
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")
    return 1 if any(done.differences for done in rounds) else 0


def _rounds(folder: Path, seed: int, num_kills: int, deadline: float) -> list[Round]:
    rng = random.Random(seed)
    corpus = prepare_corpus(python_text(), folder / "corpus")
    config = write_config(folder / "run.yaml", corpus)
    references: dict[Setting, tuple[Path, float]] = {}
    rounds = []
    for number, setting in enumerate(itertools.cycle(SETTINGS)):
        if time.monotonic() > deadline:
            return rounds
        if setting not in references:
            reference = folder / f"reference-{number}"
            begin = time.monotonic()
            train(setting.launcher, config, f"run.dir={reference}", *setting.overrides)
            references[setting] = reference, time.monotonic() - begin
        reference, startup_seconds = references[setting]
        run_dir = folder / f"run-{number}"
        command = train_command(
            setting.launcher, config, f"run.dir={run_dir}", *setting.overrides, "--resume", "auto"
        )
        aims = random_aims(rng, num_kills, startup_seconds, several_ranks=_several(setting))
        points = run_with_kills(command, run_dir, folder / f"log-{number}", aims)
        rounds.append(Round(setting, points, differences(reference, run_dir)))
        shutil.rmtree(run_dir)
        print(_line(number, rounds[-1]), flush=True)
    raise AssertionError


def _several(setting: Setting) -> bool:
    return setting.launcher != "plain"


def _line(number: int, done: Round) -> str:
    hits = ", ".join(f"{p.moment} {p.step}" for p in done.points)
    verdict = "; ".join(done.differences[:3]) or "bitwise equal"
    return f"round {number}: {done.setting.name}: killed at {hits}: {verdict}"


def _report(rounds: list[Round], minutes: float, seed: int) -> str:
    points = [point for done in rounds for point in done.points]
    unequal = [done for done in rounds if done.differences]
    verdict = (
        f"all {len(rounds)} runs ended bitwise equal to the uninterrupted ones"
        if not unequal
        else f"**{len(unequal)} of {len(rounds)} runs ended different**"
    )
    lines = [
        "# Kill and resume",
        "",
        f"{len(points)} SIGKILLs in {len(rounds)} runs: {verdict}.",
        "",
        "Compared: every field of every `train` and `valid` line of metrics.jsonl, zeros and scale",
        "of every ternary layer, and all tensors (fp32 masters, Adam moments, RNG state) and",
        "metadata of the last two checkpoints. Each run has 40 steps: 16 bit until step 16, ramp",
        "until 27, then ternary; a checkpoint every 5, an evaluation every 8. A killed run is",
        "started again with `--resume auto` until it finishes. Where a kill hit is judged from the",
        "files that it left, not from where it was aimed.",
        "",
        "## Where the kills hit",
        "",
        f"| moment | {' | '.join(PHASES)} | all |",
        f"|---|{'---:|' * (len(PHASES) + 1)}",
    ]
    count = Counter((point.moment, point.phase) for point in points)
    for moment in MOMENTS:
        row = [count[moment, phase] for phase in PHASES]
        cells = ["" if moment == "start-up" else str(number) for number in row]
        total = sum(count[moment, phase] for phase in ("", *PHASES))
        lines.append(f"| {_DESCRIPTIONS[moment]} | {' | '.join(cells)} | {total} |")
    sums = [sum(point.phase == phase for point in points) for phase in PHASES]
    lines.append(f"| all | {' | '.join(map(str, sums))} | {len(points)} |")
    num_single = sum(point.one_rank for point in points)
    lines += [
        "",
        f"In {num_single} of them one rank of two was killed, the launcher ended the other.",
    ]
    lines += [
        "",
        "## Settings",
        "",
        "| setting | runs | kills | bitwise equal |",
        "|---|---:|---:|---|",
    ]
    for setting in SETTINGS:
        mine = [done for done in rounds if done.setting == setting]
        num_kills = sum(len(done.points) for done in mine)
        equal = sum(not done.differences for done in mine)
        lines.append(f"| {setting.name} | {len(mine)} | {num_kills} | {equal} of {len(mine)} |")
    for done in unequal:
        lines += ["", f"Different in {done.setting.name}:", ""]
        lines += [f"- {difference}" for difference in done.differences[:10]]
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines += [
        "",
        "## Provenance",
        "",
        f"{today}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, one thread a rank;",
        f"{found}. {minutes:.0f} minutes by",
        "",
        "```",
        f"python tools/kill_resume.py {' '.join(sys.argv[1:])}".rstrip(),
        "```",
        "",
        f"The aims come from seed {seed}; where they hit depends on the machine's load. CI runs",
        "seven by the same code (`tests/e2e/test_kill_and_resume.py`).",
    ]
    return "\n".join(lines) + "\n"


_DESCRIPTIONS = {
    "start-up": "start-up, up to the first step",
    "step": "in or between steps",
    "evaluation": "in an evaluation",
    "save": "while `.step-N.partial` is written",
    "publication": "after its rename, before `latest` names it",
    "pruning": "while an old checkpoint is deleted",
}


if __name__ == "__main__":
    sys.exit(main())
