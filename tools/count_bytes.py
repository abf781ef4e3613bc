"""Bytes that a rank sends, and bytes of tensors that live, while operators run."""

import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_PAYLOAD = 256  # bytes: norms, flags and counts
# What leaves each of n ranks of a ring, over the bytes of the whole tensor.
RINGS = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1}


class CountSent(TorchDispatchMode):
    """Bytes that leave this rank in collectives of several ranks, each run as a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = str(func)
        if name.startswith("c10d."):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        payload = max((t.numel() * t.element_size() for t in tensors), default=0)
        num_ranks = _group_size(args)
        if payload <= SMALL_PAYLOAD or num_ranks == 1:
            return
        if name.startswith("c10d.send"):
            self.num_bytes += payload
        for kind, rings in RINGS.items():
            if kind in name:
                self.num_bytes += rings * payload * (num_ranks - 1) / num_ranks


def _group_size(args: Any) -> int:
    """Of the process group among an operator's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return 1


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once: those that are there already (of objects that
    `gc.freeze` has not hidden), and those that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                self._add(item.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key)
