"""megatron-core on a machine without CUDA: the calls of its tensor-parallel code that assume one."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Six calls answered by the CPU. Nothing is changed where there is CUDA."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random

    with contextlib.ExitStack() as stack:
        for target, name, answer in (
            (torch.cuda, "current_device", lambda: "cpu"),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "manual_seed", torch.manual_seed),
            (random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
            (random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
            (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        ):
            stack.enter_context(mock.patch.object(target, name, answer))
        yield


@contextlib.contextmanager
def megatron_optimizers_on_cpu() -> Iterator[None]:
    """Its optimizers too: they know parameters by their CUDA types, keep scalars on "cuda", and
    carry shards there for communication. Nothing is changed where there is CUDA."""
    if torch.cuda.is_available():
        yield
        return
    type_of, tensor = torch.Tensor.type, torch.tensor

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        return found if args or kwargs else found.replace("torch.", "torch.cuda.")

    def tensor_on_cpu(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return tensor(*args, device=None if device == "cuda" else device, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "type", cuda_type),
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch, "tensor", tensor_on_cpu),
    ):
        yield
