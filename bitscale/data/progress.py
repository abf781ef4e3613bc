"""Progress of long work on files, on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """One line for the user; stdout stays free for results."""
    tqdm.write(message, file=sys.stderr)


class ByteProgress:
    """Counts finished bytes; a context manager.

    Args:
        what: what is done, or the file that comes into being.
        num_bytes: of the whole work; 0 if unknown, then there is no ETA.
        done_bytes: finished by an earlier, interrupted run.
    """

    def __init__(self, what: str, num_bytes: int, done_bytes: int = 0) -> None:
        self._what = what.removeprefix(".").removesuffix(".partial")
        self._num_bytes = num_bytes
        self._done_bytes = self._resumed_bytes = done_bytes
        self._start = self._last_line = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_bytes or None,
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            desc=self._what,
            file=sys.stderr,
            disable=not self._on_terminal,
        )

    def add(self, num_bytes: int) -> None:
        """A part is finished."""
        self._done_bytes += num_bytes
        if self._on_terminal:
            self._bar.set_postfix_str(self._detail(), refresh=False)
            self._bar.update(num_bytes)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"{self._what}: {self._line()}")

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        new_bytes = self._done_bytes - self._resumed_bytes
        eta_seconds = (self._num_bytes - self._done_bytes) / max(new_bytes, 1) * seconds
        parts = (
            f"{self._done_bytes / 1e6:.0f} of {self._num_bytes / 1e6:.0f} MB",
            f"{new_bytes / 1e6 / seconds:.1f} MB/s",
            self._detail(),
            f"{eta_seconds:.0f} s left",
        )
        return ", ".join(filter(None, parts))

    def _detail(self) -> str:
        """What else there is to say of the speed."""
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()


class TokenProgress(ByteProgress):
    """Counts finished input bytes and tokens of a preparation."""

    def __init__(self, num_bytes: int, done_bytes: int) -> None:
        super().__init__("tokenizing", num_bytes, done_bytes)
        self._num_tokens = 0

    def add_tokens(self, num_bytes: int, num_tokens: int) -> None:
        """A part is finished."""
        self._num_tokens += num_tokens
        self.add(num_bytes)

    def _line(self) -> str:
        if self._num_bytes == 0 or self._done_bytes == self._resumed_bytes:
            return f"{self._num_tokens} tokens, {self._detail()}"
        return super()._line()

    def _detail(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{self._num_tokens / seconds:,.0f} tokens/s"
