"""Held-out loss of a model on the validation or test split of prepared corpora."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitscale.data.batches import EvaluationBatch, evaluation_batches
from bitscale.data.corpus import PreparedCorpus, load_corpus
from bitscale.errors import DataError
from bitscale.mesh import Mesh


class EvalResult(NamedTuple):
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # of the source text; comparable between tokenizers
    num_tokens: int


def evaluate(
    token_losses: Callable[[EvaluationBatch], Tensor],
    corpora: Sequence[PreparedCorpus],
    mesh: Mesh,
    *,
    split: str,
    seq_len: int,
    batch_size: int,
    max_batches: int | None,
    reset_attention: bool,
) -> EvalResult:
    """Loss over the `split` of every corpus that has one, each target token counted once.

    Args:
        token_losses: nats [B, S] of a batch, 0 where the target is padding.
        batch_size: sequences of one rank in one forward pass.
        max_batches: forward passes per corpus and rank at most; None reads the whole split.

    Windows do not overlap: the first tokens of each have little context, so the figure is an
    upper bound on the sliding-window one. Sums are in fp64: independent of batch and ranks to
    about 1e-7.
    """
    nats, num_tokens, num_bytes = 0.0, 0, 0.0
    for corpus in corpora:
        if split not in corpus.splits:
            continue
        shard = corpus.shard(split)
        totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        for batch in evaluation_batches(
            shard,
            seq_len=seq_len,
            batch_size=batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            max_batches=max_batches,
            reset_attention=reset_attention,
        ):
            totals[0] += token_losses(batch).double().sum()
            totals[1] += batch.num_targets
        # Ranks that share a model have all counted the same batches.
        sharing = mesh.world_size // mesh.dp_size
        corpus_nats, corpus_tokens = (mesh.sum(totals) / sharing).tolist()
        nats += corpus_nats
        num_tokens += int(corpus_tokens)
        num_bytes += corpus.splits[split].num_bytes * corpus_tokens / shard.num_tokens
    if not num_tokens:
        raise no_split(split)
    loss = nats / num_tokens
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_tokens=num_tokens,
    )


def no_split(split: str) -> DataError:
    return DataError(
        f"no corpus has a {split!r} split; prepare with a share for it (--split 0.98,0.01,0.01)"
    )


def corpora_of_tokenizer(paths: Sequence[Path], fingerprint: str) -> list[PreparedCorpus]:
    """Raises DataError for a corpus of another tokenizer: its ids would mean other text."""
    corpora = [load_corpus(path) for path in paths]
    for corpus in corpora:
        if corpus.manifest.tokenizer.fingerprint != fingerprint:
            raise DataError(
                f"{corpus.directory} was prepared with another tokenizer than the model's; "
                "prepare it with the tokenizer of the training corpus (--tokenizer PATH)"
            )
    return corpora
