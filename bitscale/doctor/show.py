"""Findings as a table for people and a tree for programs."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from bitscale.doctor.check import Check, Finding, has_failed

_NAMED_HOSTS = 3
_DISTINCT_ROWS = 3  # of one sound check; free memory and load are other numbers on every host
_NARROW = 24  # columns of text below which a remedy is not worth wrapping


def show(findings: Sequence[Finding], num_hosts: int) -> str:
    """A line for each distinct finding, hosts that say the same together; remedies below it."""
    groups = _groups(findings)
    rows = [
        (check, _hosts(hosts, num_hosts), f"{check.state:4}  {check.name}")
        for check, hosts in groups.items()
    ]
    left = max((len(label) for _, _, label in rows), default=0)
    middle = max((len(hosts) for _, hosts, _ in rows), default=0)
    indent = " " * (left + middle + 4)
    width = max(shutil.get_terminal_size((120, 24)).columns, len(indent) + _NARROW)
    lines = []
    for check, hosts, label in rows:
        head = f"{label:{left}}  {hosts:{middle}}  "
        lines.append(textwrap.fill(check.value, width, initial_indent=head,
                                   subsequent_indent=indent, break_on_hyphens=False))  # fmt: skip
        if check.remedy:
            lines.append(textwrap.fill(f"-> {check.remedy}", width, initial_indent=indent,
                                       subsequent_indent=indent + "   ",
                                       break_on_hyphens=False))  # fmt: skip
    return "\n".join([*lines, "", summary(findings, num_hosts)]) + "\n"


def _groups(findings: Sequence[Finding]) -> dict[Check, list[str]]:
    """Hosts by what was found; what is sound, but on many hosts in other words, is one group."""
    groups: dict[Check, list[str]] = {}
    for finding in findings:
        groups.setdefault(finding.check, []).append(finding.host)
    sound = Counter(check.name for check in groups if check.state == "ok")
    joined: dict[Check, list[str]] = {}
    first: dict[str, Check] = {}
    for check, hosts in groups.items():
        if check.state == "ok" and sound[check.name] > _DISTINCT_ROWS:
            short = replace(check, value=f"{check.value}; the others are sound, too")
            check = first.setdefault(check.name, short)
        joined.setdefault(check, []).extend(hosts)
    return joined


def summary(findings: Sequence[Finding], num_hosts: int) -> str:
    count = dict.fromkeys(("ok", "warn", "fail"), 0)
    for finding in findings:
        count[finding.check.state] += 1
    hosts = "1 host" if num_hosts == 1 else f"{num_hosts} hosts"
    verdict = "not fit for a run" if has_failed(findings) else "fit for a run"
    return (
        f"{hosts}: {verdict} ({count['ok']} ok, {count['warn']} warnings, {count['fail']} failed)"
    )


def to_tree(findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "ok": not has_failed(findings),
        "checks": [{"host": finding.host, **asdict(finding.check)} for finding in findings],
    }


def _hosts(hosts: Sequence[str], num_hosts: int) -> str:
    if hosts == [""]:
        return "all"
    if len(hosts) == num_hosts > 1:
        return f"all {num_hosts}"
    more = f" +{len(hosts) - _NAMED_HOSTS}" if len(hosts) > _NAMED_HOSTS else ""
    return ", ".join(hosts[:_NAMED_HOSTS]) + more
