"""Tiny checkpoints with their tokenizer, and tiny task files, for what scores models."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitscale.config import Config
from bitscale.convert.to_checkpoint import write_checkpoint
from bitscale.data.corpus import load_corpus
from bitscale.quant.schedule import TERNARY, Strength
from tiny_models import make_source

SEQ_LEN = 48
WORDS = ("river", "tree", "moves", "holds", "under", "bright", "slow", "never", "always", "and")


def scored_checkpoint(
    make_config: Callable[..., Config],
    out: Path,
    corpus: Path,
    *overrides: str,
    strength: Strength = TERNARY,
    num_steps: int = 30,
) -> Path:
    """A tiny decoder of the corpus's vocabulary, trained for a moment on a pattern."""
    tokenizer = load_corpus(corpus).manifest.tokenizer
    cfg = make_config(
        f"data.seq_len={SEQ_LEN}",
        f"model.vocab_size={tokenizer.vocab_size}",
        "transition={at: {step: 0}}",
        *overrides,
    )
    source = replace(
        make_source(cfg, strength, num_steps=num_steps),
        corpora=(str(corpus),),
        tokenizer_file=corpus / "tokenizer.model",
        tokenizer_sha256=tokenizer.fingerprint,
    )
    return write_checkpoint(source, out, {})


def _phrase(*words: int) -> str:
    return " ".join(WORDS[word % len(WORDS)] for word in words)


def _foundry_rows(task: str, number: int) -> dict[str, Any]:
    n, gold = number, number % 2
    pair = [_phrase(n, n + 2), _phrase(n + 1, n + 5, n + 3)]
    match task:
        case "piqa":
            query = f"Question: {_phrase(n, n + 1)}\n"
        case "arc_easy":
            query = f"Question: {_phrase(n, 3 * n)}?"
        case "openbook_qa":
            query = _phrase(n, n + 4)
        case "copa":
            query = f"The {_phrase(n, n + 1)}, {('because', 'therefore')[gold]}"
        case "winogrande":
            contexts = [f"The {_phrase(n)} saw Rob so Rob", f"The {_phrase(n)} saw Rob so Robert"]
            return {"context_options": contexts, "continuation": f"{pair[0]}.", "gold": gold}
    return {"query": query, "choices": pair, "gold": gold}


def write_task_files(
    directory: Path, tasks: Sequence[str] = ("piqa", "copa", "winogrande"), num_items: int = 6
) -> Path:
    """TASK.jsonl in llm-foundry's columns, as /work/shared/data/eval has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        rows = (json.dumps(_foundry_rows(task, number)) for number in range(num_items))
        (directory / f"{task}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory
