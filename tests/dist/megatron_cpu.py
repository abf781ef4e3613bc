"""megatron-core on a machine without CUDA: the calls of its tensor-parallel code that assume one."""

import contextlib
from collections.abc import Iterator
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
