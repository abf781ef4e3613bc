"""How activations enter and leave a tensor-parallel group, with their gradients.

The four mappings of Megatron-LM (arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2).
Sequences are split along dimension 0 ([S, B, D]). Without a group they change nothing.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class TensorGroup(NamedTuple):
    """The tensor-parallel ranks that share a layer; the default is one rank."""

    group: dist.ProcessGroup | None = None  # None: one rank
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False


ONE_RANK = TensorGroup()


class ParameterShard(NamedTuple):
    """Which part of a whole parameter a rank's Parameter is (its attribute `shard`)."""

    dim: int
    start: int
    end: int
    whole: tuple[int, ...]  # shape

    def of(self, whole: Tensor) -> Tensor:
        """This rank's view of the whole."""
        return whole.narrow(self.dim, self.start, self.end - self.start)


def mark_shard(parameter: Tensor, dim: int, index: int, count: int) -> None:
    """Say that `parameter` is part `index` of `count` equal ones along `dim`."""
    size = parameter.shape[dim]
    whole = tuple(n * count if axis == dim else n for axis, n in enumerate(parameter.shape))
    parameter.shard = ParameterShard(dim, size * index, size * (index + 1), whole)  # type: ignore[attr-defined]


def shard_of(parameter: Tensor) -> ParameterShard | None:
    """What part of a whole the parameter is; None: it is whole on every rank."""
    return getattr(parameter, "shard", None)


def whole_parameter(parameter: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of a parameter from its ranks' parts, without gradient (a collective)."""
    shard = shard_of(parameter)
    if shard is None or group is None:
        return parameter.data
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, shard, group=group)
    # Parts may differ in size by the last ones' missing rows: all are sent at the largest size.
    size = max(part.end - part.start for part in parts)
    moved = parameter.data.movedim(shard.dim, 0)
    padded = moved.new_zeros((size, *moved.shape[1:]))
    padded[: moved.shape[0]] = moved
    whole = parameter.data.new_empty(shard.whole)
    gathered = torch.split(all_gather(padded, group), size)
    for part, rows in zip(parts, gathered, strict=True):
        part.of(whole).copy_(rows[: part.end - part.start].movedim(0, shard.dim))
    return whole


def copy_to_group(x: Tensor, tp: TensorGroup) -> Tensor:
    """x, whose gradient is the sum over the ranks."""
    return x if tp.group is None else cast(Tensor, _Copy.apply(x, tp.group))  # type: ignore[no-untyped-call]


def sum_over_group(x: Tensor, tp: TensorGroup) -> Tensor:
    """The sum over the ranks, on each; the gradient passes."""
    return x if tp.group is None else cast(Tensor, _Sum.apply(x, tp.group))  # type: ignore[no-untyped-call]


def gather_sequence(x: Tensor, tp: TensorGroup) -> Tensor:
    """[S, ...] from this rank's [S / size, ...]; the gradient is summed and split again."""
    return x if tp.group is None else cast(Tensor, _Gather.apply(x, tp.group))  # type: ignore[no-untyped-call]


def sum_and_split_sequence(x: Tensor, tp: TensorGroup) -> Tensor:
    """This rank's [S / size, ...] of the sum over the ranks; the gradient is gathered."""
    return x if tp.group is None else cast(Tensor, _SumAndSplit.apply(x, tp.group))  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenation of the ranks' x along dimension 0."""
    if group is None:
        return x
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part, along dimension 0, of the sum of the ranks' x."""
    if group is None:
        return x
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the ranks' x, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class _SumAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None
