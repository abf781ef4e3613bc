"""A conversation with the doctor's agent on each host, over ssh."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bitscale.doctor.agent import MARK
from bitscale.hostfile import Host

T = TypeVar("T")
MAX_AT_ONCE = 256
_CONNECT_SECONDS = 10
# BatchMode: ask for no password; a host that is off must not hold up the others.
CONNECT_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}")


class HostFailure(Exception):
    """A host does not answer, or answers that it cannot."""


def agent_command(
    host: str | None, ssh: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """What starts the agent on `host` over ssh, in this directory; None: here, without ssh."""
    start = [sys.executable, "-u", "-m", "bitscale.doctor.agent"]
    if host is None:
        return start
    settings = [f"{name}={value}" for name, value in environment.items()]
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *settings, *start])}"
    alive = ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
    return [*ssh, *CONNECT_OPTIONS, *alive, host, there]


class Connection:
    """A running agent. Every question has a time limit."""

    def __init__(self, host: Host, command: Sequence[str]) -> None:
        self.host = host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._silent = ""  # why it is not asked any more
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, *, seconds: float, **arguments: Any) -> Any:
        """The agent's answer. HostFailure if there is none in time, or it is an error."""
        if self._silent:  # its answers would be taken for those to later questions
            raise HostFailure(self._silent)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._silent = f"no answer to {do!r} within {seconds:.0f} s"
            raise HostFailure(self._silent) from None
        except OSError:
            line = None
        if line is None:
            raise HostFailure(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise HostFailure(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the conversation: the agent leaves when its input ends. ssh is not waited for."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(3)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def _last_words(self) -> str:
        try:
            code: int | None = self._process.wait(3)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1][:200] if lines else 'it said nothing'} (exit {code})"


def on_each(
    work: Callable[[Connection], T], connections: Sequence[Connection]
) -> list[T | HostFailure]:
    """`work` with every connection at the same time; a host's failure is its result."""

    def guarded(connection: Connection) -> T | HostFailure:
        try:
            return work(connection)
        except HostFailure as failure:
            return failure

    with ThreadPoolExecutor(min(max(len(connections), 1), MAX_AT_ONCE)) as pool:
        return list(pool.map(guarded, connections))


def clock_offset(connection: Connection) -> tuple[float, float]:
    """Seconds that the host's clock is ahead of this one's, and by how much that may be wrong.

    As NTP reckons: the answer was given half-way; of several questions the quickest counts.
    """
    samples = []
    for _ in range(5):
        asked = time.time()
        there = connection.ask("time", seconds=10)
        answered = time.time()
        samples.append((answered - asked, there - (asked + answered) / 2))
    round_trip, offset = min(samples)
    return offset, round_trip / 2
