"""Training sessions forked from a process that has imported everything: started in .3 s.

Importing takes most of a short session's time and cannot touch its files; without it, many more
kill points fit into a minute. From `main` on a forked session is like any other.
"""

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from bitscale.cli.main import main
from runs import environment, free_port

_FORK = multiprocessing.get_context("fork")


def preload() -> None:
    """Import what a training imports. No threads may run here when a session is forked."""
    os.environ.update(environment())
    torch.set_num_threads(1)
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # brings torch._dynamo with it

    import bitscale.train  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage six times at start-up: not all modules each time


class Session:
    """A training of `num_ranks` forked ranks; a `kill_points.Process`.

    `prepare(rank)` runs in each rank before it trains: to inject a fault.
    """

    def __init__(
        self,
        arguments: list[str],
        num_ranks: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        self._process = _FORK.Process(target=_launch, args=(arguments, num_ranks, log, prepare))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the session did not end in time"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def _launch(
    arguments: list[str], num_ranks: int, log: Path, prepare: Callable[[int], None] | None
) -> None:
    """What torchrun does: start the ranks, and end the others when one fails."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if num_ranks == 1:
        if prepare is not None:
            prepare(0)
        sys.exit(main(["train", *arguments]))
    port = free_port()
    ranks = [
        _FORK.Process(target=_rank, args=(arguments, rank, num_ranks, port, prepare))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    sys.exit(abs(_end_together(ranks)))


def _end_together(ranks: Sequence[BaseProcess]) -> int:
    """The exit code of the first rank that failed; it ends the others."""
    code = 0
    while any(rank.is_alive() for rank in ranks) or not code:
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        code = code or next(iter(failed), 0)
        if failed:
            for rank in ranks:
                rank.terminate()
                rank.join(5)
                rank.kill()
        elif not any(rank.is_alive() for rank in ranks):
            break
        time.sleep(0.01)
    return code


def _rank(
    arguments: list[str],
    rank: int,
    num_ranks: int,
    port: int,
    prepare: Callable[[int], None] | None,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    if prepare is not None:
        prepare(rank)
    sys.exit(main(["train", *arguments]))
