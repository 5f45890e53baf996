"""Asking a run to stop: SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 set a flag that long work looks at between units."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """True once a signal came. A second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.signal is not None:
            raise Stopped(self.signal.name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the signals above ask instead of kill. Only for the main thread."""
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        # Not print: the signal may come in the middle of one, and a stream refuses to be entered twice.
        os.write(2, f"{request.signal.name}: stopping at the next safe point (Ctrl-C again: at once)\n".encode())

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
