"""Training sessions of two ranks with a rank that hangs, dies, fails or is slow, for real.

    python watched_sessions.py CONFIG FOLDER      runs every case; prints exit codes, as JSON

Sessions are forked from a process that has imported everything (preloaded.py). What goes wrong is
laid into `Batches.micro_batches`, in the process of the rank that it happens to.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.data.batches import Batches
from preloaded import Session, preload

AT = 6  # the batch at which it happens
_SECONDS = 180.0


class Case(NamedTuple):
    act: Callable[[], None]  # by rank 1, before it reads a batch
    first: int
    last: int
    overrides: tuple[str, ...]


def hang() -> None:
    time.sleep(10**6)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("an error of rank 1 alone")


def dawdle() -> None:
    time.sleep(0.1)


_QUIET = ("train.eval_every=0", "checkpoint.every=0", "watch.heartbeat_seconds=0.2")
CASES = {
    # 10 s: well above what a busy machine needs for a step; start-up has four times as much.
    "hang": Case(hang, AT, AT, ("watch.hang_seconds=10",)),
    "timeout": Case(hang, AT, AT, ("watch.hang_seconds=0", "watch.collective_timeout_seconds=10")),
    "die": Case(die, AT, AT, ()),
    "fail": Case(fail, AT, AT, ()),
    "slow": Case(dawdle, 0, 29, ("log.every=5",)),
}


def sabotage(case: Case) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        if rank != 1:
            return
        read: Any = Batches.micro_batches

        def reading(self: Batches, index: int) -> Any:
            if case.first <= index <= case.last:
                case.act()
            return read(self, index)

        Batches.micro_batches = reading  # type: ignore[method-assign]

    return prepare


def main(config: str, folder: Path, names: list[str]) -> dict[str, int]:
    preload()
    codes = {}
    for name in names or CASES:
        case, run_dir = CASES[name], folder / name
        arguments = [config, f"run.dir={run_dir}", *_QUIET, *case.overrides]
        session = Session(arguments, 2, folder / f"{name}.log", sabotage(case))
        codes[name] = session.wait(_SECONDS)
    return codes


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
