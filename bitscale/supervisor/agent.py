"""What the supervisor starts on each host over ssh: the parent of that host's ranks.

    python -m bitscale.supervisor.agent SILENCE_SECONDS

It reads one JSON object a line from stdin and writes one a line to stdout (`link.py` is the other
end), and imports the standard library only. No rank outlives it, and none is looked for by name:

- ranks are its children, and a process whose parent dies becomes its child
  (PR_SET_CHILD_SUBREAPER): the tree below it is all there is to end, and a PID in it cannot be
  anybody else's;
- the kernel kills the ranks if it is killed (PR_SET_PDEATHSIG);
- if the supervisor's end is closed, or says nothing for SILENCE_SECONDS (a cable that is out), it
  ends the ranks by itself: after that time another set of ranks may take over the run's directory.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0
_MAX_LINE_BYTES = 64 << 10
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PRCTL = ctypes.CDLL(None).prctl
_START_SECONDS = 60.0  # for the first word from the supervisor


class _Rank:
    """A process and what is left of its last line of output."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.process = process
        self.partial = b""
        self.open = True  # its output
        self.told = False  # that it has ended


class Agent:
    def __init__(self, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self.last_heard = time.monotonic() + _START_SECONDS
        self.ranks: list[_Rank] = []
        self.selector = selectors.DefaultSelector()
        self.command = b""  # the beginning of a line from the supervisor
        self.over = False

    def serve(self) -> None:
        """Until the supervisor has gone or said "end"; then nothing of this run is left here."""
        _PRCTL(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.set_blocking(sys.stdin.fileno(), False)
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        threading.Thread(target=self._end_in_silence, daemon=True).start()
        tell("ready", host=socket.gethostname(), pid=os.getpid(), port=_free_port())
        next_beat = 0.0
        while not self.over:
            for key, _ in self.selector.select(_POLL_SECONDS):
                if key.data is None:
                    self._hear()
                else:
                    self._pass_on(key.data)
            self._tell_ends()
            if time.monotonic() >= next_beat:
                tell("alive", states={str(r.rank): _state(r.process.pid) for r in self.ranks})
                next_beat = time.monotonic() + BEAT_SECONDS
        tell("end", alive=self.end())

    def _hear(self) -> None:
        try:
            data = os.read(sys.stdin.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.over = True  # closed: the supervisor has gone
            return
        self.last_heard = time.monotonic()
        *lines, self.command = (self.command + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            match message.pop("do"):
                case "start":
                    self._start(**message)
                case "signal":
                    self._signal(message["number"])
                case "end":
                    self.over = True

    def _start(self, command: list[str], environment: dict[str, str], ranks: list[Any]) -> None:
        for own in ranks:  # {"RANK": "3", "LOCAL_RANK": "1", ...}
            process = subprocess.Popen(
                command,
                env=os.environ | environment | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the agent's group is not for them
                preexec_fn=_die_with_agent,
            )
            rank = _Rank(int(own["RANK"]), process)
            self.ranks.append(rank)
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            self.selector.register(process.stdout.fileno(), selectors.EVENT_READ, rank)
        tell("started", pids={str(rank.rank): rank.process.pid for rank in self.ranks})

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:  # not reaped: the PID is still this process's
                rank.process.send_signal(number)

    def _pass_on(self, rank: _Rank) -> None:
        assert rank.process.stdout is not None
        try:
            data = os.read(rank.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, rank.partial = (rank.partial + data).split(b"\n")
        if not data or len(rank.partial) > _MAX_LINE_BYTES:
            lines, rank.partial = [*lines, *filter(None, [rank.partial])], b""
        for line in lines:
            tell("output", rank=rank.rank, text=line.decode("utf-8", "replace"))
        if not data:
            self.selector.unregister(rank.process.stdout.fileno())
            rank.open = False

    def _tell_ends(self) -> None:
        for rank in self.ranks:
            if rank.told or rank.process.poll() is None:
                continue
            if rank.open:
                self._pass_on(rank)  # its last words come before its end
            tell("exit", rank=rank.rank, pid=rank.process.pid, code=rank.process.returncode)
            rank.told = True

    def _end_in_silence(self) -> None:
        """A thread of its own: the main one may hang in writing to a dead connection."""
        while time.monotonic() - self.last_heard < self.silence_seconds:
            time.sleep(_POLL_SECONDS)
        self.end()
        os._exit(1)

    def end(self) -> list[int]:
        """SIGKILL to every process below this one; the PIDs that would not die in 10 s."""
        deadline = time.monotonic() + _KILL_SECONDS
        own = {rank.process.pid: rank.process for rank in self.ranks}
        while (alive := _descendants(os.getpid())) and time.monotonic() < deadline:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                if pid in own:
                    own[pid].poll()  # keeps its exit code, which may still be told
                else:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
            time.sleep(_POLL_SECONDS / 2)
        return alive


def _descendants(pid: int) -> list[int]:
    """Processes below `pid`, parents first. Zombies count until their parent has reaped them."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = parents.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _state(pid: int) -> str:
    """The kernel's letter for what a process does: R runs, S sleeps, T is stopped, D waits for a
    device or file server, Z has ended; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _die_with_agent() -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell(event: str, **fields: object) -> None:
    """One line to the supervisor. One that has gone is noticed by its silence."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()


def main() -> int:
    # ssh's end is noticed as end of input; a signal to the group of the login is not for the ranks.
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of `finally`
    agent = Agent(float(sys.argv[1]))
    try:
        agent.serve()
    finally:
        agent.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
