"""`bitscale doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitscale.doctor.check import Examination, Finding

_EPILOG = """\
examples:
  bitscale doctor                                        this host, and its GPUs together
  bitscale doctor --hostfile hostfile --config configs/7b.yaml
  bitscale doctor --hostfile hostfile --run-dir /shared/runs --json > doctor.json
  bitscale doctor --local --quick                        a health check: no torch, under a second
  bitscale doctor --hostfile hostfile --ssh-only         does ssh reach every host
  bitscale doctor --print-environment > env.txt          what launchers hand to other hosts

exit code: 0 fit for a run (with warnings, maybe), 1 a check failed, 2 bad arguments
(--ssh-only: 2 if a host is not reached)
"""
_MASTER_PORT = 29500


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="is this host, or are the hosts of a hostfile, fit for a run",
        description="Examine software, limits, memory, disks and GPUs of this host or of every "
        "host of a hostfile; compare the hosts (versions, source, clocks, shared directory, "
        "ports); measure an all-reduce over them and name the slowest rank and link.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override of --config")
    parser.add_argument("--hostfile", type=Path, metavar="H", help="lines 'NAME slots=N'")
    parser.add_argument("--config", metavar="C", help="configuration of the run to come")
    parser.add_argument("--run-dir", type=Path, metavar="D", help="default: run.dir of --config")
    parser.add_argument(
        "--port", type=int, metavar="P", help="master port (default: MASTER_PORT, or 29500)"
    )
    parser.add_argument(
        "--ssh", default="ssh", metavar="COMMAND", help="as in --ssh 'ssh -p 2222' (default: ssh)"
    )
    parser.add_argument(
        "--ssh-only",
        action="store_true",
        help="only log in to every host of --hostfile; an error names those that are not reached",
    )
    parser.add_argument(
        "--answer-seconds", type=float, default=60.0, metavar="S", help="to wait for a host (60)"
    )
    parser.add_argument(
        "--share-seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="to wait until a host sees the files of the others (15; NFS shows them late)",
    )
    parser.add_argument("--no-network", action="store_true", help="measure no all-reduce")
    parser.add_argument("--local", action="store_true", help="this host by itself only")
    parser.add_argument("--quick", action="store_true", help="with --local: import no torch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--print-environment",
        action="store_true",
        help="only print the variables that launchers hand to other hosts, NAME=VALUE a line",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json
    import os

    from bitscale.doctor.check import has_failed
    from bitscale.doctor.show import show, to_tree
    from bitscale.environment import exported

    _check_arguments(args)
    if args.print_environment:
        for name, value in exported(os.environ).items():
            print(f"{name}={value}")
        return 0
    if args.ssh_only:
        _require_ssh(args)
        return 0
    examination, num_hosts = _local(args) if args.local else _cluster(args)
    findings = examination.findings
    if args.json:
        reports = {name: report.to_tree() for name, report in examination.reports.items()}
        more = {"hosts": reports, "network": examination.figures}
        print(json.dumps({**to_tree(findings), **more}, indent=2))
    else:
        print(show(findings, num_hosts), end="")
    return 1 if has_failed(findings) else 0


def _check_arguments(args: argparse.Namespace) -> None:
    from bitscale.errors import ConfigError

    if args.overrides and args.config is None:
        raise ConfigError(f"{args.overrides[0]!r} overrides a configuration; name it by --config")
    if args.local and args.hostfile is not None:
        raise ConfigError("--local is about this host, --hostfile about others; drop one of them")
    if args.quick and not args.local:
        raise ConfigError("--quick leaves out what needs other hosts; add --local")
    if args.ssh_only and args.hostfile is None:
        raise ConfigError("--ssh-only logs in to the hosts of a hostfile; name it by --hostfile")
    for option in ("answer", "share"):
        seconds = getattr(args, f"{option}_seconds")
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"--{option}-seconds {seconds:g} is not a time above 0")
    if args.port is not None and not 0 < args.port < 65536:
        raise ConfigError(f"--port {args.port} is not a port; use 1024 to 65535")


def _master_port(text: str) -> int:
    from bitscale.errors import ConfigError

    if text and not text.isdecimal():  # Kubernetes sets it to tcp://... for a service "master"
        raise ConfigError(f"MASTER_PORT={text!r} is not a port; unset it, or give --port")
    return int(text or _MASTER_PORT)


def _ssh(args: argparse.Namespace) -> list[str]:
    import shlex
    import shutil

    from bitscale.errors import ConfigError

    try:
        command = shlex.split(args.ssh)
    except ValueError as error:
        raise ConfigError(f"--ssh {args.ssh!r}: {error}; write it as for a shell") from None
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(
            f"--ssh {args.ssh!r}: this host has no such program; install openssh-client, or name "
            "another"
        )
    return command


def _require_ssh(args: argparse.Namespace) -> None:
    from bitscale.doctor.reach import require_ssh
    from bitscale.hostfile import read_hostfile

    require_ssh(read_hostfile(args.hostfile), _ssh(args), args.answer_seconds)


def _local(args: argparse.Namespace) -> tuple[Examination, int]:
    from bitscale.doctor.check import Examination, Finding
    from bitscale.doctor.host import examine_host

    findings: list[Finding] = []
    needed_bytes, run_dir = 0, args.run_dir
    if args.config is not None:
        from bitscale.config import load_config
        from bitscale.doctor.cluster import checkpoints_on_disk

        cfg = load_config(args.config, args.overrides)
        findings, needed_bytes = checkpoints_on_disk(cfg)
        run_dir = run_dir or Path(cfg.run.dir)
    report = examine_host(quick=args.quick, run_dir=run_dir, needed_bytes=needed_bytes)
    findings += [Finding(report.host, check) for check in report.checks]
    return Examination(findings, {report.host: report}), 1


def _cluster(args: argparse.Namespace) -> tuple[Examination, int]:
    import os
    import platform

    from bitscale.config import load_config
    from bitscale.doctor.cluster import Request, examine_cluster
    from bitscale.doctor.gpus import examine_gpus
    from bitscale.environment import exported
    from bitscale.hostfile import Host, read_hostfile

    cfg = None if args.config is None else load_config(args.config, args.overrides)
    if args.hostfile is not None:
        hosts = read_hostfile(args.hostfile)
    else:
        hosts = [Host(platform.node(), max(examine_gpus()[2], 1))]
    run_dir = args.run_dir or (Path(cfg.run.dir) if cfg else None)
    request = Request(
        hosts=hosts,
        local=args.hostfile is None,
        ssh=[] if args.hostfile is None else _ssh(args),
        environment={} if args.hostfile is None else exported(os.environ),
        port=args.port or _master_port(os.environ.get("MASTER_PORT", "")),
        config=cfg,
        # Absolute: hosts must mean the same directory.
        run_dir=None if run_dir is None else str(run_dir.absolute()),
        with_network=not args.no_network,
        answer_seconds=args.answer_seconds,
        share_seconds=args.share_seconds,
    )
    return examine_cluster(request), len(hosts)
