"""Training sessions in which a rank hangs, dies, fails or is slow, for real.

    python watched_sessions.py CONFIG FOLDER [CASE...]      prints exit codes, as JSON

Sessions are forked from a process that has imported everything (preloaded.py). What goes wrong is
laid into `Batches.micro_batches`, in the process of the rank that it happens to.
"""

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.data.batches import Batches, MicroBatch
from preloaded import Session, preload
from runs import free_port

AT = 6  # the batch at which it happens
SLOW_UNTIL = 29
HANG_SECONDS = 6  # well above what a busy machine needs for a step; start-up has four times as much
_SECONDS = 180.0


class Case(NamedTuple):
    act: Callable[[], None]  # before the batch is read
    overrides: tuple[str, ...] = ()
    first: int = AT
    last: int = AT
    num_ranks: int = 2


def hang() -> None:
    time.sleep(10**6)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("an error of rank 1 alone")


def dawdle() -> None:
    time.sleep(0.1)


_QUIET = ("train.eval_every=0", "checkpoint.every=0", "watch.heartbeat_seconds=0.2")
_TIMEOUT = f"watch.collective_timeout_seconds={HANG_SECONDS}"
CASES = {
    "hang": Case(hang, (f"watch.hang_seconds={HANG_SECONDS}",)),
    "timeout": Case(hang, ("watch.hang_seconds=0", _TIMEOUT)),
    "die": Case(die),
    "killed": Case(die, num_ranks=1),
    "fail": Case(fail),
    "slow": Case(dawdle, ("log.every=5", "engine.zero_stage=3"), first=0, last=SLOW_UNTIL),
}


def lay(case: Case, port: int, scraped: Path) -> Callable[[int], None]:
    """The last rank acts as the case says; rank 0 asks its own metrics endpoint, late."""

    def prepare(rank: int) -> None:
        read: Any = Batches.micro_batches

        def reading(self: Batches, index: int) -> Iterator[MicroBatch]:
            if rank == case.num_ranks - 1 and case.first <= index <= case.last:
                case.act()
            if rank == 0 and index == SLOW_UNTIL + 1:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    scraped.write_bytes(answer.read())
            yield from read(self, index)

        Batches.micro_batches = reading  # type: ignore[method-assign]

    return prepare


def main(config: str, folder: Path, names: list[str]) -> dict[str, int]:
    preload()
    codes = {}
    for name in names or CASES:
        case, run_dir, port = CASES[name], folder / name, free_port()
        overrides = [*_QUIET, *case.overrides, f"watch.metrics_port={port}"]
        prepare = lay(case, port, folder / f"{name}.prom")
        arguments = [config, f"run.dir={run_dir}", *overrides]
        session = Session(arguments, case.num_ranks, folder / f"{name}.log", prepare)
        codes[name] = session.wait(_SECONDS)
    return codes


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
