"""Next-token loss: in slices of tokens as if whole, and against float64.

Shapes: B batch, S sequence, T tokens, D model width, V vocabulary.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bitscale.config import QuantConfig
from bitscale.model import head as head_module
from bitscale.model.bitlinear import set_strength
from bitscale.model.head import IGNORED_TARGET, Head
from bitscale.quant.schedule import Strength

pytestmark = pytest.mark.unit

B, S, D, V = 3, 11, 16, 97
SLICES = [1, 5, 8, 32]  # the last of 33 tokens alone in its slice, or fewer, or one slice missing 1


@pytest.fixture(params=SLICES)
def slice_length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(head_module, "TOKENS_PER_SLICE", request.param)
    yield request.param


def make_head(dtype: torch.dtype = torch.float32, bits: int = 16) -> Head:
    head = Head(D, V, QuantConfig(), bits=bits)
    with torch.no_grad():
        head.weight.copy_(gaussian(V, D, seed=1))
    set_strength(head, Strength(0.7, 0.4))
    return head.to(dtype)


def targets() -> Tensor:
    ids_BS = torch.arange(B * S).reshape(B, S) * 7 % V
    ids_BS[1, 2:6] = IGNORED_TARGET
    ids_BS[2, -1] = IGNORED_TARGET
    return ids_BS


def step(head: Head, factor: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of hidden states and weight; DeepSpeed scales losses by a factor."""
    x_BSD = gaussian(B, S, D).to(head.weight.dtype).requires_grad_()
    loss = head(x_BSD, targets())
    head.weight.grad = None
    (loss * factor).backward()
    assert x_BSD.grad is not None and head.weight.grad is not None
    return loss.detach(), x_BSD.grad, head.weight.grad


def exact(head: Head, factor: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, from the same rounded values."""
    x_BSD = gaussian(B, S, D).to(head.weight.dtype).double().requires_grad_()
    w_VD = head.weight.detach().double().requires_grad_()
    logits = (x_BSD @ w_VD.T).flatten(0, 1)
    loss = F.cross_entropy(logits, targets().flatten())
    (loss * factor).backward()
    assert x_BSD.grad is not None and w_VD.grad is not None
    return loss.detach(), x_BSD.grad, w_VD.grad


@pytest.mark.parametrize("bits", [16, 8])
def test_slices_change_nothing_but_the_order_of_sums(slice_length: int, bits: int) -> None:
    sliced = step(make_head(bits=bits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "TOKENS_PER_SLICE", B * S)
        whole = step(make_head(bits=bits))
    for got, want in zip(sliced, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_as_exact_as_the_whole(slice_length: int, dtype: torch.dtype) -> None:
    head = make_head(dtype)
    truth = exact(head)
    sliced = step(head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "TOKENS_PER_SLICE", B * S)
        whole = step(head)
    for got, plain, want in zip(sliced, whole, truth, strict=True):
        error, usual = ((value.double() - want).norm() / want.norm() for value in (got, plain))
        # A weight's gradient that is rounded to bf16 a token is the worst case: half an ulp each.
        assert float(error) <= 1.5 * float(usual) + 2e-7, (float(error), float(usual))


def test_losses_of_tokens_and_evaluation(slice_length: int) -> None:
    head, x_BSD = make_head(), gaussian(B, S, D)
    losses_BS = head(x_BSD, targets(), reduction="none")
    assert losses_BS.shape == (B, S) and losses_BS.requires_grad
    ignored_BS = targets() == IGNORED_TARGET
    assert (losses_BS[ignored_BS] == 0).all() and (losses_BS[~ignored_BS] > 0).all()
    with torch.no_grad():
        mean = head(x_BSD, targets())
    torch.testing.assert_close(mean, losses_BS.sum() / (~ignored_BS).sum(), rtol=1e-6, atol=0)


def test_no_targets_at_all_are_no_loss(slice_length: int) -> None:
    nothing = torch.full((B, S), IGNORED_TARGET)
    assert make_head()(gaussian(B, S, D), nothing).isnan()


class _Largest(TorchFunctionMode):
    """The most elements of any tensor that an operation returns."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_logits_of_more_than_a_slice_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TOKENS_PER_SLICE", 4)
    head = Head(D, 1000, QuantConfig(), bits=16)
    x_BSD = gaussian(B, 100, D).requires_grad_()
    targets_BS = torch.zeros(B, 100, dtype=torch.long)
    with _Largest() as seen:
        head(x_BSD, targets_BS).backward()
        head(x_BSD.detach(), targets_BS)
    assert seen.numel == 1000 * D  # the weight's gradient; the logits would be 1000 * 300
    with torch.no_grad(), _Largest() as seen:
        head(x_BSD, targets_BS, reduction="none")
    assert seen.numel < 1000 * D
