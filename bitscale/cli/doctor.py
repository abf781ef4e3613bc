"""`bitscale doctor`."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("doctor", help="is this host, or cluster, fit for a run")
    parser.add_argument(
        "--print-environment",
        action="store_true",
        help="print the variables that launchers hand to other hosts, NAME=VALUE a line",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import os

    from bitscale.environment import exported

    for name, value in exported(os.environ).items():
        print(f"{name}={value}")
    return 0
