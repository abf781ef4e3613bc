"""`bitscale supervise`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale supervise configs/7b.yaml --hostfile hosts
  bitscale supervise configs/7b.yaml train.steps=2000 --hostfile hosts --max-restarts 5
  bitscale supervise fork.yaml --hostfile hosts --resume runs/trunk/checkpoints/step-00001000

HOSTFILE has a line `NAME slots=RANKS` for each host, as for `deepspeed --hostfile`; ssh has to
reach each by that name without a password, and repository, Python and run directory have the same
path everywhere. When a rank or a host dies, stalls or falls silent, all ranks are stopped, and
training continues from the last checkpoint on the hosts that answer (with fewer of them each rank
accumulates more micro-batches). RUN/supervisor.jsonl has one line for each of these events.

exit codes: 0 done; 1 given up; 2 bad input, or a rank said so; 75 stopped by SIGTERM or Ctrl-C
after saving
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "supervise",
        help="train on many hosts, and go on after a failure",
        description="Train as CONFIG says on the hosts of HOSTFILE, watched, until it is done.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted override, e.g. train.steps=200"
    )
    parser.add_argument("--hostfile", required=True, type=Path, help="lines of NAME slots=RANKS")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH",
        help="what a run that has not begun starts from (default: %(default)s); one that has "
        "always continues from its own checkpoint",
    )
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    parser.add_argument(
        "--max-restarts",
        type=_count,
        default=3,
        metavar="N",
        help="restarts in a row that bring no new checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--min-hosts",
        type=_count,
        default=1,
        metavar="N",
        help="give up rather than train on fewer (default: %(default)s)",
    )
    _add_bounds(parser)
    parser.add_argument("--ssh-port", type=_count, metavar="PORT")
    parser.add_argument(
        "--master-addr",
        metavar="NAME",
        help="where ranks meet: the first host, as the others know it (default: its name)",
    )
    parser.add_argument(
        "--master-port", type=_count, metavar="PORT", help="default: one that is free there"
    )
    parser.set_defaults(run=run)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    for name, default, meaning in (
        ("connect", 30, "until a host has answered"),
        ("host", 30, "that a host may be silent; its ranks then end by themselves"),
        ("heartbeat", 60, "that one rank may write no heartbeat while others do"),
        ("stall", 1800, "without progress on any rank (compilation and saving included)"),
        ("save", 300, "from a request to stop to the last rank's end"),
    ):
        parser.add_argument(
            f"--{name}-seconds",
            type=_seconds,
            default=float(default),
            metavar="S",
            help=f"{meaning} (default: {default})",
        )


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def run(args: argparse.Namespace) -> int:
    from bitscale.config import load_config
    from bitscale.hostfile import read_hostfile
    from bitscale.supervisor.attempt import Bounds
    from bitscale.supervisor.link import SshOptions
    from bitscale.supervisor.loop import Options, supervise

    cfg = load_config(args.config, args.overrides)
    allowed = [text for key in args.allow_change for text in ("--allow-change", key)]
    options = Options(
        hosts=read_hostfile(args.hostfile),
        train_arguments=[args.config, *args.overrides, *allowed],
        resume=args.resume,
        max_restarts=args.max_restarts,
        min_hosts=args.min_hosts,
        ssh=SshOptions(args.ssh_port, args.connect_seconds, args.host_seconds),
        bounds=Bounds(args.heartbeat_seconds, args.stall_seconds, args.save_seconds),
        master_address=args.master_addr,
        master_port=args.master_port,
    )
    return supervise(cfg, options)
