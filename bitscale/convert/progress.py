"""Progress of a conversion on stderr: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes written, of `num_bytes`; a context manager."""

    def __init__(self, what: str, num_bytes: int) -> None:
        self._what = what.removeprefix(".").removesuffix(".partial")
        self._num_bytes, self._done_bytes = num_bytes, 0
        self._start = self._last_line = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_bytes,
            unit="B",
            unit_scale=True,
            desc=self._what,
            file=sys.stderr,
            disable=not self._on_terminal,
        )

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if not self._on_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            seconds = now - self._start
            left = (self._num_bytes - self._done_bytes) / self._done_bytes * seconds
            print(
                f"{self._what}: {self._done_bytes / 1e6:.0f} of {self._num_bytes / 1e6:.0f} MB, "
                f"{self._done_bytes / 1e6 / seconds:.1f} MB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
