"""Signals ask; work stops at its next safe point."""

import io
import os
import signal
import sys
import time

import pytest

from runtime.errors import Stopped
from runtime.signals import SIGNALS, StopRequest, stop_on_signals


def test_no_signal_no_stop():
    request = StopRequest()
    assert not request
    request.check()


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_sets_the_flag_and_says_so(number, capfd):
    with stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request
        with pytest.raises(Stopped, match=number.name):
            request.check()
    assert capfd.readouterr().err == f"{number.name}: stopping at the next safe point (Ctrl-C again: at once)\n"


def test_a_second_ctrl_c_ends_at_once():
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # a cluster may ask more than once
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]

    def fail():
        with stop_on_signals():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        fail()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_in_the_middle_of_a_print_does_no_harm(monkeypatch, tmp_path):
    """Python refuses to enter a stream twice; a handler that prints would raise in the middle of the work."""

    class Interrupted(io.FileIO):
        came = False

        def write(self, data):
            if not self.came:
                self.came = True
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.001)  # Python runs the handler here, inside the print
            return super().write(data)

    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted(tmp_path / "log", "w")))
    monkeypatch.setattr(sys, "stderr", stream)
    with stop_on_signals() as request:
        print("step 1", file=sys.stderr, flush=True)
    assert request
    stream.close()
    assert (tmp_path / "log").read_text() == "step 1\n"
