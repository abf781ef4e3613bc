"""`bitscale verify`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale verify runs/quickstart/run packed
  bitscale verify runs/quickstart/run hf --text book.txt
  bitscale verify packed hf --json verdict.json
  bitscale verify runs/quickstart/run model.gguf --text book.txt --llama-cpp llama.cpp/build/bin

A is computed by bitscale, B by the program that its format is made for (a Hugging Face directory
by transformers). Exit code 0: the same model; 1: not; 2: one of them could not be read.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "verify",
        help="whether two forms of a model are the same model",
        description="Compare two forms of a model: codes exactly, logits and perplexity within "
        "bounds (docs/conversion.md).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="run, checkpoint, export or model")
    parser.add_argument("b", metavar="B", type=Path, help="run, checkpoint, export or model")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to compare on")
    parser.add_argument(
        "--tokens", type=int, default=2048, metavar="N", help="to compare on (default 2048)"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="PATH",
        help="let this llama-perplexity (or the one in this directory) compute B, a GGUF file",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="whose model section describes a DeepSpeed checkpoint that does not do so itself",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from bitscale.cli.json_file import refuse_unwritable, write_json

    refuse_unwritable(args.json)
    from bitscale.config import load_config
    from bitscale.convert.verify import verify
    from bitscale.sources.as_model import open_model  # and torch, which takes seconds

    cfg = args.config and load_config(args.config)
    a, b = open_model(args.a, cfg), open_model(args.b, cfg)
    checks = verify(a, b, text=args.text, num_tokens=args.tokens, program=args.llama_cpp)
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.figures}")
    same = all(check.passed for check in checks)
    print(f"{args.b} is {'' if same else 'NOT '}the model of {args.a}")
    if args.json:
        result = {"same": same, "checks": [check._asdict() for check in checks]}
        write_json(args.json, result)
    return 0 if same else 1
