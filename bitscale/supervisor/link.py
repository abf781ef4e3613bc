"""The connection to one host's agent, over ssh."""

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bitscale.hostfile import Host

# What ssh says is kept for the message about a host that cannot be reached.
_MAX_ERROR_LINES = 20


class Message(NamedTuple):
    """What the agent of `host` has said; `event` is "closed" when it will say no more."""

    host: str
    event: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class SshOptions:
    port: int | None = None
    connect_seconds: float = 15.0  # to the agent's first word, the import of python included
    silence_seconds: float = 30.0  # after which agent and supervisor give each other up


@dataclass
class Link:
    """An ssh process whose other end is `bitscale.supervisor.agent` on `host`."""

    host: Host
    process: subprocess.Popen[bytes]
    last_heard: float  # time.monotonic()
    states: dict[str, str] = field(default_factory=dict)  # of its ranks, as the kernel sees them
    pids: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # on stderr
    ready: dict[str, Any] | None = None
    closed: bool = False

    def send(self, do: str, **fields: object) -> None:
        """One line to the agent; a connection that is broken shows as "closed" or as silence."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.closed = True

    def drop(self) -> None:
        """End the ssh process (ours, by its PID); the agent ends its ranks when it notices."""
        self.process.kill()
        self.process.wait()


def open_link(host: Host, options: SshOptions, inbox: "queue.Queue[Message]") -> Link:
    """Start ssh to `host` and the agent there; its messages arrive in `inbox`."""
    process = subprocess.Popen(
        _command(host, options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the supervisor's to handle
    )
    link = Link(host, process, time.monotonic())
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    threading.Thread(target=_keep_errors, args=(link,), daemon=True).start()
    return link


def _command(host: Host, options: SshOptions) -> list[str]:
    port = [] if options.port is None else ["-p", str(options.port)]
    seconds = max(1, round(options.connect_seconds))
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}", *port, host.name]
    # All else that ranks need goes through the connection, not through a command line that
    # everybody on that host can read.
    paths = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    there = ["exec", "env", *(f"{name}={value}" for name, value in paths.items())]
    agent = [sys.executable, "-m", "bitscale.supervisor.agent", str(options.silence_seconds)]
    return [*ssh, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join([*there, *agent])}"]


def _listen(link: Link, inbox: "queue.Queue[Message]") -> None:
    assert link.process.stdout is not None
    for line in link.process.stdout:
        try:
            fields = json.loads(line)
            event = fields.pop("event")
        except (ValueError, KeyError, TypeError, AttributeError):
            # A login script that prints: shown, or a broken one would be a riddle.
            event, fields = "noise", {"text": line.decode("utf-8", "replace").rstrip()}
        inbox.put(Message(link.host.name, event, fields))
    inbox.put(Message(link.host.name, "closed", {}))


def _keep_errors(link: Link) -> None:
    assert link.process.stderr is not None
    for line in link.process.stderr:
        link.said = [*link.said, line.decode("utf-8", "replace").rstrip()][-_MAX_ERROR_LINES:]
