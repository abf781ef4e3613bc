"""Gloo ranks for tests: spawned once, then handed one function after the other.

Starting torch and DeepSpeed costs seconds, so a `World` of n processes lives for the whole test
session and every test runs its check in it. A rank that fails, dies or hangs fails that test
with its own traceback and ends the world; the next test starts a fresh one.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import _world

from bitscale.mesh import Mesh, close_mesh, init_mesh

START_SECONDS = 120.0
GRACE_SECONDS = 3.0  # for the other ranks' reports, once one has failed
# Of one rank. DeepSpeed's engines are never freed (hooks of gradients hold them), nor the groups
# that they were given; a group has three threads, one of which wakes up 100 times a second. With
# hundreds of them half of the machine's time goes into waking; new ranks cost seconds.
MAX_THREADS = 80


class RankFailure(AssertionError):
    """What went wrong in the ranks, with their tracebacks."""


class World:
    """`size` processes in one gloo process group, one CPU thread each."""

    def __init__(self, size: int, *, start_seconds: float = START_SECONDS) -> None:
        self.size, self._start_seconds = size, start_seconds
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, check: Callable[..., Any], *args: Any, seconds: float = 120.0) -> list[Any]:
        """`check(mesh, *args)` on every rank; their results in rank order.

        `check` is a module-level function; arguments and results travel by pickle. Raises
        RankFailure if a rank raises, dies, or has not finished after `seconds`.
        """
        if not self._processes:
            self._start()
        message = pickle.dumps((check, args))
        for pipe in self._pipes:
            # A dead rank is reported, with its exit code, by _collect.
            with contextlib.suppress(OSError):
                pipe.send_bytes(message)
        return self._collect(seconds)

    def close(self) -> None:
        """End the ranks: politely, then by force."""
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for work reads the end of file and leaves
        for process in self._processes:
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # torch has already run in this process
        # The parent holds the store, on a port the system chose: no race for a free one.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self._store.port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(self._start_seconds)

    def _collect(self, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        most_threads = 0
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=remaining):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, result, num_threads = pickle.loads(pipe.recv_bytes())
                    most_threads = max(most_threads, num_threads)
                except (EOFError, OSError):
                    self._processes[rank].join(GRACE_SECONDS)
                    succeeded = False
                    result = f"died with exit code {self._processes[rank].exitcode}"
                if succeeded:
                    results[rank] = result
                elif not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                if not succeeded:
                    failures[rank] = result
        if not failures and not waiting:
            if most_threads > MAX_THREADS:
                self.close()  # the next check finds new ranks
            return [results[rank] for rank in range(self.size)]
        for rank in waiting.values():
            late = f"after {seconds:g} s" if not failures else "when another rank failed"
            failures[rank] = f"not finished {late}"
        self._kill()
        raise RankFailure(
            "\n".join(
                f"rank {rank} of {self.size}: {text}" for rank, text in sorted(failures.items())
            )
        )

    def _kill(self) -> None:
        """A failed rank may have left the others in a collective: none can be used again."""
        for process in self._processes:
            process.kill()
        self.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the parent's; rank 0 joins it too
    )
    mesh: Mesh | None = None

    def start() -> None:
        nonlocal mesh
        mesh = init_mesh("cpu", num_threads=1)

    _report(pipe, start)
    linear = torch.nn.functional.linear
    while True:
        try:
            check, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        # DeepSpeed's stage 3 replaces it for the whole process, for good; and it remembers the
        # tensor-parallel groups of an engine for the next.
        torch.nn.functional.linear = linear
        if groups := sys.modules.get("deepspeed.utils.groups"):
            groups.mpu = None  # type: ignore[attr-defined]
        groups_before = set(_world.pg_map)
        _report(pipe, check, mesh, *args)
        _destroy_groups_beside(groups_before)
    close_mesh()


def _destroy_groups_beside(kept: set[Any]) -> None:
    """Destroy what a check has left: each group's thread wakes up for ever, and hundreds of them
    slow down whatever runs next."""
    deepspeed_groups = sys.modules.get("deepspeed.utils.groups")
    # Made by the first engine and used by all.
    remembered = getattr(deepspeed_groups, "_WORLD_GROUP", None)
    for group in list(_world.pg_map):
        if group not in kept and group is not remembered:
            torch.distributed.destroy_process_group(group)


def _report(pipe: Connection, function: Callable[..., Any], *args: Any) -> None:
    """Send (True, result, threads) or (False, traceback, threads)."""
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    try:
        message = pickle.dumps((True, function(*args), num_threads))
    except BaseException:  # pytest's outcomes and SystemExit too: a rank never goes silently
        message = pickle.dumps((False, traceback.format_exc(), num_threads))
    pipe.send_bytes(message)
