"""SIGTERM and Ctrl-C as a request to save and stop at the next step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While active, remembers the first signal; a second one acts as it would have.

    Under a launcher a second one is ignored (`repeats_kill` False): a signal to the whole job, as
    Ctrl-C or Slurm send it, reaches each rank twice, directly and passed on by the launcher, and
    must not end the save that it asked for. Launchers kill after half a minute by themselves.

    There it also stays active when an error leaves the block: launchers send SIGTERM to the other
    ranks as soon as one has died, and must not cut off what these say of that.
    """

    def __init__(self, *, repeats_kill: bool = True) -> None:
        self.received = False
        self._repeats_kill = repeats_kill
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._repeats_kill:
            self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._repeats_kill:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
