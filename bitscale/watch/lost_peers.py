"""What torch says when other ranks are lost, in one line that names collective, step and rank.

gloo's messages name neither ("Connection closed by peer [10.0.0.2]:4711"); NCCL's neither host nor
step. Heartbeats do.
"""

import re
import time
from pathlib import Path

from bitscale.errors import PeerLost
from bitscale.heartbeat import Place, Progress, read_heartbeats
from bitscale.recorder import format_duration
from bitscale.watch.suspects import Suspect, find_suspect

_POLL_SECONDS = 0.25
_TIMED_OUT = re.compile(r"time.?out|timed out", re.IGNORECASE)
# gloo, NCCL's watchdog, and the store through which ranks meet.
_SIGNATURES = re.compile(
    r"gloo/transport/\w+/(pair|buffer|unbound_buffer)\.|NCCL communicator|ncclRemoteError"
    r"|Connection (closed by peer|reset by peer)|clients joined|connectFullMesh"
    r"|wait timeout after \d+ms|failed to recv, got \d+ bytes"
)


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether torch.distributed failed because of another rank, or of the way to it."""
    return isinstance(error, RuntimeError) and _SIGNATURES.search(str(error)) is not None


def explain(
    error: BaseException,
    run_dir: Path,
    progress: Progress,
    place: Place,
    *,
    rank: int,
    timeout_seconds: float,
) -> PeerLost:
    """`error`, for which `is_lost_peer`, with the collective, the step, and the rank to look at.

    `progress` is this rank's last, `place` where the error was raised.

    A rank that died on another host is known by its silence only: this waits for that, at most
    for the age at which a heartbeat counts as old.
    """
    suspect = _wait_for_suspect(run_dir, rank)
    what = place.waiting_for or "communication"
    waited = format_duration(time.monotonic() - progress.since_monotonic)
    timed_out = _TIMED_OUT.search(str(error)) is not None
    how = (
        f"timed out (watch.collective_timeout_seconds={timeout_seconds:g})"
        if timed_out
        else "failed"
    )
    who = suspect.text if suspect else "no heartbeat tells which rank"
    return PeerLost(
        f"{what} {how} in phase {progress.phase}, step {progress.step:,}, {waited} after it began, "
        f"at {place.line}: {who}; mend that and continue with --resume auto "
        f"[{_first_line(error)}]"
    )


def _wait_for_suspect(run_dir: Path, rank: int) -> Suspect | None:
    deadline: float | None = None
    while True:
        beats = read_heartbeats(run_dir)
        suspect = find_suspect(beats, time.time(), own_rank=rank)
        if suspect is None or suspect.is_certain:
            return suspect
        if deadline is None:
            deadline = time.monotonic() + max(beat.seconds_until_old for beat in beats)
        if time.monotonic() > deadline:
            return suspect
        time.sleep(_POLL_SECONDS)


def _first_line(error: BaseException) -> str:
    """Without the C++ stack that may follow."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return line if len(line) <= 200 else f"{line[:200]}..."
