"""`bitscale eval`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitscale.mesh import Mesh
    from bitscale.scoring.held_out import HeldOut
    from bitscale.scoring.model import ScoredModel
    from bitscale.scoring.results import Scores

_EPILOG = """\
examples:
  bitscale eval runs/quickstart/run
  bitscale eval runs/a runs/b packed --out results.json
  bitscale eval runs/a --text book.txt --stride 64
  bitscale eval runs/a runs/b --tasks bitscale_olmo11
  bitscale eval runs/a --tasks piqa,copa --data-dir data/eval --limit 200
  torchrun --nproc-per-node 2 -m bitscale.cli.main eval runs/a --tp 2 --tasks sciq

Without --text, --corpus or --tasks: the validation split of the corpora of the training. Several
models are compared with the first: ± is a standard error, Δ a paired difference. bitscale_olmo11
are the eleven tasks of arXiv:2502.11895. Details: docs/evaluation.md.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "eval",
        help="held-out loss, perplexity, bits per byte, and lm-eval's tasks",
        description="Score runs, checkpoints and exports, each at its own λ: text and tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", metavar="MODEL", type=Path, nargs="+", help="run, checkpoint or export"
    )
    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--corpus",
        action="append",
        type=Path,
        metavar="DIR",
        help="prepared corpus (default: those of the training run)",
    )
    text.add_argument("--split", default="valid", help="train, valid (default) or test")
    text.add_argument(
        "--text", action="append", type=Path, metavar="FILE", help="UTF-8 text instead of a corpus"
    )
    text.add_argument(
        "--stride",
        type=_positive,
        metavar="N",
        help="targets of each window: the last N (default: --seq-len, no overlap)",
    )
    tasks = parser.add_argument_group("tasks (pip install 'bitscale[eval]')")
    tasks.add_argument("--tasks", metavar="NAMES", help="of lm-eval, with commas between them")
    tasks.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="TASK.jsonl files, instead of the hub"
    )
    parser.add_argument(
        "--limit", type=_positive, metavar="N", help="items a task, and windows a text, at most"
    )
    parser.add_argument(
        "--seq-len", type=_positive, metavar="N", help="tokens a window (default: as in training)"
    )
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="if it has moved since")
    parser.add_argument("--tp", type=_positive, default=1, metavar="N", help="ranks a model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write results there (JSON)")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def run(args: argparse.Namespace) -> int:
    from bitscale.mesh import close_mesh
    from bitscale.scoring import results
    from bitscale.scoring.model import open_ranks
    from bitscale.scoring.tasks import load_tasks

    if args.out:
        results.refuse_unwritable(args.out)
    mesh = open_ranks(args.device, args.tp)
    names = args.tasks.split(",") if args.tasks else []
    tasks = load_tasks(names, args.data_dir) if names else {}
    scores = [_score(args, path, mesh, tasks) for path in args.models]
    if mesh.is_main:
        if scores[0].held_out is not None:
            print(results.held_out_table(scores))
        if tasks:
            print(results.task_table(scores))
        if args.out:
            settings = {
                "split": None if args.text else args.split,
                "corpora": [str(path) for path in args.corpus or ()] or None,
                "text": [str(path) for path in args.text or ()] or None,
                "seq_len": args.seq_len,
                "stride": args.stride,
                "tasks": names or None,
                "data_dir": args.data_dir and str(args.data_dir),
                "limit": args.limit,
                "batch_size": args.batch_size,
                "tp": args.tp,
                "num_ranks": mesh.world_size,
                "device": mesh.device.type,
            }
            results.write(args.out, results.document(scores, settings))
    close_mesh()
    return 0


def _score(
    args: argparse.Namespace, path: Path, mesh: "Mesh", tasks: dict[str, object]
) -> "Scores":
    from bitscale.scoring.model import open_model, open_tokenizer
    from bitscale.scoring.results import Scores
    from bitscale.scoring.tasks import score_tasks

    scored = open_model(path, mesh, args.tp, args.seq_len)
    held_out = None
    if args.text or args.corpus or not tasks:
        held_out = _score_held_out(args, scored)
    found = {}
    if tasks:
        tokenizer = open_tokenizer(scored.source, args.tokenizer)
        found = score_tasks(
            scored, tasks, tokenizer=tokenizer, batch_size=args.batch_size, limit=args.limit
        )
    return Scores(str(path), scored.source, held_out, found)


def _score_held_out(args: argparse.Namespace, scored: "ScoredModel") -> "HeldOut":
    from contextlib import AbstractContextManager, nullcontext

    from tqdm import tqdm

    from bitscale.scoring.held_out import Text, corpus_texts, score_held_out, text_files
    from bitscale.scoring.model import open_tokenizer

    source = scored.source
    opened: AbstractContextManager[list[Text]]
    if args.text:
        opened = text_files(args.text, open_tokenizer(source, args.tokenizer))
    else:
        corpora = args.corpus or [Path(corpus) for corpus in source.corpora]
        opened = nullcontext(corpus_texts(corpora, source.tokenizer_sha256, args.split))
    with opened as texts:
        total = sum(text.shard.num_tokens for text in texts)
        quiet = not scored.mesh.is_main
        seconds = 0.2 if sys.stderr.isatty() else 10.0
        with tqdm(total=total, unit="token", disable=quiet, mininterval=seconds) as bar:
            return score_held_out(
                scored,
                texts,
                tokenizer_sha256=source.tokenizer_sha256,
                seq_len=scored.seq_len,
                stride=args.stride,
                batch_size=args.batch_size,
                limit=args.limit,
                on_tokens=bar.update,
            )
