"""Every kernel of a table on tensors that end where their memory ends: `guarded_memory.py cpu`.

Reading or writing past the end of a tensor ends the process with a segmentation fault. A GPU may
hide it, or stop a run with "illegal memory access" weeks later.

Shapes: T tokens, D inputs, F outputs.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from bitscale.quant.kernels import Kernels, Measure, get_kernels
from bitscale.quant.kernels.table import GradientBits
from bitscale.quant.reference import Int8Rows, Ternary

EPS = 1e-5
CASES = {
    "cpu": [
        (shape, dtype)
        for shape in [(1, 1, 1), (5, 67, 3), (33, 130, 129), (66, 48, 200)]
        for dtype in (torch.float32, torch.bfloat16)
    ],
    # The interpreter is slow.
    "triton": [((5, 67, 3), torch.bfloat16), ((66, 30, 70), torch.float32)],
}


def guarded(t: Tensor) -> Tensor:
    """A copy whose last element lies before a page that cannot be touched; the same strides."""
    if not t.numel():
        return t
    span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    num_bytes = span * t.element_size()
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0
    ):
        raise OSError("mprotect failed")
    flat = torch.frombuffer(memory, dtype=t.dtype, count=span, offset=size - num_bytes)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


@contextmanager
def guarded_results() -> Iterator[None]:
    """What the kernels' functions allocate is guarded, too."""

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: guarded(function(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "zeros"),
            (Tensor, "new_empty"), (Tensor, "new_zeros"),
        ):  # fmt: skip
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield


def operand(*shape: int, dtype: torch.dtype = torch.float32, padding: int = 0) -> Tensor:
    """Guarded Gaussian numbers; rows lie `padding` elements apart."""
    generator = torch.Generator().manual_seed(sum(shape))
    whole = torch.randn(*shape[:-1], shape[-1] + padding, generator=generator)
    return guarded(whole.to(dtype)[..., : shape[-1]])


def run_every_kernel(k: Kernels, T: int, D: int, F: int, dtype: torch.dtype) -> None:
    w, norm, bias = (operand(*shape, dtype=dtype) for shape in ((F, D), (D,), (F,)))
    for measure in get_args(Measure):
        k.ternarize(w, measure, EPS)
        k.blend_weight(w, measure, EPS, 0.3)
    for padding, weight_D in ((0, norm), (3, None)):
        x = operand(T, D, dtype=dtype, padding=padding)
        k.blend_rows(x, EPS, 0.3)
        k.quantize_rows(x, EPS)
        rstd = guarded(k.rms_norm_quantize_rows(x, weight_D, EPS, EPS).rstd_T1)
        k.rms_norm_grad(operand(T, D, dtype=dtype, padding=padding), x, rstd, weight_D)
    rows = Int8Rows(*map(guarded, k.quantize_rows(x, EPS)))
    weight = Ternary(*map(guarded, k.ternarize(w, "absmean", EPS)))
    for bias_F in (bias, None):
        k.integer_linear(rows, weight, bias_F, dtype)
    grad = operand(T, F, dtype=dtype)
    for bits, main_grad in ((None, None), (8, None), (16, None), (24, None), (None, operand(F, D))):
        k.input_grad(grad, weight, cast(GradientBits, bits))
        k.weight_grad(grad, rows, dtype, main_grad, cast(GradientBits, bits))


def main(arguments: list[str]) -> None:
    name: Any = arguments[0]
    if name == "overrun":
        t = guarded(torch.zeros(5))
        print("still there:", ctypes.string_at(t.data_ptr(), t.nbytes), flush=True)
        ctypes.string_at(t.data_ptr(), t.nbytes + 1)
        return
    with guarded_results():
        for shape, dtype in CASES[name]:
            run_every_kernel(get_kernels(name, "cpu"), *shape, dtype)
    print(f"{name}: nothing past the end of a tensor")


if __name__ == "__main__":
    main(sys.argv[1:])
