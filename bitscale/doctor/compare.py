"""What hosts of one run must have in common: facts, clocks, directory, a way to each other."""

from __future__ import annotations

import secrets
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitscale.doctor.check import Check, Finding, Report, State
from bitscale.doctor.hosts import Connection, HostFailure, clock_offset, on_each

# Heartbeats and logs of several hosts are compared to the second.
_MAX_SKEW_SECONDS, _BAD_SKEW_SECONDS = 1.0, 10.0
_ASK_SECONDS = 30.0
_SAME_PACKAGES = "pip install -c constraints.txt -e . there, from the same commit"
# Facts that make a run fail or differ; the others (driver, processor) make it slower.
_REMEDIES = {
    "python": "use the same Python on all hosts",
    "bitscale": "bring all hosts to the same commit (git pull, or share the folder)",
    "torch": _SAME_PACKAGES,
    "deepspeed": _SAME_PACKAGES,
    "megatron-core": _SAME_PACKAGES,
    "numpy": _SAME_PACKAGES,
    "triton": _SAME_PACKAGES,
    "cuda": _SAME_PACKAGES,
    "nccl": _SAME_PACKAGES,
    "gpus": "leave out the host, or start as many ranks as the least of them has GPUs",
}
_SOFT_REMEDY = "expect all ranks to go at the pace of the slowest, or leave that host out"


def compare_facts(reports: Mapping[str, Report]) -> list[Finding]:
    """A finding for every fact that differs, naming the hosts that differ from the majority."""
    if len(reports) < 2:
        return []
    names = dict.fromkeys(name for report in reports.values() for name in report.facts)
    findings = []
    for name in names:
        values = {host: report.facts.get(name, "none") for host, report in reports.items()}
        (common, _), *others = Counter(values.values()).most_common()
        if not others:
            continue
        odd = [f"{value} on {_hosts_with(values, value)}" for value, _ in others]
        shown = f"{common} on {_hosts_with(values, common)}; {'; '.join(odd)}"
        state: State = "fail" if name in _REMEDIES else "warn"
        remedy = _REMEDIES.get(name, _SOFT_REMEDY)
        findings.append(Finding("", Check(f"same {name}", state, shown, remedy)))
    if not findings:
        return [Finding("", Check("same on all hosts", "ok", ", ".join(names)))]
    return findings


def _hosts_with(values: Mapping[str, str], wanted: str) -> str:
    hosts = [host for host, value in values.items() if value == wanted]
    return ", ".join(hosts[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else "")


def compare_clocks(connections: Sequence[Connection]) -> list[Finding]:
    """How far each host's clock is from the median of them all and this one, which breaks a tie."""
    measured = on_each(clock_offset, connections)
    findings, known = [], []
    for connection, offset in zip(connections, measured, strict=True):
        if isinstance(offset, HostFailure):
            findings.append(unanswered(connection.host.name, "clock", offset))
        else:
            known.append((connection.host.name, *offset))
    middle = statistics.median([*(offset for _, offset, _ in known), 0.0])
    for name, ahead, error in known:
        skew = abs(ahead - middle)
        value = f"{ahead - middle:+.3f} s from the median, give or take {error:.3f} s"
        remedy = "synchronize it (chronyd or systemd-timesyncd; chronyc tracking)"
        if skew - error > _BAD_SKEW_SECONDS:
            findings.append(Finding(name, Check("clock", "fail", value, remedy)))
        elif skew - error > _MAX_SKEW_SECONDS:
            findings.append(Finding(name, Check("clock", "warn", value, remedy)))
        else:
            shown = f"within {_MAX_SKEW_SECONDS:.0f} s of the others"
            findings.append(Finding(name, Check("clock", "ok", shown)))
    return findings


def compare_directory(
    connections: Sequence[Connection], run_dir: str, seconds: float
) -> list[Finding]:
    """Every host writes a token into the run's directory, and must read those of all others within
    `seconds` (NFS shows new files late)."""
    first, name = connections[0], f"{secrets.token_hex(4)}-"
    try:
        folder = first.ask("existing", seconds=_ASK_SECONDS, path=run_dir)
    except HostFailure as failure:
        return [unanswered(first.host.name, "shared directory", failure)]
    numbers = {connection: str(number) for number, connection in enumerate(connections)}

    def put(connection: Connection) -> Any:
        own = name + numbers[connection]
        text = connection.host.name
        return connection.ask("put_token", seconds=_ASK_SECONDS, folder=folder, name=own, text=text)

    def look(connection: Connection) -> Any:
        return connection.ask("tokens", seconds=_ASK_SECONDS, folder=folder, prefix=name)

    def drop(connection: Connection) -> Any:
        own = name + numbers[connection]
        return connection.ask("drop_token", seconds=_ASK_SECONDS, folder=folder, name=own)

    try:
        refused = on_each(put, connections)
        wanted = {name + numbers[c] for c, why in zip(connections, refused, strict=True) if not why}
        deadline = time.monotonic() + seconds
        while True:
            seen = on_each(look, connections)
            if all(isinstance(s, HostFailure) or wanted <= set(s["tokens"]) for s in seen):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(1)
    finally:
        on_each(drop, connections)
    kind = "" if isinstance(seen[0], HostFailure) else seen[0]["kind"]
    return [
        Finding(c.host.name, _directory_check(folder, first.host.name, kind, why, s, wanted))
        for c, why, s in zip(connections, refused, seen, strict=True)
    ]


def _directory_check(
    folder: str, first: str, kind: str, refused: Any, seen: Any, wanted: set[str]
) -> Check:
    title = "shared directory"
    remedy = "mount the same network file system at this path on every host"
    if isinstance(seen, HostFailure):
        return unanswered("", title, seen).check
    if seen["kind"] == "missing":
        return Check(title, "fail", f"{folder} does not exist here", remedy)
    if refused:
        value = f"{folder} cannot be written ({refused})"
        return Check(title, "fail", value, "give this user the permission, on the server too")
    missing = len(wanted - set(seen["tokens"]))
    if missing:
        value = (
            f"{folder} is {seen['kind']} here and not the one of {first} ({kind}): {missing} of "
            f"{len(wanted)} hosts' files are not seen"
        )
        return Check(title, "fail", value, remedy)
    return Check(title, "ok", f"{folder} ({kind}): every host reads what every host writes")


@dataclass(frozen=True)
class Meeting:
    """Where ranks find each other: address and port of the first host, interface of each."""

    address: str
    port: int
    interfaces: Mapping[str, str]  # by host


def find_meeting(
    connections: Sequence[Connection], port: int, environment: Mapping[str, str]
) -> tuple[list[Finding], Meeting | None]:
    """Listen on the first host, connect from the others; None if one of them cannot."""
    first, others = connections[0], connections[1:]
    head = first.host.name
    try:
        opened = first.ask("listen", seconds=_ASK_SECONDS, port=port)
        if "error" in opened:
            value = f"port {port} on {head}: {opened['error']}"
            remedy = "end what holds it (ss -ltnp), or choose another with --port and MASTER_PORT"
            return [Finding(head, Check("master port", "fail", value, remedy))], None
        addresses, port = opened["addresses"], opened["port"]
        here = first.ask("interface", seconds=_ASK_SECONDS)
        found = on_each(
            lambda c: c.ask("connect", seconds=60, addresses=addresses, port=port), others
        )
        first.ask("close_port", seconds=_ASK_SECONDS)
    except HostFailure as failure:
        return [unanswered(head, "master port", failure)], None
    findings = []
    ways = {head: here}
    for connection, way in zip(others, found, strict=True):
        name = connection.host.name
        if isinstance(way, HostFailure):
            findings.append(unanswered(name, "master port", way))
        elif "error" in way:
            value = f"{head} is not reached: {way['error']}"
            remedy = f"open TCP between the hosts (firewall), at least port {port} and above 1024"
            findings.append(Finding(name, Check("master port", "fail", value, remedy)))
        else:
            ways[name] = way
    if not others:
        findings.append(Finding(head, Check("master port", "ok", f"{port} is free")))
        return findings, Meeting("127.0.0.1", port, {head: "lo"})
    findings += [Finding(name, _name_check(way, environment)) for name, way in ways.items()]
    if len(ways) < len(connections):
        return findings, None
    address = ways[others[0].host.name]["address"]
    value = f"{head} ({address}:{port}) is free, and reached from every host"
    findings.append(Finding("", Check("master port", "ok", value)))
    return findings, Meeting(address, port, {name: w["interface"] for name, w in ways.items()})


def _name_check(way: Mapping[str, Any], environment: Mapping[str, str]) -> Check:
    """Gloo listens where the host's own name points; Debian points it to 127.0.1.1."""
    title, chosen = "interface", environment.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return Check(title, "ok", f"GLOO_SOCKET_IFNAME={chosen}")
    right = way["interface"]
    if "name_error" in way:
        value = f"the host's own name {way['name']!r} has no address ({way['name_error']})"
    elif way["name_interface"] != right:
        value = f"the host's own name {way['name']!r} means {way['name_address']}, not {right}"
    else:
        return Check(title, "ok", f"{right}, as the host's own name says")
    remedy = f"export GLOO_SOCKET_IFNAME={right} NCCL_SOCKET_IFNAME={right}, or mend /etc/hosts"
    return Check(title, "warn", value, remedy)


def unanswered(host: str, title: str, failure: HostFailure) -> Finding:
    return Finding(host, Check(title, "fail", str(failure), "look at that host; then ask again"))
