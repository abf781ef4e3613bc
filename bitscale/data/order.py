"""The order of training samples: integer arithmetic without state, tables or a generator.

Two questions are answered for any sample, in any order and on any machine alike:
`assign_corpora`: which corpus sample i of a weighted blend comes from, and as the how-manieth of
that corpus; `chunk_starts`: at which token the n-th sample of a corpus begins.
The formulas and why they were chosen: docs/batches.md.
"""

# Shape suffixes: n samples asked for at once, R Feistel rounds, C corpora.

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitscale.errors import ConfigError

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

NUM_ROUNDS = 8  # measured: pairs of positions are uniform from 8 on (docs/batches.md)
MIN_SHARE = 1e-6  # of a blend; keeps the 32-bit shares below exact to 0.02% even there

_ONE = np.uint64(1)
_HALF_32 = np.uint64(2**31)
_MASK_32 = np.uint64(2**32 - 1)
_SHIFT_32 = np.uint64(32)


class Split(NamedTuple):
    """A node of a blend: `share_32` / 2^32 of its samples go to `light`, the rest to `heavy`."""

    share_32: int
    light: "Split | int"  # an int is a corpus index
    heavy: "Split | int"


Blend = Split | int


def build_blend(weights: Sequence[float]) -> Blend:
    """Huffman tree over the corpora's weights, which need not sum to 1.

    The tree bounds how far any corpus strays from its exact share, whatever their number.
    Raises ConfigError for no corpora, for a weight that is not finite and positive, or for one
    below `MIN_SHARE` of the sum.
    """
    if not weights:
        raise ConfigError("data.corpora is empty; name at least one corpus")
    for corpus, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"data.corpora[{corpus}].weight={weight} is not a positive number; "
                "give a positive weight or remove the corpus"
            )
    largest = max(weights)  # divided out first, so that the sum of huge weights stays finite
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    for corpus, (weight, part) in enumerate(zip(weights, scaled, strict=True)):
        if part / total < MIN_SHARE:
            raise ConfigError(
                f"data.corpora[{corpus}].weight={weight} is {part / total:.3g} of the blend, below "
                f"{MIN_SHARE:.0e}; raise the weight or remove the corpus"
            )
    # The second field breaks ties between equal weights by age, so nodes are never compared.
    heap: list[tuple[float, int, Blend]] = [(p / total, c, c) for c, p in enumerate(scaled)]
    heapq.heapify(heap)
    for age in range(len(scaled), 2 * len(scaled) - 1):
        light_share, _, light = heapq.heappop(heap)
        heavy_share, _, heavy = heapq.heappop(heap)
        both = light_share + heavy_share
        split = Split(round(light_share / both * 2**32), light, heavy)
        heapq.heappush(heap, (both, age, split))
    return heap[0][2]


def assign_corpora(blend: Blend, samples_n: Int64) -> tuple[Int64, Int64]:
    """Corpus of each sample, and how many earlier samples (from 0 on) that corpus supplied."""
    corpus_n, rank_n = np.empty_like(samples_n), np.empty_like(samples_n)

    def descend(node: Blend, rows: Int64, rank: UInt64) -> None:
        if isinstance(node, int):
            corpus_n[rows], rank_n[rows] = node, rank
            return
        light = _rounded_share(rank, node.share_32)
        is_light = _rounded_share(rank + _ONE, node.share_32) > light
        descend(node.light, rows[is_light], light[is_light])
        descend(node.heavy, rows[~is_light], (rank - light)[~is_light])

    descend(blend, np.arange(len(samples_n)), samples_n.astype(np.uint64))
    return corpus_n, rank_n


def count_corpora(blend: Blend, num_samples: int) -> list[int]:
    """How many of the first `num_samples` samples come from each corpus, in corpus order."""
    if isinstance(blend, int):
        return [num_samples]
    counts: dict[int, int] = {}

    def descend(node: Blend, count: int) -> None:
        if isinstance(node, int):
            counts[node] = count
            return
        light = (count * node.share_32 + 2**31) >> 32
        descend(node.light, light)
        descend(node.heavy, count - light)

    descend(blend, num_samples)
    return [counts[corpus] for corpus in range(len(counts))]


def chunk_starts(
    corpus_n: Int64, rank_n: Int64, num_tokens_C: Int64, seq_len: int, seed: int
) -> Int64:
    """First token of the `rank_n`-th sample of `corpus_n`, in [0, num_tokens of that corpus).

    A corpus is a ring of N tokens, cut in every epoch into N // seq_len chunks from a point that
    depends on the epoch. Requires N >= seq_len.
    """
    num_tokens_n = num_tokens_C[corpus_n]
    num_chunks_n = num_tokens_n // seq_len
    epoch_n, index_n = np.divmod(rank_n, num_chunks_n)
    key_n = epoch_keys(seed, corpus_n, epoch_n)
    cut_n = (_mix(key_n + np.uint64(NUM_ROUNDS)) % num_tokens_n.astype(np.uint64)).astype(np.int64)
    starts_n: Int64 = (cut_n + permute(index_n, num_chunks_n, key_n) * seq_len) % num_tokens_n
    return starts_n


def epoch_keys(seed: int, corpus_n: Int64, epoch_n: Int64) -> UInt64:
    """64-bit key of an epoch of a corpus, which is known by its place in the configuration."""
    root = np.array([seed % 2**64], dtype=np.uint64)
    return _mix(_mix(_mix(root) + corpus_n.astype(np.uint64)) + epoch_n.astype(np.uint64))


def permute(index_n: Int64, size_n: Int64, key_n: UInt64) -> Int64:
    """Image of each index in [0, size) under the pseudorandom permutation of its key.

    A Feistel network over a rectangle of rows x columns >= size, rows - columns in {0, 1}; an
    image outside [0, size) goes through again until it is inside (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002). Requires size < 2^52.
    """
    size = size_n.astype(np.uint64)
    rows = np.ceil(np.sqrt(size_n)).astype(np.uint64)
    columns = (size + rows - _ONE) // rows
    keys_Rn = _mix(key_n + np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None])
    image = index_n.astype(np.uint64)
    pending = np.arange(len(image))
    while pending.size:
        walked = _feistel(image[pending], rows[pending], columns[pending], keys_Rn[:, pending])
        image[pending] = walked
        pending = pending[walked >= size[pending]]
    return image.astype(np.int64)


def _feistel(index_n: UInt64, rows: UInt64, columns: UInt64, keys_Rn: UInt64) -> UInt64:
    row, column = np.divmod(index_n, columns)
    # Each round rotates one coordinate by a hash of the other, so each round can be undone. The
    # hash loses a bit because a wrapped sum would not be a rotation.
    for r, key_n in enumerate(keys_Rn):
        if r % 2 == 0:
            row = (row + (_mix(column + key_n) >> _ONE)) % rows
        else:
            column = (column + (_mix(row + key_n) >> _ONE)) % columns
    image_n: UInt64 = row * columns + column
    return image_n


def _rounded_share(count: UInt64, share_32: int) -> UInt64:
    """count * share_32 / 2^32, rounded half up; exact for any count below 2^63."""
    share = np.uint64(share_32)
    low = ((count & _MASK_32) * share + _HALF_32) >> _SHIFT_32
    return (count >> _SHIFT_32) * share + low


def _mix(x: UInt64) -> UInt64:
    """SplitMix64: a bijective hash of 64 bits (Steele, Lea, Flood, OOPSLA 2014, figure 17).

    `x` is an array: numpy wraps arrays silently and warns about scalars.
    """
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
