"""Where the time of a training step goes, in a run of `bitscale train` in this process.

    python tools/profile_train.py configs/quickstart.yaml
    python tools/profile_train.py configs/quickstart.yaml --set transition.at.fraction=0 \\
        transition.ramp.over.fraction=0 transition.ramp.shape=none      # ternary from the start

After `--skip` steps: `--steps` steps whose parts are timed, then as many under torch's profiler for
the operators. Seconds are of processor time on a CPU with `engine.num_threads=1` (the default
here), so that other work on the machine hardly shows. The run's files go to a temporary folder.
"""

import argparse
import functools
import importlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bitscale import train as loop
from bitscale.config import load_config
from bitscale.data.batches import Batches
from bitscale.engine import TrainEngine
from bitscale.model.decoder import Decoder
from bitscale.monitor import Monitor
from provenance import provenance

PACKAGES = ("torch", "deepspeed", "numpy")
NUM_OPERATORS = 14


class Clock:
    """Processor seconds of named parts; of nested ones, what the inner ones leave."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.is_running = False
        self._inner: list[float] = []

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - begun
                inside = self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole
                if self.is_running:
                    self.seconds[part] += whole - inside

        setattr(owner, attribute, timed)


def wrap_parts(clock: Clock) -> None:
    deepspeed_engine = importlib.import_module("deepspeed").DeepSpeedEngine
    read = Batches.micro_batches
    # All of a step's at once, as the engine takes them.
    Batches.micro_batches = lambda self, step: list(read(self, step))  # type: ignore[method-assign,assignment]
    for owner, attribute, part in (
        (Batches, "micro_batches", "reading the batch"),
        (TrainEngine, "_prepare_weights", "codes of the weights"),
        (Decoder, "forward", "forward"),
        (deepspeed_engine, "backward", "backward"),
        (deepspeed_engine, "step", "update"),
        (TrainEngine, "train_step", "the rest of train_step"),
        (Monitor, "add", "monitor and recorder"),
        (Monitor, "report", "monitor and recorder"),
        (loop, "_read_telemetry", "telemetry"),
    ):
        clock.wrap(owner, attribute, part)


class Windows:
    """Starts and stops both measurements between steps."""

    def __init__(self, clock: Clock, skip: int, steps: int) -> None:
        self.clock, self.skip, self.steps = clock, skip, steps
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.whole = 0.0
        self._num_begun = 0
        step = TrainEngine.train_step

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.before_step(self._num_begun - skip)
            self._num_begun += 1
            return step(*args, **kwargs)

        TrainEngine.train_step = counted  # type: ignore[method-assign]

    def before_step(self, index: int) -> None:
        if index == 0:
            self.clock.is_running, self._begun = True, time.process_time()
        elif index == self.steps:
            self.clock.is_running = False
            self.whole = time.process_time() - self._begun
            self.profiler.start()
        elif index == 2 * self.steps:
            self.profiler.stop()


def tables(clock: Clock, windows: Windows) -> dict[str, Any]:
    """ms a step of every part, and of the operators that take most."""
    steps = windows.steps
    parts = {name: 1e3 * s / steps for name, s in clock.seconds.most_common()}
    parts["the loop around it"] = 1e3 * windows.whole / steps - sum(parts.values())
    events = sorted(windows.profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    operators = [
        {"name": e.key, "share": e.self_cpu_time_total / whole, "calls": e.count / steps}
        for e in events[:NUM_OPERATORS]
    ]
    return {"step_ms": 1e3 * windows.whole / steps, "parts_ms": parts, "operators": operators}


def show(found: dict[str, Any]) -> str:
    lines = [f"{found['step_ms']:.1f} ms a step", "", "| part | ms | share |", "|---|---|---|"]
    for name, ms in found["parts_ms"].items():
        lines.append(f"| {name} | {ms:.2f} | {100 * ms / found['step_ms']:.1f}% |")
    lines += ["", "| operator (profiled) | share | calls a step |", "|---|---|---|"]
    for row in found["operators"]:
        lines.append(f"| `{row['name']}` | {100 * row['share']:.1f}% | {row['calls']:.1f} |")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], help="overrides: section.key=value")
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write figures and provenance here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    last = args.skip + 2 * args.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        own = ["engine.num_threads=1", "train.eval_batches=1", "checkpoint.every=0"]
        own += [f"run.dir={folder}/run", f"train.stop_step={last}"]
        cfg = load_config(args.config, [*own, *args.set])
        clock = Clock()
        wrap_parts(clock)
        windows = Windows(clock, args.skip, args.steps)
        loop.train(cfg)
    found = tables(clock, windows)
    print(show(found))
    if args.json:
        origin = provenance(f"CPU, {torch.get_num_threads()} thread", PACKAGES)
        args.json.write_text(json.dumps({"provenance": origin, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
