"""Batches of token ids, each a pure function of the step: resuming needs no state.

`Batches` serves training, `evaluation_batches` reads a validation split once from end to end.
Neither holds tokens: both copy from memory-mapped shards. Formulas: docs/batches.md.
"""

# Shape suffixes: B rows of a micro-batch, S sequence length, C corpora, n rows asked for at once.

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bitscale.data.order import assign_corpora, build_blend, chunk_starts, count_corpora
from bitscale.data.shards import TokenShard
from bitscale.errors import ConfigError, DataError

IGNORE_ID = -100  # torch.nn.functional.cross_entropy's default ignore_index


class MicroBatch(NamedTuple):
    """Rows for one forward pass; `target_ids_BS[b, s]` follows `input_ids_BS[b, s]` in the text."""

    input_ids_BS: torch.Tensor  # int64
    target_ids_BS: torch.Tensor  # int64
    document_ids_BS: torch.Tensor | None  # int64, of the input; from 0 in each row; None: one text


class EvaluationBatch(NamedTuple):
    """As MicroBatch, with `IGNORE_ID` for every target that is padding.

    `num_targets` counts the others on this rank and may be 0: sum losses, never average per batch.
    """

    input_ids_BS: torch.Tensor  # int64; 0 where padded
    target_ids_BS: torch.Tensor  # int64
    document_ids_BS: torch.Tensor | None  # int64; padding continues the last document
    num_targets: int


class Batches:
    """Training batches of one data-parallel rank.

    Sample i of a run is the same S + 1 tokens for any `dp_size`, `micro_batch_size` and starting
    step; step t consists of samples t * G .. (t + 1) * G - 1, with G = `global_batch_size`.

    Raises ConfigError for impossible sizes or weights, DataError for a corpus of at most
    `seq_len` tokens.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[TokenShard, float]],
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        reset_attention: bool,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        _check_sizes(seq_len, global_batch_size, micro_batch_size, dp_size)
        self._blend = build_blend([weight for _, weight in corpora])
        self._shards = [shard for shard, _ in corpora]
        for corpus, shard in enumerate(self._shards):
            if shard.num_tokens <= seq_len:
                raise DataError(
                    f"data.corpora[{corpus}] ({shard.prefix}) has {shard.num_tokens} tokens, "
                    f"fewer than data.seq_len + 1 = {seq_len + 1}; add text or lower data.seq_len"
                )
        self._num_tokens_C = np.array([shard.num_tokens for shard in self._shards], dtype=np.int64)
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._seed = seed
        self._reset_attention = reset_attention

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step and rank."""
        return self._global_batch_size // (self._micro_batch_size * self._dp_size)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's `num_micro_batches` micro-batches of `step`, counted from 0."""
        assert step >= 0, step
        M, R, B = self.num_micro_batches, self._dp_size, self._micro_batch_size
        rows_MRB = np.arange(self._global_batch_size, dtype=np.int64).reshape(M, R, B)
        samples_n = rows_MRB[:, self._dp_rank].ravel() + step * self._global_batch_size
        corpus_n, rank_n = assign_corpora(self._blend, samples_n)
        start_n = chunk_starts(corpus_n, rank_n, self._num_tokens_C, self._seq_len, self._seed)
        for corpus_B, start_B in zip(corpus_n.reshape(M, B), start_n.reshape(M, B), strict=True):
            yield self._read(corpus_B.tolist(), start_B.tolist())

    def epochs(self, step: int) -> list[float]:
        """Passes over each corpus, all ranks together, before `step`."""
        counts = count_corpora(self._blend, step * self._global_batch_size)
        chunks = (self._num_tokens_C // self._seq_len).tolist()
        return [count / num_chunks for count, num_chunks in zip(counts, chunks, strict=True)]

    def tokens_seen(self, step: int) -> int:
        """Target tokens, all ranks together, before `step`."""
        return step * self._global_batch_size * self._seq_len

    def _read(self, corpora: list[int], starts: list[int]) -> MicroBatch:
        B, S = self._micro_batch_size, self._seq_len
        input_ids_BS, target_ids_BS = np.empty((2, B, S), dtype=np.int64)
        document_ids_BS = np.empty((B, S), dtype=np.int64) if self._reset_attention else None
        for b, (corpus, start) in enumerate(zip(corpora, starts, strict=True)):
            tokens = _ring_tokens(self._shards[corpus], start, S + 1)
            input_ids_BS[b], target_ids_BS[b] = tokens[:-1], tokens[1:]
            if document_ids_BS is not None:
                document_ids_BS[b] = _document_ids(self._shards[corpus], start, S)
        return MicroBatch(*_tensors(input_ids_BS, target_ids_BS, document_ids_BS))


def evaluation_batches(
    shard: TokenShard,
    *,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_batches: int | None = None,
    reset_attention: bool = False,
    stride: int | None = None,
) -> Iterator[EvaluationBatch]:
    """Windows of a split in reading order, the last partial one included.

    Every token but the first is a target exactly once over all ranks. Every rank yields equally
    many batches (rows without a window are all padding), so collectives never wait for ever.
    `max_batches`, per rank, keeps the beginning of the split; None reads all of it.
    `stride`: window w begins w · stride tokens in, and its targets are the last `stride` (the
    first window's: all), so that each has at least seq_len - stride tokens before it; None:
    seq_len, windows that do not overlap.
    Raises DataError, at the call and not at the first batch, for a split without a target;
    ConfigError for a stride that is not in 1 .. seq_len.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(
            f"a stride of {stride} leaves out targets of windows of {seq_len} tokens, or never "
            f"moves on; use 1 to {seq_len}"
        )
    if shard.num_tokens < 2:
        raise DataError(
            f"validation split {shard.prefix} has {shard.num_tokens} tokens, too few to "
            "predict one; prepare the corpus with a larger validation share"
        )
    num_windows = 1 - (-max(0, shard.num_tokens - 1 - seq_len) // stride)
    num_batches = -(-num_windows // (batch_size * dp_size))
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    first_windows = [(m * dp_size + dp_rank) * batch_size for m in range(num_batches)]
    return (
        _read_windows(shard, first, batch_size, seq_len, stride, reset_attention)
        for first in first_windows
    )


def _read_windows(
    shard: TokenShard,
    first_window: int,
    batch_size: int,
    seq_len: int,
    stride: int,
    reset_attention: bool,
) -> EvaluationBatch:
    B, S = batch_size, seq_len
    input_ids_BS = np.zeros((B, S), dtype=np.int64)
    target_ids_BS = np.full((B, S), IGNORE_ID, dtype=np.int64)
    document_ids_BS = np.zeros((B, S), dtype=np.int64) if reset_attention else None
    num_targets = 0
    for b in range(B):
        window = first_window + b
        start, seen = window * stride, S - stride if window else 0
        length = min(S, shard.num_tokens - 1 - start)
        if length <= seen:
            break
        tokens = shard.tokens(start, start + length + 1)
        input_ids_BS[b, :length] = tokens[:-1]
        target_ids_BS[b, seen:length] = tokens[1 + seen :]
        num_targets += length - seen
        if document_ids_BS is not None:
            document_ids_BS[b, :length] = _document_ids(shard, start, length)
            document_ids_BS[b, length:] = document_ids_BS[b, length - 1]
    return EvaluationBatch(*_tensors(input_ids_BS, target_ids_BS, document_ids_BS), num_targets)


def _ring_tokens(shard: TokenShard, start: int, length: int) -> npt.NDArray[np.integer]:
    """`length` <= num_tokens tokens from `start` on; the first token follows the last."""
    stop, num_tokens = start + length, shard.num_tokens
    if stop <= num_tokens:
        return shard.tokens(start, stop)
    head, tail = shard.tokens(start, num_tokens), shard.tokens(0, stop - num_tokens)
    tokens: npt.NDArray[np.integer] = np.concatenate([head, tail])
    return tokens


def _document_ids(shard: TokenShard, start: int, length: int) -> npt.NDArray[np.int64]:
    """Document of each of `length` tokens of the ring from `start` on, counted from 0."""
    boundaries, num_tokens, stop = shard.document_starts, shard.num_tokens, start + length
    first, last = np.searchsorted(boundaries, [start + 1, stop])
    is_first_token = np.zeros(length, dtype=np.int64)
    # Marks, not increments: empty documents share their boundary with the next one.
    is_first_token[boundaries[first:last] - start] = 1
    if stop > num_tokens:
        last = np.searchsorted(boundaries, stop - num_tokens)
        is_first_token[boundaries[:last] + (num_tokens - start)] = 1
    return np.cumsum(is_first_token)


def _tensors(
    input_ids_BS: npt.NDArray[np.int64],
    target_ids_BS: npt.NDArray[np.int64],
    document_ids_BS: npt.NDArray[np.int64] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    documents = None if document_ids_BS is None else torch.from_numpy(document_ids_BS)
    return torch.from_numpy(input_ids_BS), torch.from_numpy(target_ids_BS), documents


def _check_sizes(seq_len: int, global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    sizes = {
        "data.seq_len": seq_len,
        "train.global_batch_size": global_batch_size,
        "train.micro_batch_size": micro_batch_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} is not positive; set it to 1 or more")
    unit = micro_batch_size * dp_size
    if global_batch_size % unit != 0:
        nearest = max(1, (2 * global_batch_size + unit) // (2 * unit)) * unit
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size={micro_batch_size} x dp_size={dp_size} = {unit}; "
            f"use a global batch of {nearest}"
        )
