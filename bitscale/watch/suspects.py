"""Which rank the others wait for, from their heartbeats."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bitscale.heartbeat import Heartbeat, Place, missing_ranks
from bitscale.recorder import format_duration


class Suspect(NamedTuple):
    """The rank that holds up the run, as far as heartbeats tell."""

    rank: int | None  # None: no single one
    text: str  # who, where, why
    is_certain: bool  # it is dead or has said so itself; otherwise it is only behind


def find_suspect(
    heartbeats: Sequence[Heartbeat], now: float, *, own_rank: int, own_place: Place | None = None
) -> Suspect | None:
    """Who is to blame that rank `own_rank` waits; None without anybody else's heartbeat.

    `own_place` is where this rank is now, of which its heartbeat may not know yet.

    In this order: a rank that failed by itself, one whose process is gone or that is silent, one
    that never started, and else the one furthest behind: of the lowest step, not in a collective
    itself, with the oldest progress.
    """
    if own_place is not None:
        waiting_for, line = own_place
        heartbeats = [
            replace(beat, waiting_for=waiting_for, place=line) if beat.rank == own_rank else beat
            for beat in heartbeats
        ]
    others = [beat for beat in heartbeats if beat.rank != own_rank]
    if not others:
        return None
    for beat in others:
        if beat.phase == "failed" and beat.failure == "error":
            return Suspect(beat.rank, f"{_name(beat)} failed at step {beat.step:,}", True)
    dead = [(beat, why) for beat in others if (why := _death(beat, now))]
    if dead:
        beat, why = dead[0]
        more = f", and {len(dead) - 1} more" if len(dead) > 1 else ""
        return Suspect(beat.rank, f"{_name(beat)} {why}{more}", True)
    if absent := missing_ranks(list(heartbeats)):
        return Suspect(absent[0], f"rank {', '.join(map(str, absent[:8]))} has not started", False)
    return _furthest_behind(heartbeats, now)


def _furthest_behind(heartbeats: Sequence[Heartbeat], now: float) -> Suspect | None:
    lowest = min(beat.step for beat in heartbeats)
    behind = [beat for beat in heartbeats if beat.step == lowest]
    idle = [beat for beat in behind if beat.waiting_for is None and beat.failure != "peer"]
    if not idle and lowest == max(beat.step for beat in heartbeats):
        return _all_wait(heartbeats)
    beat = min(idle or behind, key=lambda beat: beat.phase_since)
    waits = f"waits in {beat.waiting_for}" if beat.waiting_for else "is not in a collective"
    since = format_duration(max(0.0, now - beat.phase_since))
    # A rank whose own watchdog was a moment earlier has ended with that.
    progress = f"{describe_progress(beat)} for {since}"
    if beat.failure == "hang":
        progress = f"hung at step {beat.step:,}"
    return Suspect(
        beat.rank,
        f"furthest behind is {_name(beat)}: {progress}, {waits}, "
        f"at {beat.place or 'an unknown place'}",
        False,
    )


def _all_wait(heartbeats: Sequence[Heartbeat]) -> Suspect:
    places: dict[str, list[int]] = {}
    for beat in heartbeats:
        places.setdefault(f"{beat.waiting_for} at {beat.place}", []).append(beat.rank)
    if len(places) == 1:
        text = f"every rank waits in {next(iter(places))}: look at the network"
        if len(hosts := _by_host(heartbeats)) > 1:
            text += f" between {' and '.join(hosts[:4])}{' and others' if len(hosts) > 4 else ''}"
        return Suspect(None, text, False)
    parts = [f"{_ranks(ranks)} in {place}" for place, ranks in places.items()]
    return Suspect(None, f"ranks wait in different places: {'; '.join(parts[:4])}", False)


def _by_host(heartbeats: Sequence[Heartbeat]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for beat in heartbeats:
        ranks.setdefault(beat.host, []).append(beat.rank)
    return [f"{_ranks(those)} on {host}" for host, those in ranks.items()]


def describe_progress(beat: Heartbeat) -> str:
    return f"phase {beat.phase}, step {beat.step:,}"


def _death(beat: Heartbeat, now: float) -> str:
    """Why the rank counts as dead; "" if it does not."""
    if beat.phase in ("done", "failed"):
        return ""
    age = format_duration(beat.age_seconds(now))
    last = f"(last heartbeat {age} ago, {describe_progress(beat)})"
    if beat.is_local() and beat.process() is None:
        return f"is gone: there is no process {beat.pid} any more {last}"
    if not beat.is_fresh(now):
        return f"has not been heard of: its host or its network is down, or it is stopped {last}"
    return ""


def _name(beat: Heartbeat) -> str:
    return f"rank {beat.rank} on {beat.host}"


def _ranks(ranks: Sequence[int]) -> str:
    text = ", ".join(map(str, ranks[:4]))
    return f"rank {text}{'...' if len(ranks) > 4 else ''}"
