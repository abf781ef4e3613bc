"""What a thread is doing, from its Python frames: which collective it waits in, at which line.

Reading frames costs microseconds and changes nothing about the training, so heartbeats, the hang
watchdog and errors all tell it the same way, whoever made the call (we, DeepSpeed, megatron-core).
"""

import linecache
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import bitscale
from bitscale.heartbeat import Place

_COLLECTIVES = "torch/distributed/distributed_c10d.py"
# A line that waits for what was started before: an asynchronous collective, or the GPU, in whose
# queue a collective may stand.
_ASYNCHRONOUS = ".wait("
_DEVICE = (".item(", ".tolist(", ".synchronize(", ".cpu(")
# torch's own frames, and those of decorators that it puts around collectives.
_TORCH = re.compile(
    r"/(site|dist)-packages/(torch/|typing_extensions\.py$)"
    r"|/lib/python3\.\d+/(threading|contextlib)\.py$"
)
_PACKAGES = re.compile(r".*/(site|dist)-packages/")
_OURS = f"{Path(bitscale.__file__).parent}/"
_Step = tuple[str, int, str]  # file, line, function


def place_of_main_thread() -> Place:
    """Where the main thread, which trains, is now (callable from any thread)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _place(list(_outwards(frame)))


def place_of_error(trace: TracebackType | None) -> Place:
    """Where an error was raised."""
    steps: list[_Step] = []
    while trace is not None:
        steps.append(_step(trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return _place(steps[::-1])


def _outwards(frame: FrameType | None) -> Iterator[_Step]:
    while frame is not None:
        yield _step(frame, frame.f_lineno)
        frame = frame.f_back


def _step(frame: FrameType, line: int | None) -> _Step:
    return frame.f_code.co_filename, line or 0, frame.f_code.co_name


def _place(steps: list[_Step]) -> Place:
    """Of frames, innermost first."""
    if not steps:
        return Place(None, "")
    foreign = next((step for step in steps if not _TORCH.search(step[0])), steps[0])
    own = next((step for step in steps if step[0].startswith(_OURS)), foreign)
    lines = [_describe(foreign)] if own == foreign else [_describe(foreign), _describe(own)]
    return Place(_collective(steps), ", called from ".join(lines))


def _collective(steps: list[_Step]) -> str | None:
    # The outermost: all_gather_object calls all_gather.
    called = [
        name for file, _, name in steps if file.endswith(_COLLECTIVES) and not name.startswith("_")
    ]
    if called:
        return called[-1]
    file, line, _ = steps[0]
    text = linecache.getline(file, line)
    if _ASYNCHRONOUS in text:
        return "an asynchronous collective"
    if any(call in text for call in _DEVICE):
        return "the device"
    return None


def _describe(step: _Step) -> str:
    """`bitscale/mesh.py:94 in max`"""
    file, line, name = step
    if file.startswith(_OURS):
        short = f"bitscale/{file[len(_OURS) :]}"
    elif _PACKAGES.match(file):
        short = _PACKAGES.sub("", file)
    else:
        short = "/".join(Path(file).parts[-2:])
    return f"{short}:{line} in {name}"
