"""`bitscale report`: what happened in one or several runs."""

import argparse
from pathlib import Path

EPILOG = """examples:
  bitscale report runs/base
  bitscale report runs/at-20 runs/at-50 runs/at-80 --out reports/when --names 20%,50%,80%
  bitscale report runs/base --x steps --smooth 50

writes report.html (one self-contained page), report.png and summary.json; docs/report.md
defines every figure. A run in progress can be reported too.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the `report` command."""
    parser = subparsers.add_parser(
        "report",
        help="draw and compare runs: loss, λ, spike, speed",
        description="Draw and compare runs: loss, ternary strength, transition spike, speed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run directory or metrics.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: RUN/report, or ./report for several runs"
    )
    parser.add_argument(
        "--names", type=_comma_list, metavar="A,B", help="default: the directories' names"
    )
    parser.add_argument(
        "--x", choices=("tokens", "steps"), default="tokens", help="horizontal axis"
    )
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="steps averaged by the loss line (default: 1%%)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and print its table."""
    from bitscale.report import console_table, default_out_dir, write_report

    out_dir = args.out or default_out_dir(args.runs)
    summaries = write_report(args.runs, out_dir, names=args.names, x=args.x, smooth=args.smooth)
    print(console_table(summaries))
    print(f"wrote {out_dir / 'report.html'}, report.png, summary.json")
    return 0


def _comma_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
