"""Watching a rank while it trains: heartbeats, the hang watchdog, and errors that name who is lost.

    with watch_rank(cfg, rank=rank, local_rank=local_rank, world_size=world_size) as rank_watch:
        ...
        rank_watch.mark("evaluate", step)

Threads of their own do the work; the training only says where it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitscale.config import Config
from bitscale.heartbeat import HeartbeatWriter, Phase
from bitscale.watch.endpoint import MetricsEndpoint
from bitscale.watch.lost_peers import explain, is_lost_peer
from bitscale.watch.watchdog import EXIT_HUNG, Watchdog
from bitscale.watch.whereabouts import place_of_error, place_of_main_thread

__all__ = ["EXIT_HUNG", "RankWatch", "is_lost_peer", "watch_rank"]


class RankWatch:
    """What the training tells of itself (see `watch_rank`)."""

    def __init__(self, heartbeats: HeartbeatWriter, endpoint: MetricsEndpoint | None) -> None:
        self._heartbeats, self._endpoint = heartbeats, endpoint

    def joined(self) -> None:
        """The ranks have met."""
        self._heartbeats.joined()

    def mark(self, phase: Phase, step: int) -> None:
        """The training has come to `phase` of `step`: progress, as far as the watchdog goes."""
        self._heartbeats.mark(phase, step)

    def observe(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """What is recorded (a listener of the recorder)."""
        if self._endpoint is not None:
            self._endpoint.observe(lines)


@contextmanager
def watch_rank(cfg: Config, *, rank: int, local_rank: int, world_size: int) -> Iterator[RankWatch]:
    """Watch this rank, whose training runs in the main thread, for as long as the block lasts.

    Raises ConfigError, on rank 0, if `watch.metrics_port` cannot be had, and PeerLost in place of
    what torch.distributed raises when other ranks are lost.
    """
    run_dir, watch = Path(cfg.run.dir), cfg.watch
    endpoint = None
    if watch.metrics_port is not None and rank == 0:
        endpoint = MetricsEndpoint(run_dir, watch.metrics_host, watch.metrics_port)
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
    try:
        yield RankWatch(heartbeats, endpoint)
        heartbeats.end()
    except BaseException as error:
        progress, place = heartbeats.progress, place_of_error(error.__traceback__)
        if not is_lost_peer(error):
            heartbeats.end("error", place)
            raise
        heartbeats.end("peer", place)  # first, so that no other rank takes this one for the cause
        timeout_seconds = watch.collective_timeout_seconds
        raise explain(
            error, run_dir, progress, place, rank=rank, timeout_seconds=timeout_seconds
        ) from error
    finally:
        watchdog.stop()
        if endpoint is not None:
            endpoint.close()
