"""The whole examination: each host by itself, then all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bitscale.config import Config, check_world_size
from bitscale.doctor.check import Check, Examination, Finding, Report
from bitscale.doctor.compare import (
    compare_clocks,
    compare_directory,
    compare_facts,
    find_meeting,
    unanswered,
)
from bitscale.doctor.hosts import Connection, HostFailure, agent_command, on_each
from bitscale.doctor.network import measure
from bitscale.errors import ConfigError, DataError
from bitscale.hostfile import Host
from bitscale.plan import Cluster, checkpoint_bytes, find_gpu, make_layout

_EXAMINE_SECONDS = 180.0  # importing torch from a cold network disk takes long


@dataclass(frozen=True)
class Request:
    """What to examine. Hosts are reached by `ssh`, or are this one alone if `local`."""

    hosts: Sequence[Host]
    local: bool
    ssh: Sequence[str]
    environment: Mapping[str, str]  # what a launch would hand to the ranks
    port: int  # where rank 0 would listen; 0: any
    config: Config | None
    run_dir: str | None
    with_network: bool
    answer_seconds: float  # for a host's first answer: connecting, starting Python
    share_seconds: float  # until a host sees what others wrote


def examine_cluster(request: Request) -> Examination:
    """Every check that applies. A host that does not answer is a finding, not an error."""
    findings, needed_bytes = config_findings(request.config, sum(h.slots for h in request.hosts))
    with ExitStack() as stack:
        connections = []
        for host in request.hosts:
            name = None if request.local else host.name
            command = agent_command(name, request.ssh, request.environment)
            connections.append(Connection(host, command))
            stack.callback(connections[-1].close)
        answering, silent = _greet(connections, request)
        findings += silent
        if not answering:
            return Examination(findings)
        reports, unexamined = _examine_each(answering, request.run_dir, needed_bytes)
        findings += unexamined
        findings += [Finding(h, check) for h, report in reports.items() for check in report.checks]
        alive = [c for c in answering if c.host.name in reports]
        figures: dict[str, Any] = {}
        if alive:
            together, figures = _examine_together(alive, reports, request)
            findings += together
    return Examination(findings, reports, figures)


def _greet(
    connections: Sequence[Connection], request: Request
) -> tuple[list[Connection], list[Finding]]:
    answers = on_each(lambda c: c.ask("hello", seconds=request.answer_seconds), connections)
    answering, findings = [], []
    for connection, answer in zip(connections, answers, strict=True):
        name = connection.host.name
        if isinstance(answer, HostFailure):
            remedy = (
                f"make '{' '.join(request.ssh)} {name} true' work without a question (key, "
                "known_hosts), and this Python and folder exist there at the same paths"
            )
            findings.append(Finding(name, Check("ssh", "fail", str(answer), remedy)))
            continue
        answering.append(connection)
        if not request.local:
            value = "logs in without a password, and finds bitscale"
            findings.append(Finding(name, Check("ssh", "ok", value)))
    return answering, findings


def _examine_each(
    connections: Sequence[Connection], run_dir: str | None, needed_bytes: int
) -> tuple[dict[str, Report], list[Finding]]:
    answers = on_each(
        lambda c: c.ask(
            "examine", seconds=_EXAMINE_SECONDS, run_dir=run_dir, needed_bytes=needed_bytes
        ),
        connections,
    )
    reports, findings = {}, []
    for connection, answer in zip(connections, answers, strict=True):
        name = connection.host.name
        if isinstance(answer, HostFailure):
            findings.append(unanswered(name, "host", answer))
        else:
            reports[name] = Report.of_tree(answer)
    return reports, findings


def _examine_together(
    alive: Sequence[Connection], reports: Mapping[str, Report], request: Request
) -> tuple[list[Finding], dict[str, Any]]:
    findings = compare_facts(reports)
    device, slots = _device(alive, reports)
    findings += slots
    if request.config is not None:
        findings += _data(alive, request.config)
    if len(alive) > 1:
        findings += compare_clocks(alive)
        if request.run_dir is not None:
            findings += compare_directory(alive, request.run_dir, request.share_seconds)
    meeting_findings, meeting = find_meeting(alive, request.port, request.environment)
    findings += meeting_findings
    if not request.with_network or meeting is None or sum(c.host.slots for c in alive) < 2:
        return findings, {}
    measured, figures = measure(alive, meeting, request.environment, device)
    return findings + measured, figures


def _device(
    alive: Sequence[Connection], reports: Mapping[str, Report]
) -> tuple[str, list[Finding]]:
    """What ranks run on, and a finding for a host that has fewer GPUs than the others' ranks."""
    gpus = {c.host.name: int(reports[c.host.name].facts.get("gpus", 0)) for c in alive}
    if not any(gpus.values()):
        return "cpu", []
    findings = []
    for connection in alive:
        name, slots = connection.host.name, connection.host.slots
        if gpus[name] < slots:
            value = f"{gpus[name]} GPUs for {slots} ranks"
            remedy = f"write slots={gpus[name]} in the hostfile, or leave the host out"
            findings.append(Finding(name, Check("slots", "fail", value, remedy)))
    return ("cpu" if findings else "cuda"), findings


def _data(alive: Sequence[Connection], cfg: Config) -> list[Finding]:
    paths = [str(corpus.path) for corpus in cfg.data.corpora]
    answers = on_each(lambda c: c.ask("missing", seconds=30.0, paths=paths), alive)
    findings = []
    for connection, missing in zip(alive, answers, strict=True):
        name = connection.host.name
        if isinstance(missing, HostFailure):
            findings.append(unanswered(name, "data", missing))
        elif missing:
            value = f"not there: {', '.join(missing)}"
            remedy = "copy the corpus, or mount it at the same path on every host"
            findings.append(Finding(name, Check("data", "fail", value, remedy)))
        else:
            findings.append(Finding(name, Check("data", "ok", f"{len(paths)} corpora are there")))
    return findings


def config_findings(cfg: Config | None, world_size: int) -> tuple[list[Finding], int]:
    """Whether the configuration fits the ranks; bytes that its checkpoints need on disk."""
    if cfg is None:
        return [], 0
    try:
        check_world_size(cfg, world_size)
    except ConfigError as error:
        remedy = "use another number of hosts or slots, or change the configuration"
        return [Finding("", Check("config", "fail", str(error), remedy))], 0
    fits = Finding("", Check("config", "ok", f"fits a world of {world_size}"))
    findings, needed_bytes = checkpoints_on_disk(cfg)
    return [fits, *findings], needed_bytes


def checkpoints_on_disk(cfg: Config) -> tuple[list[Finding], int]:
    """Bytes that the checkpoints of a run need at most; a finding if that is not known."""
    smallest = Cluster(1, cfg.parallel.tp * cfg.parallel.pp, find_gpu("cpu"))
    try:
        each = checkpoint_bytes(make_layout(_with_vocabulary(cfg), smallest))
    except (ConfigError, DataError) as error:
        value = f"the size of its checkpoints is not known: {error}"
        return [Finding("", Check("config", "warn", value, "bitscale plan says more"))], 0
    # One is written in full before the oldest goes.
    return [], each * (cfg.checkpoint.keep_last + 1)


def _with_vocabulary(cfg: Config) -> Config:
    """`cfg` with the size of the corpus's vocabulary, where it leaves that to the corpus."""
    if cfg.model.vocab_size is not None:
        return cfg
    from bitscale.data.corpus import load_corpus

    size = load_corpus(cfg.data.corpora[0].path).vocab_size
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": size})})
