"""Break hosts and ranks during a training over 2 hosts, by every launcher, and report what happens.

    python tools/inject_host_faults.py --text /path/to/text --work /tmp/host-faults
    python tools/inject_host_faults.py --text ... --work ... --only "supervise: rank killed"
    python tools/inject_host_faults.py --text ... --work ... --only "supervise: cable out" --hosts 4
    python tools/inject_host_faults.py --work /tmp/host-faults --out docs/results/host-faults.md

Hosts are network namespaces of this machine (tests/e2e/netns_hosts.py): Linux, root, and Debian's
iproute2, openssh-server, pdsh, openmpi-bin; openmpi also wants mpi4py. Each case takes one to four
minutes; its result is kept in WORK, and --only does single ones again. --out writes the table of
all that are there.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "e2e"))

from bitscale.run import versions
from host_faults import FAULTS, LAUNCHER_SECONDS, LAUNCHERS, SUPERVISE, WATCH, Seen, inject
from netns_hosts import make_hosts, why_not
from runs import KEEP_ALL, prepare_corpus, train, write_config

_DISK_MIB = 6  # of the small file system that "disk full" fills

_TELLING = re.compile(
    r"^supervisor: |^\S{0,12} ?(error|warning)|^resumed from|^mpirun noticed|ssh exited with"
    r"|straggler"
    r"|^ +(host|rank|exitcode) +:|^Root Cause|^\[rank 1 on node2\] (error|warning)"
    r"|ORTE has lost|Remote daemon:"
    r"|\bnode\d\b.*(daemon|lost|Timeout|not responding)"
)

INTRODUCTION = """\
Two hosts (or as many as the row says) with a rank each, which are network namespaces of one machine
with an sshd in each, train a tiny model (35,000 parameters, 40 steps, ternary from step 16) on
{text}. At step 18 (a slowed rank: 3) something happens to the last host or its rank. `supervise`
is `bitscale supervise`, `torchrun` launch/torchrun.sh, `pdsh` and `openmpi` launch/multinode.sh,
`mpirun` launch/mpi.sh. All with ZeRO-3.

- **ends after**: from the fault until the launcher has ended on every host, or the supervisor has
  stopped all ranks. "runs on": not within {bound:.0f} s; everything was then killed.
- **names**: what a line says of the fault. A run over several hosts also begins with `hosts: rank 0
  on node1, ...`, for a launcher that names a lost host only.
- **left behind**: training processes that still run on the hosts two seconds after that.
- **first step**: from the restart (supervisor: of its second attempt; others: by hand with
  `--resume auto`) to the first new optimizer step; with the ranks that took it.
- **in the end**: the finished run against one that was never interrupted: every metric, checkpoint
  and telemetry line, bit for bit.

The hosts share this machine's disk, which a cable that is out does not cut off: unlike on a network
file system, heartbeats of the cut host go on.

Bounds are short, so that faults show: {watch};
`bitscale supervise {supervise}`.
With the defaults the same happens after 30 s (a silent host), 60 s (a rank without heartbeats) and
30 minutes (a hang).
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="results, one file a case")
    parser.add_argument("--text", type=Path, help="a text file to train on; needed to run cases")
    parser.add_argument("--only", default="", help='cases with this in "LAUNCHER: FAULT"')
    parser.add_argument("--hosts", type=int, choices=(2, 4), default=2, help="default: 2")
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--note", default="", help="a sentence for the table's provenance")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    failures = 0
    if args.text:
        if reason := why_not():
            print(f"error: {reason}", file=sys.stderr)
            return 2
        failures = _run_cases(args.work, args.text, args.only, args.hosts)
    if args.out:
        args.out.write_text(_report(args.work, args.note), encoding="utf-8")
    return 1 if failures else 0


def _run_cases(work: Path, text: Path, only: str, num_hosts: int) -> int:
    config, reference = work / "run.yaml", work / "reference"
    if not config.exists():
        sample = text.read_text(encoding="utf-8")[:500_000]
        write_config(config, prepare_corpus(sample, work / "corpus"))
        (work / "text").write_text(text.name)
        train("torchrun", config, f"run.dir={reference}", KEEP_ALL, "engine.zero_stage=3")
    failures = 0
    for fault in FAULTS:
        for launcher in LAUNCHERS:
            name = f"{launcher}: {fault}"
            if only not in name:
                continue
            try:
                seen = _run_case(launcher, fault, num_hosts, config, reference)
            except (RuntimeError, AssertionError, subprocess.SubprocessError) as error:
                print(f"{name}: {error}", flush=True)
                failures += 1
                continue
            more = "" if num_hosts == 2 else f"-{num_hosts}-hosts"
            path = work / f"{name.replace(': ', '-').replace(' ', '-')}{more}.json"
            path.write_text(json.dumps(asdict(seen), indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {_cells(seen)}", flush=True)
    return failures


def _run_case(launcher: str, fault: str, num_hosts: int, config: Path, reference: Path) -> Seen:
    with tempfile.TemporaryDirectory(prefix="host-faults-") as name:
        folder = Path(name) / "shared"
        folder.mkdir()
        small = fault == "disk full"
        if small:
            size = f"size={_DISK_MIB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], check=True)
        try:
            with make_hosts(num_hosts, Path(name) / "hosts") as hosts:
                return inject(hosts, launcher, fault, folder, config, reference)
        finally:
            if small:
                subprocess.run(["umount", folder], check=True)


def _cells(seen: Seen) -> list[str]:
    ends = "runs on" if seen.exit_seconds is None else f"{seen.exit_seconds:.0f} s"
    ended = [str(code) for code in seen.exit_codes if code is not None]
    codes = f" ({', '.join(ended)})" if ended else ""
    if ended and seen.exit_seconds is None:
        ends, codes = f"{seen.ended_seconds:.0f} s", f"{codes} on one host, runs on on the other"
    left = ", ".join(entry.partition(":")[0] for entry in seen.left) or "none"
    first = ""
    if seen.first_step_seconds is not None:
        first = f"{seen.first_step_seconds:.0f} s, {seen.resumed_ranks} rank(s)"
    return [ends + codes, seen.names, left, first, seen.outcome]


def _report(work: Path, note: str) -> str:
    found = [Seen(**json.loads(path.read_text())) for path in sorted(work.glob("*-*.json"))]
    found.sort(key=lambda seen: seen.num_hosts)
    text = (work / "text").read_text()
    lines = ["# Faults of hosts\n"]
    bounds = {"watch": ", ".join(WATCH), "supervise": " ".join(SUPERVISE)}
    bounds |= {"bound": LAUNCHER_SECONDS}  # type: ignore[dict-item]
    lines.append(INTRODUCTION.format(text=text, **bounds))
    columns = "fault | launcher | ends after (exit code) | names | left behind | first step"
    lines.append(f"| {columns} | in the end |")
    lines.append("|---|---|---|---|---|---|---|")
    ordered = [
        seen
        for fault in FAULTS
        for launcher in LAUNCHERS
        for seen in found
        if (seen.fault, seen.launcher) == (fault, launcher)
    ]
    lines += [f"| {_title(s)} | {s.launcher} | {' | '.join(_cells(s))} |" for s in ordered]
    done = {(seen.fault, seen.launcher) for seen in ordered}
    missing = [
        f"{fault} under {launcher}"
        for fault in FAULTS
        for launcher in LAUNCHERS
        if (fault, launcher) not in done
    ]
    if missing:
        lines.append(f"\nNot measured: {', '.join(missing)}.")
    lines.append("\n## What was said\n")
    for seen in ordered:
        lines.append(f"**{_title(seen)}, {seen.launcher}**\n\n```\n{_shortened(seen)}\n```\n")
    return "\n".join([*lines, _provenance(note)])


def _title(seen: Seen) -> str:
    return seen.fault if seen.num_hosts == 2 else f"{seen.fault}, {seen.num_hosts} hosts"


def _shortened(seen: Seen, most: int = 12) -> str:
    """What was said of the fault and of going on, without progress and Python's stacks."""
    lines = [line[:400] for line in seen.transcript.splitlines() if _TELLING.search(line)]
    return "\n".join(lines[:most])


def _provenance(note: str) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return f"""\
## Provenance

{today}, commit {commit}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo, one thread a
rank, beside other work: times are upper bounds, and starting Python is most of
them; {found}. By `python tools/inject_host_faults.py`.{" " * bool(note)}{note}
"""


if __name__ == "__main__":
    sys.exit(main())
