"""`bitscale status`."""

import argparse
import json
import sys
import time
from pathlib import Path

_EPILOG = """\
examples:
  bitscale status runs/base
  bitscale status runs/base --watch
  bitscale status runs/base --json | jq .state
  bitscale status runs/base --stacks

states: running; stalled (ranks live but make no progress, or one is lost); finished; stopped (by a
signal or train.stop_step, after saving); failed (a rank said so); killed (no process is left);
unknown (no heartbeats). docs/watching.md says how each is told.
"""
_INTERVAL_SECONDS = 2.0
_CLEAR = "\x1b[2J\x1b[H"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "status",
        help="what a run is doing: state, step, loss, speed, every rank",
        description="Show what a run is doing, from its metrics and heartbeats.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="show it anew until the run ends")
    what.add_argument("--json", action="store_true", help="one JSON object")
    what.add_argument(
        "--stacks", action="store_true", help="stacks of every rank; on other hosts: how"
    )
    parser.add_argument("--all", action="store_true", help="every rank, not only 16")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.status import as_json, read_status, show_status, write_stacks

    status = read_status(args.run_dir)
    if args.json:
        print(json.dumps(as_json(status), ensure_ascii=False))
    elif args.stacks:
        print("\n".join(write_stacks(args.run_dir)))
    elif args.watch:
        _watch(args.run_dir, args.all)
    else:
        print(show_status(status, all_ranks=args.all))
    return 0


def _watch(run_dir: Path, all_ranks: bool) -> None:
    from bitscale.status import read_status, show_status

    try:
        while True:
            status = read_status(run_dir)
            text = show_status(status, all_ranks=all_ranks)
            print(f"{_CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n", flush=True)
            if status.state not in ("running", "stalled"):
                return
            time.sleep(_INTERVAL_SECONDS)
    except KeyboardInterrupt:
        return
