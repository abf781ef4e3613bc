"""Order and content of training and evaluation batches."""

import hashlib
import math
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitscale.data.batches import IGNORE_ID, Batches, evaluation_batches
from bitscale.data.order import (
    assign_corpora,
    build_blend,
    chunk_starts,
    count_corpora,
    epoch_keys,
    permute,
)
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


def permutation(size: int, key: int) -> np.ndarray:
    keys = np.full(size, key, dtype=np.uint64)
    return permute(np.arange(size), np.full(size, size), keys)


def starts_of(num_tokens: int, seq_len: int, ranks: np.ndarray, seed: int = 0, corpus: int = 0):
    num_tokens_C = np.full(corpus + 1, num_tokens)
    return chunk_starts(np.full(len(ranks), corpus), ranks, num_tokens_C, seq_len, seed)


# --- Permutation ---


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
@example(size=2, key=0)
@example(size=3, key=2**64 - 1)
@example(size=2**12, key=1)
@example(size=2**12 + 1, key=1)
@example(size=7919, key=5)  # prime
@example(size=65537, key=5)  # prime
@settings(deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permutation(size, key)), np.arange(size))


def test_permutation_of_a_huge_domain_stays_inside_and_collides_nowhere() -> None:
    size = 2**51 + 12345
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    images = permute(index, np.full(10_000, size), np.full(10_000, 9, dtype=np.uint64))
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == 10_000


def test_each_query_of_a_permutation_has_its_own_size_and_key() -> None:
    sizes, keys = np.array([5, 1, 1000, 17]), np.array([3, 4, 5, 6], dtype=np.uint64)
    index = np.array([4, 0, 999, 3])
    together = permute(index, sizes, keys)
    assert together.tolist() == [
        permutation(size, key)[i] for size, key, i in zip(sizes, keys, index, strict=True)
    ]


def test_where_two_neighbours_go_is_uniform_over_keys() -> None:
    """Chi-square of (image of 0, image of 1) at size 16; six rounds would give z = 22."""
    num_keys, size = 100_000, 16
    keys = epoch_keys(0, np.zeros(num_keys, dtype=np.int64), np.arange(num_keys))
    sizes = np.full(num_keys, size)
    first = permute(np.zeros(num_keys, dtype=np.int64), sizes, keys)
    second = permute(np.ones(num_keys, dtype=np.int64), sizes, keys)
    counts = np.bincount(first * size + second, minlength=size**2).reshape(size, size)
    assert np.all(np.diag(counts) == 0)
    pairs = counts[~np.eye(size, dtype=bool)]
    expected = num_keys / len(pairs)
    freedom = len(pairs) - 1
    z = (((pairs - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)
    assert abs(z) < 4


# --- Chunks of an epoch ---


@given(
    seq_len=st.integers(1, 40),
    extra=st.integers(1, 400),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**63),
)
@example(seq_len=8, extra=1, epoch=0, seed=0)  # the shortest corpus: one chunk
@settings(deadline=None)
def test_an_epoch_predicts_no_token_twice_and_leaves_out_less_than_a_chunk(
    seq_len: int, extra: int, epoch: int, seed: int
) -> None:
    num_tokens = seq_len + extra
    num_chunks = num_tokens // seq_len
    starts = starts_of(num_tokens, seq_len, np.arange(num_chunks) + epoch * num_chunks, seed)
    assert starts.min() >= 0
    assert starts.max() < num_tokens
    targets = (starts[:, None] + 1 + np.arange(seq_len)) % num_tokens
    assert len(np.unique(targets)) == num_chunks * seq_len > num_tokens - seq_len


def test_cuts_and_order_differ_by_epoch_seed_and_corpus() -> None:
    ranks = np.arange(100)
    base = starts_of(1000, 10, ranks)
    for other in (
        starts_of(1000, 10, ranks + 100),  # the next epoch
        starts_of(1000, 10, ranks, seed=1),
        starts_of(1000, 10, ranks, corpus=1),
    ):
        assert other[0] % 10 != base[0] % 10  # cut elsewhere
        assert np.mean(other // 10 == base // 10) < 0.1  # another order


def test_cuts_of_epochs_reach_every_token_equally() -> None:
    cuts = starts_of(100, 60, np.arange(20_000))  # one chunk an epoch: its start is the cut
    counts = np.bincount(cuts, minlength=100)
    assert abs(counts - 200).max() < 5 * math.sqrt(200)


def splitmix64(x: int) -> int:
    """The published hash, on Python integers."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(seed=st.integers(0, 2**63), corpus=st.integers(0, 9), epoch=st.integers(0, 2**40))
def test_epoch_keys_chain_splitmix64(seed: int, corpus: int, epoch: int) -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first output from state 0
    expected = splitmix64((splitmix64((splitmix64(seed) + corpus) % 2**64) + epoch) % 2**64)
    assert epoch_keys(seed, np.array([corpus]), np.array([epoch])).tolist() == [expected]


def test_order_equals_the_golden_values() -> None:
    """Guards resumed runs: a change here reorders the data of every existing run."""
    key = epoch_keys(1234, np.array([0, 1]), np.array([0, 7]))
    assert key.tolist() == GOLDEN_KEYS
    assert permutation(11, GOLDEN_KEYS[0]).tolist() == GOLDEN_PERMUTATION
    assert starts_of(1000, 64, np.arange(12, 20), seed=1234, corpus=1).tolist() == GOLDEN_STARTS
    corpus, rank = assign_corpora(build_blend([0.6, 0.3, 0.1]), np.arange(20))
    assert "".join(map(str, corpus)) == GOLDEN_CORPORA
    assert rank[-3:].tolist() == GOLDEN_RANKS


# --- Blend ---

weights_strategy = st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=12)


@given(weights=weights_strategy)
@settings(deadline=None, max_examples=50)
def test_every_corpus_stays_within_two_samples_of_its_share(weights: list[float]) -> None:
    samples = np.arange(3000)
    corpus, _ = assign_corpora(build_blend(weights), samples)
    for c, weight in enumerate(weights):
        expected = weight / sum(weights) * (samples + 1)
        assert np.abs(np.cumsum(corpus == c) - expected).max() < 2


@pytest.mark.parametrize(
    ("weights", "bound"),
    [([3.0, 7.0], 0.501), ([1.0] * 7, 1.0), ([0.9] + [0.001] * 100, 1.0), ([2, 3, 5], 1.001)],
)
def test_typical_blends_stay_within_one_sample(weights: list[float], bound: float) -> None:
    samples = np.arange(20_000)
    corpus, _ = assign_corpora(build_blend(weights), samples)
    for c, weight in enumerate(weights):
        expected = weight / sum(weights) * (samples + 1)
        assert np.abs(np.cumsum(corpus == c) - expected).max() < bound


@given(weights=weights_strategy, first=st.one_of(st.integers(0, 100), st.integers(0, 2**55)))
@settings(deadline=None)
def test_counts_ranks_and_assignment_agree_at_any_sample(weights: list[float], first: int) -> None:
    blend = build_blend(weights)
    counts = count_corpora(blend, first)
    assert sum(counts) == first
    corpus, rank = assign_corpora(blend, first + np.arange(50))
    for c, r in zip(corpus.tolist(), rank.tolist(), strict=True):
        assert r == counts[c]
        counts[c] += 1
    assert counts == count_corpora(blend, first + 50)


def test_only_ratios_of_weights_matter() -> None:
    samples = np.arange(1000)
    corpus, rank = assign_corpora(build_blend([1.0, 2.0, 4.0]), samples)
    for scale in (2.0**-900, 2.0**1000):
        again = assign_corpora(build_blend([scale, 2 * scale, 4 * scale]), samples)
        assert np.array_equal(again[0], corpus)
        assert np.array_equal(again[1], rank)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_impossible_weight_is_named(weight: float) -> None:
    with pytest.raises(ConfigError) as error:
        build_blend([1.0, weight])
    assert str(error.value) == (
        f"data.corpora[1].weight={weight} is not a positive number; "
        "give a positive weight or remove the corpus"
    )


def test_too_small_weight_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        build_blend([1.0, 1.0, 1e-6])
    assert str(error.value) == (
        "data.corpora[2].weight=1e-06 is 5e-07 of the blend, below 1e-06; "
        "raise the weight or remove the corpus"
    )


def test_no_corpora_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora is empty; name at least one corpus"):
        make_batches([])


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

GOLDEN_KEYS = [5960182133528308962, 472585683552517777]
GOLDEN_PERMUTATION = [0, 9, 5, 1, 8, 6, 4, 10, 3, 7, 2]
GOLDEN_STARTS = [196, 4, 324, 562, 434, 986, 178, 50]
GOLDEN_CORPORA = "01020010100102001010"
GOLDEN_RANKS = [10, 5, 11]
GOLDEN_DIGEST = "2cdbcd00fb6bc9c9ca41d9f71f6af4a85dbb49bd7c01969c58fe97c5cad8b24c"
