"""How long commands take to start: `bitscale --help`, and a run until its first step is done.

    python tools/bench_startup.py --corpus runs/quickstart/corpus --json startup.json

Medians of interleaved repeats, each a process of its own, in a warm file cache: wall-clock seconds,
and processor seconds of the process and its threads, which other work on the machine lengthens
little. The run is configs/quickstart.yaml; its first step is done when its line is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from provenance import ROOT, provenance

PACKAGES = ("torch", "deepspeed")
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
COMMAND = (sys.executable, "-m", "bitscale.cli.main")


def until_end(command: Sequence[str]) -> dict[str, float]:
    """A command that imports little: until it has printed everything."""
    return _until(command, lambda line: False)


def until_first_step(corpus: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.dir={folder}/run", f"data.corpora=[{{path: {corpus}}}]", "train.stop_step=1",
            "train.eval_batches=1", "log.every=1",
        ]  # fmt: skip
        command = [*COMMAND, "train", str(QUICKSTART), *settings]
        return _until(command, lambda line: line.startswith("step 1/"))


def _until(command: Sequence[str], is_last: Callable[[str], bool]) -> dict[str, float]:
    """Seconds from the start of `command` until it prints such a line, or ends."""
    begun, processor = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            times = psutil.Process(process.pid).cpu_times()
            processor = times.user + times.system
            if is_last(line):
                break
        else:
            process.wait()
        wall = time.perf_counter() - begun
        process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"wall_seconds": wall, "processor_seconds": processor}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="what `prepare` wrote")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="on the state of the machine, for the records")
    parser.add_argument("--json", type=Path, help="write figures and provenance here")
    args = parser.parse_args(argv)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "python -c pass": lambda: until_end([sys.executable, "-c", "print()"]),
        "bitscale --help": lambda: until_end([*COMMAND, "--help"]),
        "first step of a run": lambda: until_first_step(args.corpus.resolve()),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    load = [os.getloadavg()]
    for measure in ways.values():
        measure()  # files into the cache
    for _ in tqdm(range(args.repeats), desc="rounds"):
        for name, measure in ways.items():
            found[name].append(measure())
    load.append(os.getloadavg())
    print("| command | wall-clock s | processor s |\n|---|---|---|")
    for name, runs in found.items():
        wall, processor = (
            statistics.median(run[key] for run in runs)
            for key in ("wall_seconds", "processor_seconds")
        )
        print(f"| {name} | {wall:.2f} | {processor:.2f} |")
    if args.json:
        origin: dict[str, Any] = provenance(f"CPU, {os.cpu_count()} cores", PACKAGES)
        origin |= {"note": args.note, "load_average": load}
        args.json.write_text(json.dumps({"provenance": origin, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
