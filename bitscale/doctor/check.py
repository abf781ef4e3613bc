"""What an examination says: one `Check` a question, one `Report` a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The answer to one question. A warning costs speed or comfort; a failure costs the run."""

    name: str
    state: State
    value: str  # what was found
    remedy: str = ""  # what to do about it; empty if ok


@dataclass(frozen=True)
class Report:
    """What a host says about itself."""

    host: str
    checks: list[Check]
    facts: dict[str, str] = field(default_factory=dict)  # what hosts of one run are compared by

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of_tree(tree: dict[str, Any]) -> Report:
        return Report(tree["host"], [Check(**check) for check in tree["checks"]], tree["facts"])


@dataclass(frozen=True)
class Finding:
    """A check with the host that it is about; "" is about all of them together."""

    host: str
    check: Check


@dataclass(frozen=True)
class Examination:
    """Everything that was found, of one host or many."""

    findings: list[Finding]
    reports: dict[str, Report] = field(default_factory=dict)  # by host
    figures: dict[str, Any] = field(default_factory=dict)  # of the all-reduce


def has_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.check.state == "fail" for finding in findings)
