#!/usr/bin/env python
"""Inject faults into real small runs, quote what the user reads, and check that nothing is lost.

    python tools/inject_faults.py --out docs/results/faults.md     # all; root, for the full disk
    python tools/inject_faults.py --quick                          # what CI runs

The faults are in tests/e2e/faults.py, damage.py and ambush.py. Exit code 1 if one did
not go as it must.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

import damage
import faults as f
from faults import Bench, Seen

from bitscale.run import versions
from preloaded import preload
from runs import prepare_corpus, python_text, write_config

INTRODUCTION = """\
Each fault hits a real run (`bitscale train`) of 40 steps that turns ternary in the middle and
saves every 5 steps; it had saved at 15 and 20 when the fault came, unless the fault says otherwise.
*Lost* is not an opinion: after the mend that the message names, `--resume auto` ends the run
**bitwise equal** to one that was never interrupted (every metric, every tensor of the checkpoints).
Where a session is refused for its configuration, every file of the run (but the ranks' heartbeats)
is compared with before.
"""


class Row(NamedTuple):
    group: str
    fault: str
    seen: Seen


class Case(NamedTuple):
    group: str
    fault: str
    inject: f.Fault
    num_ranks: int = 1
    quick: bool = False


def cases(other_text: Path | None, other_tokenizer: Path | None) -> list[Case]:
    """Every fault but the kills; `quick` ones need no second process, no root and little time."""
    sync, damaged = "checkpoint.asynchronous=false", "Damaged checkpoint"
    save, config, around = "In a save", "Wrong configuration", "Around the run"
    last, shard, meta = f"checkpoints/step-{f.HALF:08d}", f.SHARD, "meta.json"
    found = [
        Case(save, "SIGTERM in the middle of the shard", f.sigterm_in_a_save, quick=True),
        Case(save, "the same, synchronous", lambda b: f.sigterm_in_a_save(b, sync)),
        Case(save, "SIGTERM, and another a second later", f.sigterm_twice_in_a_save),
        Case(save, "EIO while the shard is written", f.write_error_in_a_save, quick=True),
        Case(save, "the same, synchronous", lambda b: f.write_error_in_a_save(b, sync)),
        Case(save, "EIO on the last of 2 ranks", f.write_error_in_a_save, 2),
        Case(save, "the same, synchronous", lambda b: f.write_error_in_a_save(b, sync), 2),
        Case(save, "SIGKILL of one rank of 2", f.one_rank_killed_in_a_save, 2),
        Case(save, "files limited to 64 KiB (as a quota)", f.file_size_limit, quick=True),
        Case(save, "`checkpoints/` turns read-only", f.turns_read_only),
        Case(
            damaged,
            "shard truncated",
            f.refused_until(damage.truncate, f"{shard}: ", "truncated or foreign"),
        ),
        Case(
            damaged,
            "bit flipped in a shard's values",
            f.refused_until(damage.flip_value, f"{shard}: checksum differs"),
        ),
        Case(
            damaged,
            "bit flipped in a shard's header",
            f.refused_until(damage.flip_header, f"{shard}: checksum differs"),
        ),
        Case(
            damaged,
            "bit flipped in meta.json (step 20 reads 24)",
            f.refused_until(damage.flip_meta, "meta.json: checksum differs from SHA256SUMS"),
            quick=True,
        ),
        Case(
            damaged,
            "bit flipped in SHA256SUMS",
            f.refused_until(damage.flip_sums, "meta.json: checksum differs from SHA256SUMS"),
        ),
        Case(damaged, "shard missing", f.refused_until(damage.remove(shard), f"{shard}: missing")),
        Case(
            damaged,
            "one rank's shard missing, of 2",
            f.refused_until(
                damage.remove("state-00001-of-00002.safetensors"),
                "state-00001-of-00002.safetensors: missing",
            ),
            2,
        ),
        Case(
            damaged,
            "shard of another checkpoint",
            f.refused_until(damage.foreign_shard, f"{shard}: checksum differs"),
        ),
        Case(
            damaged,
            "shard not readable for this user",
            f.forbidden(f"{last}/{shard}", 0o600, f"{shard}: cannot be read (Permission denied)"),
        ),
        Case(
            damaged,
            "meta.json missing",
            f.refused_until(damage.remove(meta), "which is missing or incomplete"),
        ),
        Case(damaged, "meta.json cut in half", f.refused_until(damage.halve_meta, "damaged (")),
        Case(
            damaged,
            "SHA256SUMS missing",
            f.refused_until(damage.remove("SHA256SUMS"), "SHA256SUMS: missing"),
        ),
        Case(
            damaged,
            "a format from the future",
            f.refused_until(
                damage.newer_format, "format 'bitscale-checkpoint-9', this version reads"
            ),
        ),
        Case(
            damaged,
            "NaN in a master weight, every checksum right",
            f.refused_until(damage.nan_master, "(master) holds NaN or infinity"),
            quick=True,
        ),
        Case(
            damaged,
            "`latest` names what is not there",
            f.refused_until(
                damage.latest(b"step-00000099\n"), "names 'step-00000099', which is missi"
            ),
        ),
        Case(damaged, "`latest` empty", f.refused_until(damage.latest(b""), "holds ''")),
        Case(
            damaged,
            "`latest` garbled",
            f.refused_until(damage.latest(b"\xff\x00st"), "which is not a checkpoint's name"),
        ),
        Case(config, "`model.d_ff`", f.wrong("model.d_ff=96", expected="model.d_ff is 96 here")),
        Case(config, "`data.seq_len`", f.wrong("data.seq_len=16", expected="data.seq_len is 16")),
        Case(config, "`data.seed`", f.wrong("data.seed=1", expected="data.seed is 1 here")),
        Case(
            config,
            "`train.global_batch_size`",
            f.wrong("train.global_batch_size=8", expected="train.global_batch_size is 8 here"),
        ),
        Case(config, "the command again, without --resume", f.not_resumed),
        Case(config, "--resume of a path without checkpoints", f.no_checkpoint_there),
        Case(around, "a second run in the same directory", f.two_runs, quick=True),
        Case(around, "the wall clock jumps by ±10 years", f.clock_jumps, quick=True),
        Case(
            around,
            "`checkpoints/` not writable",
            f.forbidden("checkpoints", 0o555, "checkpoints: cannot be written ("),
        ),
        Case(
            around,
            "run directory not writable",
            f.forbidden("run.lock", 0o444, "is not writable: "),
        ),
        Case(
            around,
            "metrics.jsonl cut in the middle of a line",
            f.mended(f.torn_metrics, "the half line is dropped; its step comes again"),
        ),
        Case(around, "metrics.jsonl garbled", f.garbled_metrics),
        Case(
            around,
            "config.yaml deleted",
            f.mended(lambda run_dir: (run_dir / "config.yaml").unlink(), "it is written again"),
        ),
        Case(
            around,
            "run directory moved, a symbolic link in its place",
            f.mended(f.link_run, "nothing"),
            quick=True,
        ),
        Case(
            around,
            "checkpoint moved, a symbolic link in its place",
            f.mended(f.link_checkpoint, "nothing; pruning removes the link only"),
            quick=True,
        ),
        Case(around, "--resume of an older checkpoint", f.back_to_an_older_one),
    ]
    if other_text is not None and other_tokenizer is not None:
        text, tokenizer = (f"data.corpora=[{{path: {p}}}]" for p in (other_text, other_tokenizer))
        found += [
            Case(config, "other text", f.wrong(text, expected="data.corpora is ")),
            Case(config, "other tokenizer", f.wrong(tokenizer, expected="data.corpora is ")),
        ]
    if os.getuid() == 0:
        found.append(Case(save, "disk full (tmpfs; from step 0)", f.disk_full))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="inject faults, quote messages, check losses")
    parser.add_argument("--quick", action="store_true", help="only what CI runs")
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    args = parser.parse_args()
    begin = time.monotonic()
    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # some faults train as nobody
        rows, failures = _inject_all(folder, args.quick, args.only)
    report = _report(rows, (time.monotonic() - begin) / 60)
    print(f"{len(rows)} faults, {len(failures)} not as they must be: {', '.join(failures)}")
    if args.out and not failures:
        args.out.write_text(report, encoding="utf-8")
    return 1 if failures else 0


def _inject_all(folder: Path, quick: bool, only: str) -> tuple[list[Row], list[str]]:
    config = write_config(folder / "run.yaml", prepare_corpus(python_text(), folder / "corpus"))
    foreign: list[Path | None] = [None, None]
    if not quick:
        text = python_text()[:100_000]
        foreign = [
            prepare_corpus(text, folder / "text"),
            prepare_corpus(text, folder / "tokenizer", vocab_size=400),
        ]
    benches = {1: Bench(folder, config), 2: Bench(folder, config, 2, ["engine.zero_stage=3"])}
    chosen = [case for case in cases(*foreign) if only in case.fault and (case.quick or not quick)]
    for num_ranks in sorted({1, *(case.num_ranks for case in chosen)}):
        benches[num_ranks].make_runs()
    rows: list[Row] = []
    failures: list[str] = []

    def attempt(name: str, action: Callable[[], list[Row]]) -> None:
        try:
            done = action()
        except Exception:  # one fault that goes wrong must not hide the next
            traceback.print_exc()
            failures.append(name)
            return
        rows.extend(done)
        for row in done:
            print(f"ok: {row.group}: {row.fault}: {row.seen.what}", flush=True)

    for asynchronous in (True,) if quick else (True, False):
        mode = "asynchronous" if asynchronous else "synchronous"
        group = f"SIGKILL in a save ({mode})"
        if only in group:
            attempt(
                group,
                lambda asynchronous=asynchronous, group=group: [
                    Row(group, name, seen)
                    for name, seen in f.struck_in_saves(benches[1], asynchronous).items()
                ],
            )
    for case in chosen:
        bench = benches[case.num_ranks]
        attempt(
            case.fault,
            lambda case=case, bench=bench: [Row(case.group, case.fault, case.inject(bench))],
        )
    return rows, failures


def _report(rows: list[Row], minutes: float) -> str:
    lines = [f"# Faults\n\n{len(rows)} injected faults: nothing lost.\n", INTRODUCTION]
    for group in dict.fromkeys(row.group for row in rows):
        lines += [f"## {group}\n", "| fault | what was seen | exit code | lost |"]
        lines.append("|---|---|---|---|")
        for row in (row for row in rows if row.group == group):
            what = row.seen.what.replace("|", "\\|")
            lines.append(f"| {row.fault} | {what} | {row.seen.exit_code} | {row.seen.lost} |")
        lines.append("")
    return "\n".join([*lines, _provenance(minutes)])


def _provenance(minutes: float) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"""\
## Provenance

{today}, commit {_commit()}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, one thread a
rank; {found}.
{minutes:.0f} minutes on a busy machine by

```
python tools/inject_faults.py {" ".join(sys.argv[1:])}
```

Negative exit codes are signals: the process was killed. Messages are quoted whole, but for the
temporary folder in front of paths. CI runs 22 of them (`tests/e2e/test_faults.py`).
"""


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
