"""Order of the samples: permutations, chunks of an epoch, the blend of corpora."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitscale.data.order import (
    assign_corpora,
    build_blend,
    chunk_starts,
    count_corpora,
    epoch_keys,
    permute,
)
from bitscale.errors import ConfigError

pytestmark = pytest.mark.unit


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


# --- Golden values: written once from this code (numpy 2.4, x86-64), never to change ---

GOLDEN_KEYS = [5960182133528308962, 472585683552517777]
GOLDEN_PERMUTATION = [0, 9, 5, 1, 8, 6, 4, 10, 3, 7, 2]
GOLDEN_STARTS = [196, 4, 324, 562, 434, 986, 178, 50]
GOLDEN_CORPORA = "01020010100102001010"
GOLDEN_RANKS = [10, 5, 11]
