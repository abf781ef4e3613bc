"""Embedding and cross entropy over a vocabulary that tensor-parallel ranks share.

Shapes: B batch, S sequence, D model width, V vocabulary. Rank r of n holds ceil(V / n) rows from
r · ceil(V / n) on; the last ranks hold fewer if n does not divide V.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bitscale.errors import ConfigError
from bitscale.model.collectives import (
    ParameterShard,
    TensorGroup,
    all_gather,
    all_reduce,
    sum_and_split_sequence,
    sum_over_group,
)


def vocabulary_range(vocab_size: int, tp: TensorGroup) -> tuple[int, int]:
    """First row and end of this rank's part. Raises ConfigError if a rank would have none."""
    per_rank = -(-vocab_size // tp.size)
    if per_rank * (tp.size - 1) >= vocab_size:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens leaves nothing for the last of parallel.tp="
            f"{tp.size} ranks; use fewer"
        )
    return per_rank * tp.rank, min(per_rank * (tp.rank + 1), vocab_size)


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding for this rank's tokens; the others come from the other ranks."""

    def __init__(self, vocab_size: int, d_model: int, tp: TensorGroup) -> None:
        super().__init__()
        self.tp = tp
        self.first, self.end = vocabulary_range(vocab_size, tp)
        self.weight = nn.Parameter(torch.empty(self.end - self.first, d_model))
        shard = ParameterShard(0, self.first, self.end, (vocab_size, d_model))
        self.weight.shard = shard  # type: ignore[attr-defined]

    def forward(self, ids_BS: Tensor) -> Tensor:
        """[B, S, D]; with sequence parallelism this rank's [S / size, B, D]."""
        is_here = (ids_BS >= self.first) & (ids_BS < self.end)
        x_BSD = F.embedding((ids_BS - self.first).where(is_here, 0), self.weight)
        x_BSD = x_BSD * is_here[..., None]
        if self.tp.sequence_parallel:
            return sum_and_split_sequence(x_BSD.transpose(0, 1), self.tp)
        return sum_over_group(x_BSD, self.tp)


def gather_vocabulary(logits: Tensor, vocab_size: int, tp: TensorGroup) -> Tensor:
    """All columns of the logits on every rank, without gradient."""
    if tp.group is None:
        return logits
    per_rank = -(-vocab_size // tp.size)
    padded = F.pad(logits.detach(), (0, per_rank - logits.shape[-1])).movedim(-1, 0)
    whole = all_gather(padded, tp.group)[:vocab_size]
    return whole.movedim(0, -1)


def vocab_parallel_cross_entropy(
    logits_TV: Tensor, targets_T: Tensor, first: int, tp: TensorGroup, ignored: int
) -> Tensor:
    """Nats [T], fp32, 0 at `ignored` targets, from this rank's columns of the logits (fp32)."""
    losses = _CrossEntropy.apply(logits_TV, targets_T, first, tp.group, ignored)  # type: ignore[no-untyped-call]
    return cast(Tensor, losses)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        first: int,
        group: dist.ProcessGroup | None,
        ignored: int,
    ) -> Tensor:
        largest_T = logits_TV.amax(dim=-1)
        if group is not None:
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
        shifted_TV = logits_TV - largest_T[:, None]
        is_here = (targets_T >= first) & (targets_T < first + logits_TV.shape[-1])
        column_T = (targets_T - first).where(is_here, 0)
        chosen_T = shifted_TV.gather(-1, column_T[:, None]).squeeze(-1) * is_here
        exponentials_TV = shifted_TV.exp()
        # One collective for both sums.
        sums = all_reduce(torch.stack([exponentials_TV.sum(dim=-1), chosen_T]), group)
        counts_T = targets_T != ignored
        ctx.save_for_backward(exponentials_TV / sums[0][:, None], column_T, is_here, counts_T)
        return (sums[0].log() - sums[1]) * counts_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        probabilities_TV, column_T, is_here, counts_T = ctx.saved_tensors
        grad_TV = probabilities_TV.clone()
        grad_TV.scatter_add_(-1, column_T[:, None], -is_here[:, None].to(grad_TV.dtype))
        return grad_TV * (grads[0] * counts_T)[:, None], None, None, None, None
