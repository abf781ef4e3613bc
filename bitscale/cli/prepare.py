"""`bitscale prepare`: text to token shards."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Tokenize text into Megatron-format token shards (train, valid, test) with a manifest.
Resumes after an interruption; does nothing when the output is up to date.

INPUT is a file, a folder (read recursively in sorted order), a Hugging Face dataset
(with --format hf), or builtin:python-docs, documentation of the running Python (2 MB)."""

EPILOG = """\
examples:
  bitscale prepare builtin:python-docs --out data/docs
  bitscale prepare books/ --out data/books --train-tokenizer unigram --vocab-size 8192
  bitscale prepare a.jsonl.zst b.parquet --out data/web --tokenizer llama/tokenizer.json \\
      --text-key content --split 0.999,0.001,0
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "prepare",
        help="tokenize text into token shards",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace DIR, discard an interrupted run")
    add("--workers", type=int, metavar="N", help="processes (default: every core)")
    add(
        "--split",
        type=_shares,
        default=(0.98, 0.01, 0.01),
        metavar="TRAIN,VALID,TEST",
        help="shares by hash of the document, 0 leaves a split out (default: 0.98,0.01,0.01)",
    )

    tokenizer = parser.add_argument_group("tokenizer")
    exclusive = tokenizer.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="a sentencepiece .model or a tokenizer.json"
    )
    exclusive.add_argument(
        "--train-tokenizer",
        choices=("bpe", "unigram"),
        default="bpe",
        help="train a sentencepiece model on the train split (default: bpe)",
    )
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="pieces to train (default: 4096, for up to 100 MB of text; use 32768 for real runs)",
    )
    tokenizer.add_argument(
        "--eod-token", metavar="PIECE", help="separates documents (default: the declared one)"
    )

    source = parser.add_argument_group("reading the inputs")
    add = source.add_argument
    add(
        "--format",
        choices=("auto", "text", "jsonl", "parquet", "hf"),
        default="auto",
        help="of every input (default: auto, by the file's suffix)",
    )
    add("--text-key", default="text", metavar="KEY", help="key or column of the text")
    add("--hf-config", metavar="NAME", help="configuration of the dataset")
    add("--hf-split", default="train", metavar="NAME", help="split of the dataset to read")
    add("--hf-revision", metavar="REV", help="revision of the dataset")
    add(
        "--encoding-errors",
        choices=("strict", "replace"),
        default="strict",
        help="refuse invalid UTF-8 (default) or replace it by U+FFFD",
    )
    add(
        "--section-bytes",
        type=int,
        default=65536,
        metavar="N",
        help="cut longer text files at blank lines into documents (default: 65536; 0: keep whole)",
    )


def run(args: argparse.Namespace) -> int:
    from bitscale.data.prepare import PrepareOptions, prepare
    from bitscale.data.sources import SourceOptions

    source = SourceOptions(
        format=args.format,
        text_key=args.text_key,
        hf_config=args.hf_config,
        hf_split=args.hf_split,
        hf_revision=args.hf_revision,
        encoding_errors=args.encoding_errors,
        section_bytes=args.section_bytes,
    )
    options = PrepareOptions(
        inputs=tuple(args.inputs),
        out=args.out,
        source=source,
        tokenizer=args.tokenizer,
        model_type=args.train_tokenizer,
        vocab_size=args.vocab_size,
        eod_token=args.eod_token,
        split=args.split,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    prepare(options)
    return 0


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, valid, test = (float(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not three numbers such as 0.98,0.01,0.01"
        ) from None
    return train, valid, test
