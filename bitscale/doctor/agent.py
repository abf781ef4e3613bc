"""The doctor's other end: `python -m bitscale.doctor.agent` on every host, over one ssh each.

It answers requests, one JSON object a line on stdin: {"do": NAME, ...arguments}. Answers go to
stdout behind a mark, so that whatever a login shell prints there is not mistaken for one. When
stdin ends (the other side has gone, however it went), it stops what it started and leaves.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from bitscale.doctor.host import examine_host
from bitscale.doctor.system import file_system, nearest_existing

MARK = "bitscale-doctor "
_TOKEN_PREFIX = ".bitscale-doctor-"
_CONNECT_SECONDS = 5.0


class Agent:
    """The requests, one method each; names are the protocol."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._ranks: list[subprocess.Popen[bytes]] = []

    def hello(self) -> dict[str, str]:
        return {"host": platform.node(), "python": sys.executable}

    def time(self) -> float:
        return time.time()

    def examine(self, run_dir: str | None, needed_bytes: int) -> dict[str, Any]:
        folder = None if run_dir is None else Path(run_dir)
        return examine_host(run_dir=folder, needed_bytes=needed_bytes).to_tree()

    def missing(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` that are not directories here."""
        return [path for path in paths if not Path(path).is_dir()]

    def existing(self, path: str) -> str:
        """The directory that a run at `path` would be made in."""
        return str(nearest_existing(Path(path)))

    def put_token(self, folder: str, name: str, text: str) -> str | None:
        """Write a token for the other hosts to see; why it could not be, else None."""
        path = Path(folder, _TOKEN_PREFIX + name)
        try:
            path.write_text(text)
        except OSError as error:
            return str(error.strerror)
        return None

    def tokens(self, folder: str, prefix: str) -> dict[str, Any]:
        """The tokens that this host sees in `folder`, and the kind of its file system."""
        root, found = Path(folder), {}
        if root.is_dir():
            for path in root.glob(f"{_TOKEN_PREFIX}{prefix}*"):
                with suppress(OSError):
                    found[path.name.removeprefix(_TOKEN_PREFIX)] = path.read_text()
        return {"tokens": found, "kind": file_system(root) if root.is_dir() else "missing"}

    def drop_token(self, folder: str, name: str) -> None:
        Path(folder, _TOKEN_PREFIX + name).unlink(missing_ok=True)

    def listen(self, port: int) -> dict[str, Any]:
        """Hold the port (0: any free one) until `close_port`; why not, if it is taken."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            listener.close()
            return {"error": error.strerror}
        listener.listen(1024)
        self._listener = listener
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        return {"addresses": _addresses(), "port": listener.getsockname()[1]}

    def close_port(self) -> None:
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            self._listener.close()
            self._listener = None

    def connect(self, addresses: Sequence[str], port: int) -> dict[str, Any]:
        """The first of `addresses` that answers, and the network interface that leads to it."""
        reason = "no address"
        for address in addresses:
            try:
                with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as line:
                    local = line.getsockname()[0]
                return {"address": address, "interface": _interface(local), **_own_name()}
            except OSError as error:
                reason = f"{address}:{port}: {error.strerror or error}"
        return {"error": reason}

    def interface(self) -> dict[str, Any]:
        """What `connect` says of the others, for the host that they connect to."""
        first = next(iter(_addresses()), "127.0.0.1")
        return {"address": first, "interface": _interface(first), **_own_name()}

    def ranks(
        self, ranks: Sequence[int], environment: Mapping[str, str], limit_seconds: float
    ) -> dict[str, Any]:
        """Run `bitscale.doctor.ranks` as each of `ranks` and wait: results and errors by rank."""
        command = [sys.executable, "-m", "bitscale.doctor.ranks"]
        with ExitStack() as stack:
            self._ranks = []
            logs = [[stack.enter_context(tempfile.TemporaryFile()) for _ in "oe"] for _ in ranks]
            for local, (rank, (out, err)) in enumerate(zip(ranks, logs, strict=True)):
                own = {"RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": len(ranks)}
                env = {**os.environ, **environment, **{k: str(v) for k, v in own.items()}}
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
                )
                self._ranks.append(process)
            codes = self._wait(limit_seconds)
            results, errors = {}, {}
            for rank, code, (out, err) in zip(ranks, codes, logs, strict=True):
                if code == 0:
                    results[rank] = json.loads(_last_line(out))
                elif code is None:
                    errors[rank] = f"no end after {limit_seconds:.0f} s"
                else:
                    errors[rank] = f"exit {code}: {_last_line(err)}"
        return {"results": results, "errors": errors}

    def _wait(self, seconds: float) -> list[int | None]:
        """Exit codes of the ranks; None of one that had to be stopped."""
        deadline = time.monotonic() + seconds
        for process in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        codes = [process.poll() for process in self._ranks]
        self.stop()
        return codes

    def stop(self) -> None:
        """End the ranks that still run."""
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        line.close()


def _addresses() -> list[str]:
    """IPv4 addresses of this host, those that others can use first."""
    found = [
        each.address
        for name, each_of in psutil.net_if_addrs().items()
        for each in each_of
        if each.family == socket.AF_INET and psutil.net_if_stats()[name].isup
    ]
    return sorted(found, key=lambda address: address.startswith("127."))


def _interface(address: str) -> str:
    for name, each_of in psutil.net_if_addrs().items():
        if any(each.address == address for each in each_of):
            return name
    return ""


def _own_name() -> dict[str, str]:
    """The address that this host's own name stands for: gloo's choice unless it is told."""
    name = platform.node()
    try:
        own = socket.gethostbyname(name)
    except OSError as error:
        return {"name": name, "name_error": str(error)}
    return {"name": name, "name_interface": _interface(own), "name_address": own}


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:2000] if lines else "no message"


def main() -> NoReturn:
    # Libraries print; the protocol keeps stdout to itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    agent = Agent()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(lines, agent), daemon=True).start()
    while True:
        request = json.loads(lines.get())
        try:
            answer = {"answer": getattr(agent, request.pop("do"))(**request)}
        except Exception as error:  # told to the other side, which names this host
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(f"{MARK}{json.dumps(answer)}\n")
        answers.flush()


def _read(lines: queue.Queue[str], agent: Agent) -> NoReturn:
    """Beside the work, which may take minutes: the end of the input ends this process at once."""
    for line in sys.stdin:
        lines.put(line)
    agent.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
