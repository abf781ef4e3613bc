"""`bitscale runs`."""

import argparse
import json
from pathlib import Path

_EPILOG = """\
examples:
  bitscale runs runs
  bitscale runs runs/sweep --state running,stalled
  bitscale runs runs --json | jq -r '.[] | select(.state == "killed") | .run_dir'
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "runs",
        help="all runs below a folder: state, step, loss, speed",
        description="List every run below a folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder that holds runs")
    parser.add_argument("--state", metavar="A,B", help="only runs in these states (see status)")
    parser.add_argument("--json", action="store_true", help="a JSON list of what status gives")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from typing import get_args

    from bitscale.errors import DataError
    from bitscale.status import as_json, find_runs, read_status, show_runs
    from bitscale.status.read import State

    wanted = {name.strip() for name in (args.state or "").split(",") if name.strip()}
    if unknown := sorted(wanted - set(get_args(State))):
        raise DataError(f"--state {unknown[0]!r} is none; use {', '.join(get_args(State))}")
    runs = [read_status(path) for path in find_runs(args.folder)]
    if wanted:
        runs = [run for run in runs if run.state in wanted]
    if args.json:
        print(json.dumps([as_json(run) for run in runs], ensure_ascii=False))
    elif runs:
        print(show_runs(runs))
    else:
        print(f"no {'such ' if wanted else ''}runs below {args.folder}")
    return 0
