"""The vocabulary projection and, over it, the next-token cross entropy, some tokens at a time.

The fp32 logits of a micro-batch, their log-softmax and its gradient are V values a token each: with
a large vocabulary most of a training step's memory. Here those of `TOKENS_PER_SLICE` tokens exist
at a time: right after the logits of a slice, the gradients that follow from them are computed, of
the hidden states and of the weight, and the backward pass only scales them. Nothing is computed
twice. (As Liger Kernel does it: arXiv:2410.10989, section 3.2.)

Shapes: B batch, S sequence, T tokens, D model width, V vocabulary (this rank's part of it).
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitscale.model.collectives import (
    ONE_RANK,
    ParameterShard,
    TensorGroup,
    copy_to_group,
    gather_sequence,
)
from bitscale.model.cost import LOSS_SLICE_TOKENS
from bitscale.model.vocabulary import vocab_parallel_cross_entropy, vocabulary_range
from bitscale.quant.reference import Quant, int8_linear
from bitscale.quant.schedule import SIXTEEN_BIT

IGNORED_TARGET = -100  # F.cross_entropy's default ignore_index
TOKENS_PER_SLICE = LOSS_SLICE_TOKENS

Reduction = Literal["mean", "none"]


class Head(nn.Linear):
    """Hidden states to logits or losses; 16 bit, or 8-bit weights and activations following λ.

    Of ranks that share the vocabulary, each gives the logits of its part, and the same losses.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        quant: Quant,
        *,
        bits: int,
        tp: TensorGroup = ONE_RANK,
    ) -> None:
        first, end = vocabulary_range(vocab_size, tp)
        super().__init__(d_model, end - first, bias=False)
        self.quant, self.tp, self.first = quant, tp, first
        if tp.size > 1:
            self.weight.shard = ParameterShard(0, first, end, (vocab_size, d_model))  # type: ignore[attr-defined]
        self.bits = bits
        self.strength = SIXTEEN_BIT

    def forward(
        self, x: Tensor, target_ids_BS: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """fp32 logits [B, S, V] of the hidden states `x` [B, S, D]; or, with targets, the cross
        entropy in nats, fp32.

        `reduction` "mean" gives a scalar over the targets that are not IGNORED_TARGET; "none"
        gives [B, S] with 0 at ignored targets. With sequence parallelism `x` is [S / tp, B, D]
        and the logits are [S, B, V].
        """
        enter = gather_sequence if self.tp.sequence_parallel else copy_to_group
        x = enter(x, self.tp)
        if target_ids_BS is None:
            return self._logits(x, self.weight)
        is_transposed = self.tp.sequence_parallel
        targets = target_ids_BS.T if is_transposed else target_ids_BS
        x_TD, targets_T = x.flatten(0, 1), targets.flatten()
        if reduction == "none":
            losses = self._token_losses(x_TD, targets_T).view_as(targets)
            return losses.T if is_transposed else losses
        if self.tp.size == 1 and x_TD.shape[0] <= TOKENS_PER_SLICE:
            return F.cross_entropy(self._logits(x_TD, self.weight), targets_T)
        count = (targets_T != IGNORED_TARGET).sum()
        if torch.is_grad_enabled() and x_TD.shape[0] > TOKENS_PER_SLICE:
            return cast(Tensor, _MeanLoss.apply(x_TD, self.weight, targets_T, count, self))  # type: ignore[no-untyped-call]
        return self._token_losses(x_TD, targets_T).sum() / count

    def _token_losses(self, x_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Nats [T], fp32; whole logits exist only if a gradient is wanted."""
        xs, targets = torch.split(x_TD, TOKENS_PER_SLICE), torch.split(targets_T, TOKENS_PER_SLICE)
        slices = zip(xs, targets, strict=True)
        return torch.cat([self.losses_of_slice(x, self.weight, ids) for x, ids in slices])

    def losses_of_slice(self, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
        """Nats [T], fp32, 0 at ignored targets."""
        logits_TV = self._logits(x_TD, w_VD)
        if self.tp.size == 1:
            return F.cross_entropy(logits_TV, targets_T, reduction="none")
        return vocab_parallel_cross_entropy(
            logits_TV, targets_T, self.first, self.tp, IGNORED_TARGET
        )

    def _logits(self, x: Tensor, w_VD: Tensor) -> Tensor:
        strength = self.strength if self.bits == 8 else SIXTEEN_BIT
        return int8_linear(x, w_VD, strength, self.quant).float()


class _MeanLoss(torch.autograd.Function):
    """Mean cross entropy, with the gradients of a slice computed right after its logits.

    The weight's is summed over slices in fp32, whatever its dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, count: Tensor, head: Head
    ) -> Tensor:
        x_leaf_TD, w_leaf_VD = x_TD.detach(), w_VD.detach().requires_grad_()
        losses_T = torch.empty(targets_T.shape, device=x_TD.device)
        grad_TD = torch.empty_like(x_TD)
        grad_VD = torch.zeros_like(w_VD, dtype=torch.float32)
        for start in range(0, len(targets_T), TOKENS_PER_SLICE):
            part = slice(start, start + TOKENS_PER_SLICE)
            with torch.enable_grad():
                x = x_leaf_TD[part].requires_grad_()
                losses = head.losses_of_slice(x, w_leaf_VD, targets_T[part])
                grads = torch.autograd.grad(losses.sum() / count, (x, w_leaf_VD))
            losses_T[part] = losses.detach()
            grad_TD[part] = grads[0]
            grad_VD += grads[1]
        ctx.save_for_backward(grad_TD, grad_VD.to(w_VD.dtype))
        return losses_T.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * grads[0], grad_VD * grads[0], None, None, None
