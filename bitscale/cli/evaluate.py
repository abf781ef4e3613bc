"""`bitscale eval`."""

import argparse
from pathlib import Path

_EPILOG = """\
examples:
  bitscale eval runs/quickstart/run
  bitscale eval runs/quickstart/packed --split test
  bitscale eval runs/quickstart/run --corpus data/other --json result.json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "eval",
        help="held-out loss, perplexity and bits per byte",
        description="Held-out loss of a run, a checkpoint or a packed export, at its own λ.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="run, checkpoint or export")
    parser.add_argument(
        "--corpus",
        action="append",
        type=Path,
        metavar="DIR",
        help="prepared corpus (default: those of the training run)",
    )
    parser.add_argument("--split", default="valid", help="train, valid (default) or test")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--seq-len", type=int, metavar="N", help="default: as in training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json

    from bitscale.convert import load_model
    from bitscale.evaluate import evaluate_loaded

    loaded = load_model(args.model)
    result = evaluate_loaded(
        loaded.model,
        args.corpus or [Path(path) for path in loaded.corpora],
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        split=args.split,
        seq_len=args.seq_len or loaded.seq_len,
        batch_size=args.batch_size,
        reset_attention=loaded.reset_attention,
        device=args.device,
    )
    print(
        f"{args.model}: step {loaded.step:,}, λ {loaded.strength.weight:g}/"
        f"{loaded.strength.activation:g}, {args.split}: loss {result.loss:.4f}  perplexity "
        f"{result.perplexity:.2f}  {result.bits_per_byte:.4f} bits/byte  "
        f"({result.num_tokens:,} tokens)"
    )
    if args.json:
        figures = {"model": str(args.model), "split": args.split, "step": loaded.step}
        args.json.write_text(json.dumps({**figures, **result._asdict()}, indent=2) + "\n")
    return 0
