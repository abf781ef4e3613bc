"""torchrun that ends when it has lost the head.

    python -m bitscale.torchrun ARGUMENTS OF TORCHRUN

torchrun's agent asks the store on the head ten times a second whether hosts have joined, and waits
for the answer without a bound of its own. With the cable out it waits until the kernel gives the
connection up, a quarter of an hour by Linux's default (net.ipv4.tcp_retries2): it does not see that
its ranks have ended, and hears no signal, as that call does not return to Python. So a thread looks
on, and ends this host's ranks and torchrun itself when two things have been true for SECONDS:

- the main thread has not come back from one and the same call of torch's rendezvous;
- a rank of this host has ended, or all have. Ranks that still train are left alone.

What waits for hosts to join makes many short calls, and is bounded by torchrun itself.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Literal, Never

SECONDS = 30.0
_RENDEZVOUS = "torch.distributed.elastic.rendezvous"
_POLL_SECONDS = 1.0
_SAVE_SECONDS = 30.0  # torchrun's own patience between SIGTERM and SIGKILL


def main() -> None:
    from torch.distributed.run import main as torchrun

    threading.Thread(target=watch, daemon=True).start()
    torchrun()


def watch(seconds: float = SECONDS, poll_seconds: float = _POLL_SECONDS) -> None:
    """End the ranks and this process when the main thread is lost in the rendezvous."""
    started, since = False, time.monotonic()
    before: FrameType | None = None
    while True:
        time.sleep(poll_seconds)
        ranks = _ranks()
        started = started or ranks != "none"
        # A frame is one call of one function: the same object means that it has not returned.
        frame = _rendezvous_call()
        if frame is None or frame is not before or not started or ranks == "run":
            before, since = frame, time.monotonic()
        elif time.monotonic() - since >= seconds:
            _give_up(seconds)


def _rendezvous_call() -> FrameType | None:
    """The innermost function of torch's rendezvous that the main thread is in, if it is in one."""
    ident = threading.main_thread().ident
    frame = None if ident is None else sys._current_frames().get(ident)
    while frame and not str(frame.f_globals.get("__name__")).startswith(_RENDEZVOUS):
        frame = frame.f_back
    return frame


def _ranks() -> Literal["none", "run", "ended"]:
    """Whether this process has children, and whether the end of one waits to be noticed."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return "none"
    return "run" if ended is None else "ended"


def _give_up(seconds: float) -> Never:
    print(
        f"error on {socket.gethostname()}: torchrun has not heard from the store of its rendezvous "
        f"for {seconds:.0f} s, and ranks of this host have ended: the head, or the network to it, "
        "has gone; ending torchrun and what is left of its ranks here; mend that and continue with "
        "--resume auto",
        file=sys.stderr,
        flush=True,
    )
    ranks = _children()
    _signal(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _SAVE_SECONDS
    while any(map(_runs, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal(ranks, signal.SIGKILL)
    os._exit(1)  # the main thread cannot be interrupted


def _children() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, path.read_text().split())
    return found


def _signal(children: list[int], number: signal.Signals) -> None:
    """Nobody reaps these children, so that their PIDs cannot be anybody else's."""
    for pid in filter(_runs, children):
        os.kill(pid, number)


def _runs(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main()
