"""One status line: in place on a terminal, now and then elsewhere."""

import io

import pytest

from runtime import progress
from runtime.progress import Progress, clock, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def time(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_come_every_ten_seconds_and_at_the_end(time):
    stream = io.StringIO()
    with Progress("decode", total=600, unit="images", stream=stream) as bar:
        for _ in range(30):
            time.now += 1
            bar.advance(20, "kept 3")
    assert stream.getvalue().splitlines() == [
        "decode 200/600 kept 3 20 images/s 20s left",
        "decode 400/600 kept 3 20 images/s 10s left",
        "decode 600 images in 30s (20/s)",
    ]


def test_a_terminal_has_one_line_written_in_place(time):
    stream = Terminal()
    with Progress("step", total=10, unit="steps", stream=stream) as bar:
        for _ in range(10):
            time.now += 0.25
            bar.advance(1)
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    assert shown.endswith("\n")
    assert shown.count("\r\x1b[K") == 10
    assert "step 4/10 4 steps/s 1.5s left" in shown


def test_a_resumed_run_counts_its_own_rate_only(time):
    stream = io.StringIO()
    with Progress("step", total=1000, unit="steps", done=900, stream=stream) as bar:
        time.now += 20
        bar.advance(20)
        assert bar.line() == "step 920/1000 1 steps/s 1m20 left"


def test_a_failure_is_not_reported_as_done(time):
    for stream in (io.StringIO(), Terminal()):
        bar = Progress("read", total=10, unit="files", stream=stream)
        time.now += 20
        bar.advance(1)
        bar.__exit__(OSError, OSError("gone"), None)
        assert "read 1/10" in stream.getvalue()
        assert stream.getvalue().endswith("\n")
        assert " in " not in stream.getvalue()


def test_nothing_done_yet(time):
    assert Progress("x", total=5, unit="y", stream=io.StringIO()).line().endswith("? left")


def test_talk_goes_to_stderr(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (4.24, "4.2s"), (42, "42s"), (59.7, "1m00"), (185, "3m05"), (7620, "2h07"), (273600, "3d04h")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_quiet_one_says_nothing():
    stream = io.StringIO()
    with Progress("step", total=3, unit="steps", every=0.0, stream=stream, quiet=True) as progress:
        progress.advance(1)
    assert stream.getvalue() == ""
