"""The optimizers that DeepSpeed's ZeRO can run: what they update, element by element, may be cut
into flat pieces anywhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitscale.config import OptimConfig

PIECE_ELEMENTS = 65536  # five tensors of 256 kB: a core's cache


class _ParameterWise(torch.optim.Optimizer, ABC):
    """Optimizers that update one parameter after the other, by `_update`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """The update of one parameter."""


class Lion(_ParameterWise):
    """Sign of an interpolated momentum, with decoupled weight decay (arXiv:2302.06675, alg. 2).

        w ← w − lr (sign(β1 m + (1 − β1) g) + decay · w);   m ← β2 m + (1 − β2) g

    One moment (`exp_avg`), fp32. Where gradient and momentum are 0 nothing moves but the decay.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        momentum = state["exp_avg"]
        direction = torch.lerp(grad, momentum, beta1).sign_()
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])
        momentum.lerp_(grad, 1.0 - beta2)


class AdamW(_ParameterWise, torch.optim.AdamW):
    """torch's AdamW for a CPU, bit for bit, some elements at a time.

    ZeRO hands it all parameters as one flat tensor, whose temporaries and passes then stay in the
    cache. (torch's fused kernel is faster still, but rounds the last elements of a tensor otherwise
    than the others: updates would depend on where ZeRO cuts.)
    """

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        lr, (beta1, beta2), step = group["lr"], group["betas"], state["step"].item()
        rms_correction = (1 - beta2**step) ** 0.5
        step_size = lr / (1 - beta1**step)
        tensors = (parameter, grad, state["exp_avg"], state["exp_avg_sq"])
        for w, g, mean, square in zip(*map(_pieces, tensors), strict=True):
            w.mul_(1 - lr * group["weight_decay"])
            mean.lerp_(g, 1 - beta1)
            square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.addcdiv_(mean, (square.sqrt() / rms_correction).add_(group["eps"]), value=-step_size)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A flat tensor in pieces; any other, such as a weight without ZeRO, as it is."""
    return torch.split(tensor, PIECE_ELEMENTS) if tensor.dim() == 1 else (tensor,)


def make_optimizer(
    optim: OptimConfig, groups: list[dict[str, Any]], *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer `optim.name` over parameter groups.

    lr 0: DeepSpeed steps once on zero gradients at start-up in some modes, and weight decay would
    then change the weights. Every real step sets its own lr.
    """
    if optim.name == "lion":
        return Lion(groups, lr=0.0, betas=optim.betas, weight_decay=0.0)
    assert optim.name == "adamw", "the others are refused by the configuration check"
    options: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if fused:
        return torch.optim.AdamW(groups, **options, weight_decay=0.0, fused=True)
    return AdamW(groups, **options, weight_decay=0.0)
