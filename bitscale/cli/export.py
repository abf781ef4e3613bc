"""`bitscale export`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale export runs/quickstart/run packed
  bitscale export runs/quickstart/run/checkpoints/step-00000200 packed
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a ternary checkpoint as packed 2-bit weights",
        description="Write a ternary checkpoint as packed 2-bit weights (docs/checkpoints.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="run directory or checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="new directory")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.convert import open_source
    from bitscale.convert.packed import export_packed

    source = open_source(args.source)
    content = export_packed(source, args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(
        f"exported {source.path} to {args.out}: {size / 2**20:.2f} MiB, "
        f"codes sha256 {content['codes_sha256'][:16]}"
    )
    return 0
