"""Where a run's state can come from: our own checkpoints (`read.py`), and foreign ones
(`bitscale/sources/`)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bitscale.checkpoint.format import Meta, views
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.model.collectives import ParameterShard


class StateSource(ABC):
    """fp32 masters, Adam's moments and step counts, by our parameter names."""

    path: Path
    meta: Meta

    @abstractmethod
    def read(
        self, name: str, kind: str, start: int, numel: int, shard: ParameterShard | None = None
    ) -> Tensor:
        """fp32 [numel]: elements [start, start + numel) of parameter `name`, or of its `shard`.

        `kind` is "master", "exp_avg" or "exp_avg_sq" (fragments.MOMENTS).
        """

    @abstractmethod
    def rng_state(self, rank: int) -> Tensor | None:
        """The CPU generator state that `rank` saved; None if there is none."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 master in its logical shape), one at a time."""
        for name, shape in self.meta.shapes.items():
            yield name, self.read(name, "master", 0, math.prod(shape)).view(shape)

    def restore(
        self,
        fragments: Iterable[Fragment],
        shapes: Mapping[str, Sequence[int]],
        optional: Collection[str] = (),
        *,
        moments: bool = True,
    ) -> None:
        """Fill this rank's fragments of a model with these parameter `shapes`, in place.

        Parameters in `optional` may be missing on either side: of what the model has and the
        checkpoint has not, the master is left to the caller, and the moments are new but for the
        step count. Without `moments` only masters are read, and the optimizer starts afresh.

        Raises CheckpointError if the checkpoint's parameters are others.
        """
        missing = {name for name in optional if (name in shapes) != (name in self.meta.shapes)}
        for name in sorted((shapes.keys() | self.meta.shapes.keys()) - missing):
            ours, theirs = shapes.get(name), self.meta.shapes.get(name)
            if ours is None or theirs is None or list(ours) != list(theirs):
                raise CheckpointError(
                    f"{self.path}: {name} has shape {_shown(theirs)} there and {_shown(ours)} "
                    "here; the checkpoint is of another model: use its model section"
                )
        for fragment in fragments:
            is_missing = fragment.name in missing
            for kind, view in views(fragment).items():
                if is_missing or (kind != "master" and not moments):
                    if kind != "master":
                        view.zero_()  # a run that goes back in process has trained since
                    continue
                start, numel, shard = fragment.start, fragment.numel, fragment.shard
                values = self.read(fragment.name, kind, start, numel, shard)
                if not values.isfinite().all():
                    raise CheckpointError(
                        f"{self.path}: {fragment.name} ({kind}) holds NaN or infinity; resume "
                        "from an earlier checkpoint"
                    )
                view.copy_(values)
            fragment.step.fill_(self._adam_step(fragment.name, is_missing) if moments else 0)

    def _adam_step(self, name: str, is_missing: bool) -> int:
        # The count that ZeRO's flat tensors share, and a gradient of 0 would have left.
        steps = self.meta.adam_steps
        return max(steps.values()) if is_missing else steps[name]


def _shown(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else str(list(shape))
