"""Stacks of living ranks, on request."""

import time
from pathlib import Path

from bitscale.heartbeat import STACK_SIGNAL, Heartbeat, read_heartbeats, stack_path

_SECONDS = 5.0
_SETTLE_SECONDS = 0.3


def write_stacks(run_dir: Path) -> list[str]:
    """Make every living rank of this host write the stacks of its threads, and go on.

    Returns lines for people: what was written, and how to do it on other hosts.
    """
    lines = []
    beats = [beat for beat in read_heartbeats(run_dir) if beat.phase not in ("done", "failed")]
    for beat in beats:
        if not beat.is_local():
            lines.append(
                f"rank {beat.rank}: ssh {beat.host} kill -{STACK_SIGNAL.name[3:]} {beat.pid}, "
                f"then read {stack_path(run_dir, beat.rank)}"
            )
        else:
            lines.append(_ask(run_dir, beat))
    return lines or ["no rank of this run is alive"]


def _ask(run_dir: Path, beat: Heartbeat) -> str:
    process, path = beat.process(), stack_path(run_dir, beat.rank)
    if process is None:
        return f"rank {beat.rank}: process {beat.pid} is gone"
    if not path.is_file():
        return f"rank {beat.rank}: it has not come so far yet"  # the signal would end it
    before = path.stat().st_size
    process.send_signal(STACK_SIGNAL)
    deadline = time.monotonic() + _SECONDS
    while path.stat().st_size == before and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(_SETTLE_SECONDS)
    with path.open("rb") as file:
        file.seek(before)
        text = file.read().decode("utf-8", "replace").rstrip()
    return f"rank {beat.rank} on {beat.host}, process {beat.pid} ({path}):\n{text}"
