"""`bitscale fit`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale fit runs/reproduce
  bitscale fit runs/reproduce --law qat-fraction --sweep qat-fraction --sweep transition-point
  bitscale fit other.csv --law chinchilla        (columns parameters, tokens, valid_loss)

laws: chinchilla, precision, floating-point, qid, qat-loss, qat-fraction, capacity; docs/fit.md has
their formulas, sources and columns. Without --law all are tried that the table can carry.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "fit",
        help="scaling laws on a table of results, with intervals",
        description="Fit laws to RESULTS (a .parquet or .csv, or a sweep's directory).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULTS", type=Path, help="table or directory")
    parser.add_argument("--law", action="append", default=[], metavar="NAME", help="see below")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="NAME", help="only rows of this sweep"
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such rows"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: fits beside the table")
    parser.add_argument("--resamples", type=int, default=400, metavar="N", help="default 400")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.errors import DataError
    from bitscale.fit.report import ALL, fit_table, show, write_report

    folder = args.results if args.results.is_dir() else args.results.parent
    out = args.out or folder / "fits"
    for text in args.where:
        if "=" not in text:
            raise DataError(f"--where {text!r} is not of the form COLUMN=VALUE")
    where = [tuple(text.split("=", 1)) for text in args.where]
    fitted = 0
    for law in args.law or ALL:
        try:
            report = fit_table(
                args.results, law, sweeps=args.sweep, where=where, resamples=args.resamples
            )
        except DataError as error:
            if args.law or not args.results.exists():
                raise
            print(f"{law}: not fitted: {error}")
            continue
        fitted += 1
        print("\n".join(show(report)))
        print(f"  wrote {', '.join(str(path) for path in write_report(report, out))}")
    if not fitted:
        raise DataError(f"{args.results} carries none of the laws; finish more cells")
    return 0
