"""A real all-reduce over the hosts: bandwidth, latency, the slowest rank and the slowest link."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitscale.doctor.check import Check, Finding
from bitscale.doctor.compare import Meeting
from bitscale.doctor.hosts import Connection, HostFailure, on_each

_SECONDS = 150.0
# Of the median. A run goes at the pace of its slowest rank, so a fifth is worth a look.
_SLOW_RANK = 1.2
_SLOW_LINK = 0.5
_STARTUP_MARGIN_SECONDS = 30.0


def measure(
    connections: Sequence[Connection], meeting: Meeting, environment: Mapping[str, str], device: str
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings, and the figures of every rank."""
    sizes = [connection.host.slots for connection in connections]
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    ranks = {
        connection: range(first, first + size)
        for connection, first, size in zip(connections, firsts, sizes, strict=True)
    }
    shared = {
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
        "WORLD_SIZE": str(sum(sizes)),
        "BITSCALE_DOCTOR_DEVICE": device,
        "BITSCALE_DOCTOR_LEADERS": ",".join(map(str, firsts)),
    }

    def run(connection: Connection) -> Any:
        interface = meeting.interfaces[connection.host.name]
        sockets = {
            name: environment.get(name, interface)
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        }
        return connection.ask(
            "ranks",
            seconds=_SECONDS + _STARTUP_MARGIN_SECONDS,
            ranks=list(ranks[connection]),
            environment=shared | sockets,
            limit_seconds=_SECONDS,
        )

    answers = on_each(run, connections)
    results: dict[int, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for connection, answer in zip(connections, answers, strict=True):
        if isinstance(answer, HostFailure):
            errors[f"host {connection.host.name}"] = str(answer)
        else:
            results |= {int(rank): result for rank, result in answer["results"].items()}
            for rank, words in answer["errors"].items():
                errors[f"rank {rank} on {connection.host.name}"] = words
    if errors:
        return [_failure(errors)], {"errors": errors}
    host_of = {rank: c.host.name for c in connections for rank in ranks[c]}
    names = [connection.host.name for connection in connections]
    findings = [
        Finding("", check)
        for check in (
            _allreduce(results, len(names), device),
            *_slowest_rank(results, host_of),
            *_slowest_link(results, firsts, names),
        )
    ]
    figures = {str(rank): {"host": host_of[rank], **results[rank]} for rank in sorted(results)}
    return findings, {"ranks": figures}


def _failure(errors: Mapping[str, str]) -> Finding:
    """The error that says most: those that only waited for another say so, and come last."""
    waited = ("timed out", "no end after", "closed by peer", "connection reset", "Timed out")
    order = sorted(errors.items(), key=lambda item: any(word in item[1] for word in waited))
    (where, words), *more = order
    value = f"{where}: {words}" + (f" (and {len(more)} more)" if more else "")
    remedy = "open TCP between all hosts on all ports above 1024; NCCL_DEBUG=INFO tells more"
    return Finding("", Check("all-reduce", "fail", value, remedy))


def _allreduce(results: Mapping[int, Mapping[str, Any]], num_hosts: int, device: str) -> Check:
    latency = statistics.median(result["latency_seconds"] for result in results.values())
    slowest = min(result["bus_bytes_per_second"] for result in results.values())
    size = results[0]["allreduce_bytes"] / 2**20
    backend = "NCCL" if device == "cuda" else "gloo"
    value = (
        f"{len(results)} ranks on {num_hosts} hosts, {backend}: {latency * 1e3:.3g} ms for one "
        f"number, {slowest / 1e9:.3g} GB/s over every link for {size:.0f} MiB"
    )
    return Check("all-reduce", "ok", value)


def _slowest_rank(
    results: Mapping[int, Mapping[str, Any]], host_of: Mapping[int, str]
) -> list[Check]:
    seconds = {rank: result["compute_seconds"] for rank, result in results.items()}
    slowest = max(seconds, key=lambda rank: seconds[rank])
    others = [value for rank, value in seconds.items() if rank != slowest]
    if not others:
        return []
    ratio = seconds[slowest] / statistics.median(others)
    value = f"rank {slowest} on {host_of[slowest]}: {ratio:.2f}x the time of the others' median"
    if ratio > _SLOW_RANK:
        remedy = "look there for other processes, heat or a power cap; or leave the host out"
        return [Check("slowest rank", "warn", value, remedy)]
    return [Check("slowest rank", "ok", value)]


def _slowest_link(
    results: Mapping[int, Mapping[str, Any]], leaders: Sequence[int], names: Sequence[str]
) -> list[Check]:
    """Between neighbouring hosts; the host is named if both its links are slow."""
    count = len(names)
    speeds = {
        (index, (index + 1) % count): results[leader]["link"]
        for index, leader in enumerate(leaders)
        if results[leader]["link"] is not None
    }
    if not speeds:
        return []
    slowest = min(speeds, key=lambda ends: speeds[ends]["bytes_per_second"])
    speed, latency = (speeds[slowest][key] for key in ("bytes_per_second", "latency_seconds"))
    value = (
        f"{names[slowest[0]]} to {names[slowest[1]]}: {speed / 1e9:.3g} GB/s, "
        f"{latency * 1e3:.3g} ms"
    )
    rest = [link["bytes_per_second"] for ends, link in speeds.items() if ends != slowest]
    if len(rest) > 1 and speed < _SLOW_LINK * statistics.median(rest):
        best = {
            end: max(link["bytes_per_second"] for ends, link in speeds.items() if end in ends)
            for end in slowest
        }
        suspect = min(best, key=lambda end: best[end])
        value = f"{value}; the others' median is {statistics.median(rest) / 1e9:.3g} GB/s"
        remedy = f"check the cable, port and driver of {names[suspect]}, or leave it out"
        return [Check("slowest link", "warn", value, remedy)]
    return [Check("slowest link", "ok", value)]
