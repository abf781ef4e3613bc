"""Which weights DeepSpeed's ZeRO-3 gathers, when, and how many are there at once.

A replay of `PartitionedParameterCoordinator` (deepspeed 0.19.8) on the order in which a micro-batch
uses the weights: a weight is gathered where it is used or prefetched, and partitioned again after
its use, unless it is used once more within `max_reuse_distance` elements or a prefetch that looked
ahead has counted on it.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple


class Use(NamedTuple):
    """A module runs, and reads its weight if that is partitioned."""

    # None: a module that gathers nothing itself, at which others are prefetched too.
    weight: Hashable | None
    numel: int  # of its weight, gathered or not: the distance between two uses of another


VISIT = Use(None, 0)


class Gathered(NamedTuple):
    """Of one micro-batch."""

    num_elements: int  # gathered, each time counted
    peak_elements: int  # whole weights held at once


@lru_cache(maxsize=512)
def gathered(
    uses: tuple[Use, ...],
    max_reuse_distance: int,
    prefetch_bucket_size: int,
    max_live_parameters: int,
) -> Gathered:
    """Replay one micro-batch's uses, forward and backward, of weights that are not persistent."""
    reused_soon = _reused_soon(uses, max_reuse_distance)
    queue = deque(range(len(uses)))
    live: set[Hashable] = set()
    counted_until: dict[Hashable, int] = {}  # the last use that a fetch or prefetch has seen
    num_gathered = num_live = peak = 0

    for step, (weight, numel) in enumerate(uses):
        if weight is not None and weight not in live:
            live.add(weight)
            num_gathered, num_live = num_gathered + numel, num_live + numel
        if queue and queue[0] == step:
            queue.popleft()
        counted_until[weight] = max(counted_until.get(weight, -1), step)
        room = min(max_live_parameters - num_live, prefetch_bucket_size)
        prefetched = 0
        while queue and prefetched < room:
            ahead = queue.popleft()
            other, size = uses[ahead]
            counted_until[other] = ahead
            if other is not None and other not in live:
                live.add(other)
                prefetched += size
        num_gathered, num_live = num_gathered + prefetched, num_live + prefetched
        peak = max(peak, num_live)
        if weight is not None and counted_until[weight] <= step and not reused_soon[step]:
            live.remove(weight)
            num_live -= numel
    return Gathered(num_gathered, peak)


def _reused_soon(uses: Sequence[Use], max_reuse_distance: int) -> list[bool]:
    """For each use: whether the next one of the same weight begins within the distance."""
    starts, total = [], 0
    for _, numel in uses:
        starts.append(total)
        total += numel
    following: dict[Hashable, int] = {}  # where the next use of a weight starts
    soon = [False] * len(uses)
    for step in range(len(uses) - 1, -1, -1):
        weight, numel = uses[step]
        after = following.get(weight)
        soon[step] = after is not None and after - starts[step] - numel < max_reuse_distance
        following[weight] = starts[step]
    return soon
