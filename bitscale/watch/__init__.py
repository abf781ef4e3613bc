"""Watching a rank while it trains: heartbeats, the hang watchdog, and errors that name who is lost.

    with watch_rank(cfg) as rank_watch:
        ...
        rank_watch.mark("evaluate", step)

Threads of their own do the work; the training only says where it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitscale.config import Config
from bitscale.heartbeat import Failure, HeartbeatWriter, Phase
from bitscale.watch.lost_peers import explain, is_lost_peer
from bitscale.watch.watchdog import EXIT_HUNG, Watchdog
from bitscale.watch.whereabouts import place_of_main_thread

__all__ = ["EXIT_HUNG", "RankWatch", "watch_rank"]


class RankWatch:
    """What the training tells of itself (see `watch_rank`)."""

    def __init__(self, heartbeats: HeartbeatWriter) -> None:
        self._heartbeats = heartbeats

    def joined(self) -> None:
        """The ranks have met."""
        self._heartbeats.joined()

    def mark(self, phase: Phase, step: int) -> None:
        """The training has come to `phase` of `step`: progress, as far as the watchdog goes."""
        self._heartbeats.mark(phase, step)


@contextmanager
def watch_rank(cfg: Config, *, rank: int, local_rank: int, world_size: int) -> Iterator[RankWatch]:
    """Watch this rank, whose training runs in the main thread, for as long as the block lasts.

    Raises PeerLost in place of what torch.distributed raises when other ranks are lost.
    """
    run_dir, watch = Path(cfg.run.dir), cfg.watch
    heartbeats = HeartbeatWriter(
        run_dir,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        interval_seconds=watch.heartbeat_seconds,
        place=place_of_main_thread,
    )
    watchdog = Watchdog(run_dir, heartbeats, rank=rank, hang_seconds=watch.hang_seconds)
    heartbeats.start()
    watchdog.start()
    failure: Failure = "error"
    try:
        yield RankWatch(heartbeats)
        failure = ""
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        progress = heartbeats.progress
        heartbeats.end("peer")  # first, so that no other rank takes this one for the cause
        raise explain(
            error,
            run_dir,
            progress,
            rank=rank,
            timeout_seconds=watch.collective_timeout_seconds,
        ) from error
    finally:
        watchdog.stop()
        heartbeats.end(failure)
