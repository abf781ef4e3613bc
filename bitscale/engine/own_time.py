"""The part of a step that a rank spends on its own work: it ends where waiting for others begins.

Ranks leave a step together, however slow one of them is, so that the step's time says nothing of
who was slow. What differs is the time before the first collective: reading the batch and the
forward passes. A slow host, GPU, or disk shows in it; a slow network does not, nor what is slow in
the backward pass only. ZeRO-3 gathers weights between the layers of the forward pass: there, the
layers' own times are added up. With tensor parallelism collectives lie inside them, and ranks that
share them take the same time (bitscale/watch/stragglers.py).
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class OwnTime(NamedTuple):
    """Of one step."""

    host_seconds: float
    gpu_spans: tuple[tuple[torch.cuda.Event, torch.cuda.Event], ...]  # begin and end, in its queue

    def seconds(self) -> float:
        """Waits for the GPU if it is not so far yet."""
        for _, end in self.gpu_spans:
            end.synchronize()
        on_gpu = [float(begin.elapsed_time(end)) / 1e3 for begin, end in self.gpu_spans]
        return self.host_seconds + sum(on_gpu)


class OwnClock:
    """Runs while the modules given to `watch` compute training batches, and within `running`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host_seconds = 0.0
        self._gpu_spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: Any = None

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """None of which is part of another. What hooks of before do is not counted."""
        for module in modules:
            module.register_forward_pre_hook(lambda module, _: self._begin(module))
            module.register_forward_hook(lambda module, _, __: self._end(module), prepend=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """For what the host does."""
        begun = time.perf_counter()
        yield
        self._host_seconds += time.perf_counter() - begun

    def take(self) -> OwnTime:
        """What has come together since the last call."""
        taken = OwnTime(self._host_seconds, tuple(self._gpu_spans))
        self._host_seconds, self._gpu_spans = 0.0, []
        return taken

    def _begin(self, module: nn.Module) -> None:
        if module.training:
            self._begun = self._now()

    def _end(self, module: nn.Module) -> None:
        if not module.training:
            return
        if self._on_gpu:
            self._gpu_spans.append((self._begun, self._now()))
        else:
            self._host_seconds += self._now() - self._begun

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def layers_with_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that hold parameters: before each of them ZeRO-3 gathers."""
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None and not any(
            next(child.parameters(), None) is not None for child in module.children()
        ):
            yield module
