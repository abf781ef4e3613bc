"""`bitscale recommend`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale recommend --params 350e6 --tokens 7e9 --out configs/mine.yaml
  bitscale recommend --params 1e6 --tokens 20e6 --evidence runs/reproduce/fits/qat-fraction.json

The configuration goes to stdout or to --out; the comments at its head say what every choice rests
on, how sure it is, and where it is extrapolated. `bitscale plan` reckons what it takes.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "recommend",
        help="a configuration for a size and a budget, with its evidence",
        description="When to switch to ternary, and with which learning rate and ramp.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=float, required=True, metavar="N", help="parameters")
    parser.add_argument("--tokens", type=float, required=True, metavar="D", help="training tokens")
    parser.add_argument(
        "--evidence",
        type=Path,
        metavar="JSON",
        help="a fit of the QAT fraction (default: the paper's)",
    )
    parser.add_argument(
        "--corpus", default="data/corpus", metavar="DIR", help="for the data section"
    )
    parser.add_argument("--run-dir", default="runs/recommended", metavar="DIR", help="for run.dir")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="default: by size")
    parser.add_argument("--seq-len", type=int, metavar="N", help="default: by size")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.errors import ConfigError
    from bitscale.fit.recommend import read_evidence, recommend

    found = recommend(
        args.params,
        args.tokens,
        evidence=read_evidence(args.evidence) if args.evidence else None,
        corpus=args.corpus,
        run_dir=args.run_dir,
        vocab_size=args.vocab_size,
        seq_len=args.seq_len,
    )
    if args.out is None:
        print(found.text(), end="")
        return 0
    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists; name another file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(found.text(), encoding="utf-8")
    print("\n".join(found.notes))
    print(f"wrote {args.out}")
    return 0
