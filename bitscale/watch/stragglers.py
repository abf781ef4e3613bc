"""Which rank is slower than the others at its own work.

Judged once a logging interval, by each rank's median step of it (bitscale/engine/own_time.py).
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

INTERVALS = 3  # in a row, before a rank is named
STEPS = 20  # in these intervals, at least


class Straggler(NamedTuple):
    ranks: tuple[int, ...]  # more than one: ranks of a tensor-parallel group, which wait within
    own_seconds: float  # of a step
    others_seconds: float  # the median of the others'
    is_over: bool = False  # it has become as fast as the others again


class Stragglers:
    """Remembers who was slow in the last intervals; the same on every rank."""

    def __init__(self, groups: Sequence[Sequence[tuple[int, ...]]], ratio: float) -> None:
        """`groups`: within each, units (ranks that are slow together) that do the same work."""
        self._groups, self._ratio = groups, ratio
        self._slow: dict[tuple[int, ...], tuple[int, int]] = {}  # intervals, steps
        self._named: set[tuple[int, ...]] = set()

    def judge(self, own_seconds: Sequence[float], num_steps: int) -> list[Straggler]:
        """Who has to be named now, after an interval of `num_steps` with these medians, by rank.

        A unit is named once, when it has been slowest, by more than the ratio, for INTERVALS
        intervals in a row with at least STEPS steps, and once more when that is over.
        """
        found = []
        for units in self._groups:
            seconds = {unit: max(own_seconds[rank] for rank in unit) for unit in units}
            for unit in units:
                others = [seconds[other] for other in units if other != unit]
                if not others:
                    continue
                median = statistics.median(others)
                slow = seconds[unit] > self._ratio * median
                slow = slow and seconds[unit] == max(seconds.values())
                intervals, steps = self._slow.get(unit, (0, 0))
                self._slow[unit] = (intervals + 1, steps + num_steps) if slow else (0, 0)
                long = intervals + 1 >= INTERVALS and steps + num_steps >= STEPS
                if slow and long and unit not in self._named:
                    self._named.add(unit)
                    found.append(Straggler(unit, seconds[unit], median))
                elif not slow and unit in self._named:
                    self._named.remove(unit)
                    found.append(Straggler(unit, seconds[unit], median, is_over=True))
        return found


def comparable_units(world_size: int, tp: int, pp: int) -> list[list[tuple[int, ...]]]:
    """Tensor-parallel groups, by pipeline stage: stages do not do the same work."""
    stride = world_size // pp
    return [
        [tuple(range(first, first + tp)) for first in range(stage, stage + stride, tp)]
        for stage in range(0, world_size, stride)
    ]
