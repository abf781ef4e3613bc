"""What a forked training session carries in itself to go wrong at an exact point of a save.

Ambushes are laid in the session's own process (`preloaded.Session(prepare=...)`) and strike just
before a file operation, or in the middle of one: no timing, no luck, and no code in bitscale.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bitscale.checkpoint.write as write_module

Strike = Callable[[], None]
_PARTIAL = ".partial"


def sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def io_error() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Operation(NamedTuple):
    """A file operation: an audit event of Python's, and what its path arguments contain."""

    event: str  # open, os.mkdir, os.rename, os.remove
    part: str
    count: int = 1  # strike at its count-th time


class Point(NamedTuple):
    """A moment of a save: the next `operation` after `armed_by` has happened (None: at once)."""

    operation: Operation
    armed_by: Operation | None = None


_SHARD, _META, _SUMS = f"{_PARTIAL}/state-", f"{_PARTIAL}/meta.json", f"{_PARTIAL}/SHA256SUMS"
_RENAMED = Operation("os.rename", _PARTIAL + "|step-")  # a whole checkpoint takes its name
SAVE_POINTS: dict[str, Point] = {
    "before its directory is made": Point(Operation("os.mkdir", _PARTIAL)),
    "before the shard's first byte": Point(Operation("open", _SHARD)),
    "in the middle of the shard": Point(Operation("shard part", "", 9)),
    "before the shard is synced": Point(Operation("fsync", _SHARD)),
    "shard durable, before the checksums": Point(Operation("open", _SUMS)),
    "in the middle of meta.json": Point(Operation("half of", _META)),
    "before meta.json is synced": Point(Operation("fsync", _META)),
    "before the rename": Point(_RENAMED),
    "renamed, before the parent is synced": Point(Operation("fsync", "/checkpoints"), _RENAMED),
    "renamed, before `latest` is written": Point(Operation("open", ".latest.partial"), _RENAMED),
    "before `latest` is replaced": Point(Operation("os.rename", ".latest.partial"), _RENAMED),
    "before an old one is renamed for deletion": Point(Operation("os.rename", ".deleted")),
    "old one half deleted": Point(
        Operation("os.remove", "", 2), Operation("os.rename", ".deleted")
    ),
}


def lay(point: Point, strike: Strike) -> None:
    """Make `strike` happen in this process when `point` is reached, once."""
    armed, count, struck = point.armed_by is None, 0, False

    def notice(event: str, text: str) -> None:
        nonlocal armed, count, struck
        if struck:
            return
        if not armed:
            armed = point.armed_by is not None and _is(point.armed_by, event, text)
        elif _is(point.operation, event, text):
            count += 1
            struck = count == point.operation.count
            if struck:
                strike()

    sys.addaudithook(
        lambda event, args: (
            notice(event, _paths(event, args)) if event == "open" or event[:3] == "os." else None
        )
    )
    _watch_fsync(notice)
    _watch_shard(notice)
    _watch_text(notice)


def _is(operation: Operation, event: str, text: str) -> bool:
    return event == operation.event and operation.part in text


def _paths(event: str, args: tuple[Any, ...]) -> str:
    """`path`, or for a rename `from|name of to`."""
    if event == "os.rename":
        return f"{args[0]}|{Path(str(args[1])).name}"
    return str(args[0])


def _watch_fsync(notice: Callable[[str, str], None]) -> None:
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        notice("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    os.fsync = watched


def _watch_shard(notice: Callable[[str, str], None]) -> None:
    """ "shard part": before each tensor goes into the file."""
    as_bytes = write_module._bytes

    def watched(tensor: Any) -> memoryview:
        notice("shard part", "")
        return as_bytes(tensor)

    write_module._bytes = watched


def _watch_text(notice: Callable[[str, str], None]) -> None:
    """ "half of": when half of a small text file is in it."""
    write_text = Path.write_text

    def watched(path: Path, data: str, *args: Any, **kwargs: Any) -> int:
        write_text(path, data[: len(data) // 2], *args, **kwargs)
        notice("half of", str(path))
        return write_text(path, data, *args, **kwargs)

    Path.write_text = watched  # type: ignore[method-assign,assignment]


def jump_clock() -> None:
    """The wall clock jumps ten years ahead and back again at every reading."""
    true, readings = time.time, 0

    def jumping() -> float:
        nonlocal readings
        readings += 1
        return true() + 315_576_000.0 * (-1) ** readings

    time.time = jumping
