"""Content of training and evaluation batches."""

import hashlib
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitscale.data.batches import IGNORE_ID, Batches, evaluation_batches
from bitscale.data.shards import ShardWriter, TokenShard
from bitscale.errors import ConfigError, DataError

pytestmark = pytest.mark.unit


def make_shard(lengths: Sequence[int], first_id: int = 0, vocab_size: int = 65_499) -> TokenShard:
    """A shard on disk with documents of these lengths; every token differs and tells its place."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        with ShardWriter(prefix, vocab_size) as writer:
            for length in lengths:
                writer.add_document(np.arange(length) + writer.num_tokens + first_id)
        return TokenShard(prefix)  # its mapping outlives the folder


def make_batches(corpora=None, **changes) -> Batches:
    if corpora is None:
        corpora = [(make_shard([60, 1, 40, 30]), 0.7), (make_shard([50] * 9, 1000), 0.3)]
    defaults = {
        "seq_len": 8,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 3,
        "reset_attention": False,
    }
    return Batches(corpora, **{**defaults, **changes})


def whole_steps(batches: Batches, steps: Sequence[int]) -> list[torch.Tensor]:
    return [b.input_ids_BS for step in steps for b in batches.micro_batches(step)]


# --- Training batches ---


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (128_000, "int32")])
def test_rows_are_consecutive_tokens_of_the_ring_as_int64(vocab_size: int, dtype: str) -> None:
    shard = make_shard([100], 65_000, vocab_size)
    assert shard.dtype == dtype
    batches = make_batches([(shard, 1.0)], seq_len=30)
    for batch in batches.micro_batches(0):
        assert batch.document_ids_BS is None
        assert batch.input_ids_BS.dtype == batch.target_ids_BS.dtype == torch.int64
        assert batch.input_ids_BS.shape == batch.target_ids_BS.shape == (2, 30)
        assert batch.input_ids_BS.is_contiguous()
        assert batch.target_ids_BS.is_contiguous()
        place = batch.input_ids_BS - 65_000
        assert torch.equal(place, (place[:, :1] + torch.arange(30)) % 100)
        assert torch.equal(batch.target_ids_BS - 65_000, (place + 1) % 100)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_is_the_same_whatever_the_ranks_and_micro_batches(
    dp_size: int, micro_batch_size: int
) -> None:
    for step in (0, 1, 77):
        expected = torch.cat(whole_steps(make_batches(micro_batch_size=16), [step]))
        ranks = [
            make_batches(dp_rank=r, dp_size=dp_size, micro_batch_size=micro_batch_size)
            for r in range(dp_size)
        ]
        per_rank = [whole_steps(batches, [step]) for batches in ranks]
        assert {len(found) for found in per_rank} == {ranks[0].num_micro_batches}
        assert ranks[0].num_micro_batches == 16 // (dp_size * micro_batch_size)
        # Micro-batch by micro-batch over the ranks: even the order of the rows is the same.
        found = [per_rank[r][m] for m in range(len(per_rank[0])) for r in range(dp_size)]
        assert torch.equal(torch.cat(found), expected)


def test_resuming_at_any_step_continues_the_run() -> None:
    run = make_batches(reset_attention=True)
    whole = [list(run.micro_batches(step)) for step in range(12)]
    for step in (11, 4, 7):  # also in another order than that of the run
        resumed = list(make_batches(reset_attention=True).micro_batches(step))
        for mine, theirs in zip(resumed, whole[step], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_seeds_give_different_steps() -> None:
    first, second = (torch.cat(whole_steps(make_batches(seed=s), [0])) for s in (0, 1))
    assert not torch.equal(first, second)


def test_an_epoch_of_batches_reads_every_chunk_once() -> None:
    shard = make_shard([8 * 48])  # 48 chunks: three steps of 16
    batches = make_batches([(shard, 1.0)])
    for first_step in (0, 3):
        rows = torch.cat(whole_steps(batches, range(first_step, first_step + 3)))
        assert torch.equal(rows.ravel().sort().values, torch.arange(8 * 48))


def test_batches_equal_the_golden_digest() -> None:
    digest = hashlib.sha256()
    for step in (0, 1, 1000, 10**9):
        for batch in make_batches(dp_rank=1, dp_size=2, reset_attention=True).micro_batches(step):
            for tensor in batch:
                digest.update(tensor.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN_DIGEST


def test_epochs_and_tokens_seen_count_what_was_read() -> None:
    batches = make_batches()
    rows = torch.cat(whole_steps(batches, range(25)))
    from_second = int((rows[:, 0] >= 1000).sum())
    first_chunks, second_chunks = 131 // 8, 450 // 8
    assert batches.epochs(25) == [
        (25 * 16 - from_second) / first_chunks,
        from_second / second_chunks,
    ]
    assert batches.epochs(0) == [0.0, 0.0]
    assert batches.tokens_seen(25) == rows.numel()


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12).filter(lambda x: sum(x) > 13),
    num_empty=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_document_ids_equal_a_loop_over_the_documents(
    lengths: list[int], num_empty: int, seed: int
) -> None:
    shard = make_shard(lengths)
    # Megatron can write documents without tokens: their boundary comes twice.
    empty = [*shard.document_starts[:1], *shard.document_starts[-2:]][:num_empty]
    shard.document_starts = np.sort(np.concatenate([shard.document_starts, empty])).astype(np.int64)
    document_of = [d for d, length in enumerate(lengths) for _ in range(length)]
    batches = make_batches(
        [(shard, 1.0)], seq_len=13, seed=seed, global_batch_size=8, reset_attention=True
    )
    for batch in batches.micro_batches(0):
        assert batch.document_ids_BS is not None
        for row, ids in zip(
            batch.input_ids_BS.tolist(), batch.document_ids_BS.tolist(), strict=True
        ):
            expected = [0]
            for previous, token in pairwise(row):
                new = document_of[token] != document_of[previous] or token == 0
                expected.append(expected[-1] + new)
            assert ids == expected


def test_a_corpus_of_seq_len_tokens_is_too_short_and_one_more_is_enough() -> None:
    long, short = (make_shard([100]), 1.0), (make_shard([5, 3]), 1.0)
    with pytest.raises(DataError) as error:
        make_batches([long, short])
    assert str(error.value) == (
        f"data.corpora[1] ({short[0].prefix}) has 8 tokens, fewer than data.seq_len + 1 = 9; "
        "add text or lower data.seq_len"
    )
    batches = make_batches([long, (make_shard([5, 4], 1000), 1.0)])
    rows = torch.cat(whole_steps(batches, range(4)))
    assert len(rows[rows[:, 0] >= 1000][:, 0].unique()) > 1  # one chunk, cut anew every epoch


def test_no_corpora_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora is empty; name at least one corpus"):
        make_batches([])


@pytest.mark.parametrize(("whole", "nearest"), [(17, 18), (20, 18), (21, 24), (2, 6)])
def test_global_batch_that_does_not_divide_names_the_nearest(whole: int, nearest: int) -> None:
    with pytest.raises(ConfigError) as error:
        make_batches(global_batch_size=whole, micro_batch_size=2, dp_size=3)
    assert str(error.value) == (
        f"train.global_batch_size={whole} is not a multiple of train.micro_batch_size=2 "
        f"x dp_size=3 = 6; use a global batch of {nearest}"
    )
    make_batches(global_batch_size=nearest, micro_batch_size=2, dp_size=3)


@pytest.mark.parametrize("name", ["seq_len", "global_batch_size", "micro_batch_size"])
def test_sizes_below_one_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=0 is not positive; set it to 1 or more"):
        make_batches(**{name: 0})


# --- Evaluation batches ---


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@given(num_tokens=st.integers(2, 120), seq_len=st.integers(1, 20), batch_size=st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_evaluation_covers_each_target_once_in_equally_many_batches(
    dp_size: int, num_tokens: int, seq_len: int, batch_size: int
) -> None:
    shard = make_shard([num_tokens])
    per_rank = [
        list(
            evaluation_batches(
                shard, seq_len=seq_len, batch_size=batch_size, dp_rank=r, dp_size=dp_size
            )
        )
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    found = []
    for batch in (batch for batches in per_rank for batch in batches):
        assert batch.input_ids_BS.shape == batch.target_ids_BS.shape == (batch_size, seq_len)
        assert batch.input_ids_BS.dtype == batch.target_ids_BS.dtype == torch.int64
        assert batch.document_ids_BS is None
        is_real = batch.target_ids_BS != IGNORE_ID
        assert batch.num_targets == is_real.sum()
        assert torch.equal(batch.input_ids_BS[is_real] + 1, batch.target_ids_BS[is_real])
        assert torch.all(batch.input_ids_BS[~is_real] == 0)
        found += batch.target_ids_BS[is_real].tolist()
    assert sorted(found) == list(range(1, num_tokens))
    assert any(batches[-1].num_targets for batches in per_rank)  # no batch is padding everywhere


@given(
    num_tokens=st.integers(2, 120),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_with_a_stride_each_target_comes_once_with_at_least_the_overlap_before_it(
    num_tokens: int, seq_len: int, batch_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    shard = make_shard([num_tokens])
    found = []
    for rank in range(2):
        for batch in evaluation_batches(
            shard, seq_len=seq_len, batch_size=batch_size, dp_rank=rank, dp_size=2, stride=stride
        ):
            assert batch.num_targets == (batch.target_ids_BS != IGNORE_ID).sum()
            for inputs_S, targets_S in zip(batch.input_ids_BS, batch.target_ids_BS, strict=True):
                positions = (targets_S != IGNORE_ID).nonzero().flatten().tolist()
                for position in positions:
                    target = int(targets_S[position])
                    # Tokens are 0, 1, 2, ...: the context is what comes right before the target.
                    context = list(range(target - position - 1, target))
                    assert inputs_S[: position + 1].tolist() == context
                    assert position >= min(seq_len - stride, target - 1)
                    found.append(target)
    assert sorted(found) == list(range(1, num_tokens))


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_out_targets_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError, match=rf"a stride of {stride} leaves out .*; use 1 to 8"):
        evaluation_batches(
            make_shard([20]), seq_len=8, batch_size=1, dp_rank=0, dp_size=1, stride=stride
        )


def test_max_batches_keeps_the_beginning_of_the_split() -> None:
    shard = make_shard([100])
    found = []
    for rank in range(2):
        batches = evaluation_batches(
            shard, seq_len=5, batch_size=3, dp_rank=rank, dp_size=2, max_batches=2
        )
        found += [batch.target_ids_BS.ravel() for batch in batches]
    assert len(found) == 4
    assert torch.equal(torch.cat(found).sort().values, torch.arange(1, 61))


def test_evaluation_document_ids_start_at_zero_and_padding_continues_them() -> None:
    shard = make_shard([3, 4, 6])
    (batch,) = evaluation_batches(
        shard, seq_len=8, batch_size=3, dp_rank=0, dp_size=1, reset_attention=True
    )
    assert batch.document_ids_BS is not None
    assert batch.document_ids_BS.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 2],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.num_targets == 12
    (batch,) = evaluation_batches(
        shard, seq_len=20, batch_size=1, dp_rank=0, dp_size=1, reset_attention=True
    )
    assert batch.document_ids_BS is not None
    assert batch.document_ids_BS.tolist() == [[0] * 3 + [1] * 4 + [2] * 13]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_split_without_a_target_is_an_error_at_once(num_tokens: int) -> None:
    shard = make_shard([1] * num_tokens)
    with pytest.raises(DataError) as error:
        evaluation_batches(shard, seq_len=8, batch_size=1, dp_rank=0, dp_size=1)
    assert str(error.value) == (
        f"validation split {shard.prefix} has {num_tokens} tokens, too few to predict one; "
        "prepare the corpus with a larger validation share"
    )


# --- Golden values: written once from this code (numpy 2.4, x86-64), never to change ---

GOLDEN_DIGEST = "2cdbcd00fb6bc9c9ca41d9f71f6af4a85dbb49bd7c01969c58fe97c5cad8b24c"
