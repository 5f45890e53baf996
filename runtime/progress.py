"""One status line with rate and time left: rewritten in place on a terminal, a plain line now and then otherwise."""

import sys
import time
from typing import TextIO


def say(text: str) -> None:
    """Talk goes to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """`with Progress("decode", total=600, unit="images") as progress: progress.advance(1)`."""

    def __init__(
        self,
        name: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        every: float = 10.0,
        stream: TextIO | None = None,
        quiet: bool = False,
    ):
        """`done` of `total` were finished by an earlier run; `every` is the seconds between plain lines.

        `quiet`: says nothing, for all but one of several processes that do the same.
        """
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first = done
        self.stream, self.quiet = stream or sys.stderr, quiet
        self.live = self.stream.isatty() and not quiet
        self.every = 0.2 if self.live else every
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown >= self.every and self.done < self.total:
            self.shown = now
            self._show(self.line(note))

    def line(self, note: str = "") -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.first) / seconds
        left = clock((self.total - self.done) / rate) if rate else "?"
        parts = [f"{self.name} {self.done}/{self.total}", note, f"{rate:.3g} {self.unit}/s", f"{left} left"]
        return " ".join(part for part in parts if part)

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = time.monotonic() - self.start
        rate = (self.done - self.first) / max(seconds, 1e-9)
        if kind is None:
            self._show(f"{self.name} {self.done} {self.unit} in {clock(seconds)} ({rate:.3g}/s)", last=True)
        elif self.live:
            self.stream.write("\n")

    def _show(self, text: str, last: bool = False) -> None:
        if self.quiet:
            return
        if self.live:
            self.stream.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """Seconds as people write them: 42s, 3m05, 2h07, 3d04h."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
