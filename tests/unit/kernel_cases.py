"""Inputs and comparisons that the tests of every table of kernels share.

Shapes: T tokens, D inputs, F outputs.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gaussian import gaussian
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitscale.errors import KernelUnavailable
from bitscale.quant.kernels import Kernels, cpu_library
from bitscale.quant.kernels.linear import ternary_linear
from bitscale.quant.kernels.table import Measure

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEASURES: list[Measure] = ["absmean", "absmedian"]
INF, NAN = float("inf"), float("nan")
FLOAT32_MAX = torch.finfo(torch.float32).max
SHAPES = [(1, 1, 1), (5, 64, 3), (64, 128, 128), (65, 130, 129), (7, 300, 200), (130, 96, 70)]


def why_no_cpu_kernels() -> str | None:
    """Why the CPU's kernels cannot be tested on this machine, or None."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "no C compiler"
    try:
        cpu_library._check_integer_product()
    except KernelUnavailable as error:
        return str(error)
    return None


NEEDS_CPU_KERNELS = pytest.mark.skipif(
    why_no_cpu_kernels() is not None, reason=why_no_cpu_kernels() or ""
)


def among_nans(x: Tensor) -> Tensor:
    """`x` as a view with a stride beyond its width: reading past a row's end reads NaN."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 3), NAN)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit the same values, NaN where NaN."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def error(got: Tensor, exact: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - exact).norm())


def assert_at_most_twice_naive_bf16(kernels: Kernels, device: str = "cpu") -> None:
    """y and all gradients of a bf16 layer, against float64, beside F.linear(x̂, ŵ) in bf16.

    The yardstick has the same codes and scales, and rounds x̂, ŵ and every product to bf16.
    """
    x, w, bias, grad = (
        gaussian(*shape, seed=seed).to(device, torch.bfloat16)
        for seed, shape in enumerate([(120, 96), (70, 96), (70,), (120, 70)])
    )
    rows, weight = kernels.quantize_rows(x, EPS), kernels.ternarize(w, "absmean", EPS)
    exact = [rows.codes_TD.double() * rows.scale_T1, weight.codes_FD.double() * weight.scale]

    def results(leaves: list[Tensor], layer: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = layer(*leaves)
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    ours = results(
        [x, w, bias], lambda x, w, bias: ternary_linear(x, w, bias, rows, weight, kernels)
    )
    naive = results([*(t.bfloat16() for t in exact), bias], F.linear)
    best = results([*exact, bias.double()], F.linear)
    assert len(ours) == len(naive) == len(best) == 4
    for got, yardstick, want in zip(ours, naive, best, strict=True):
        assert got.dtype == torch.bfloat16
        assert 0.0 < error(got, want) <= 2 * error(yardstick, want)


class NoHostMemory(TorchDispatchMode):
    """For tensors of the meta device: fails at operators that read or write the host's memory.

    On a GPU such a copy is waited for, and a CUDA graph cannot hold it. (A value cannot be asked
    of a meta tensor at all.)
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not isinstance(t, Tensor) or t.is_meta, f"{function} touches the host's memory"
        return out


HARD_WEIGHTS = {
    "one": torch.tensor([[-3.0]]),
    "zeros": torch.zeros(7, 9),
    "negative zeros": -torch.zeros(4, 4),
    "below eps": torch.full((5, 5), 3e-6),
    "odd, several programs": gaussian(129, 257) * 0.02,
    "equal values": torch.full((64, 33), 0.1),
    "one outlier": gaussian(40, 50).index_put_((torch.tensor(3),), torch.tensor(1e6)),
    "ties": torch.tensor([[0.5, 1.5, -0.5, -1.5], [1.5, 0.5, 1.5, 0.5]]),  # scale 1
    "denormals": torch.tensor([1e-45, -3e-45, 1e-40, 1e-39, 0.0, 2e-38]).expand(3, 6),
    "even count": torch.tensor([[4.0, -1.0], [3.0, -2.0]]),  # lower median 2
    "inf": torch.tensor([[INF, 1.0, -2.0], [0.5, -0.1, 0.3]]),
    "mostly inf": torch.tensor([[INF, -INF, -INF], [0.5, INF, 0.3]]),
    "nan": torch.tensor([[NAN, 1.0, -2.0], [0.5, -0.1, INF]]),
    "huge": torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX, 1.0]]),
    "a filter": gaussian(6, 5, 3, 3),
}

HARD_ROWS = {
    "zeros": torch.zeros(3, 17),
    "negative zeros": -torch.zeros(2, 5),
    "below eps": torch.full((2, 5), 3e-6),
    "one outlier": torch.cat([torch.full((2, 99), 1e-3), torch.full((2, 1), -1e4)], dim=1),
    "ties": torch.arange(-127.0, 127.5, 0.5).expand(2, -1),  # scale 1
    "denormals": torch.tensor([[1e-45, -1e-40, 1e-39], [0.0, 1e-45, -0.0]]),
    "inf": torch.tensor([[INF, 1.0, -2.0], [0.5, -0.1, 0.3], [-INF, INF, 0.0]]),
    "nan": torch.tensor([[NAN, 1.0, -2.0], [0.5, NAN, INF], [3.0, 2.0, 1.0]]),
    "huge": torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX, 1.0]]),
    "empty": torch.zeros(0, 8),
    "one": torch.tensor([[-3.0]]),
}
