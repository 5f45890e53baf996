"""Workers that die are replaced and their units repeated. The units are programs, run by the builtin `exec`."""

import signal

import pytest

from curation.pool import PATIENCE, run_units
from runtime.errors import Stopped, UserError
from runtime.signals import StopRequest

DIE_ONCE = """
import os, pathlib
grave = pathlib.Path({grave!r})
if not grave.exists():
    grave.touch()
    os.kill(os.getpid(), 9)
pathlib.Path({done!r}).touch()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unit_gives_its_result(workers):
    assert sorted(run_units(abs, [-3, -2, 1], workers=workers)) == [(-3, 3), (-2, 2), (1, 1)]


def test_units_of_a_killed_worker_are_repeated(tmp_path):
    units = [DIE_ONCE.format(grave=str(tmp_path / f"grave{i}"), done=str(tmp_path / f"done{i}")) for i in range(3)]
    assert len(list(run_units(exec, units, workers=2))) == 3
    assert len(list(tmp_path.glob("done*"))) == 3


def test_a_unit_that_always_kills_its_worker_is_replaced_or_given_up():
    deadly = "import os; os.kill(os.getpid(), 9)"
    deaths = []

    def on_death(unit: str) -> str:
        deaths.append(unit)
        return "pass" if len(deaths) == 2 else unit

    assert [unit for unit, _ in run_units(exec, [deadly], workers=1, on_death=on_death)] == ["pass"]
    assert deaths == [deadly, deadly]
    with pytest.raises(UserError, match=f"ended its process {PATIENCE} times"):
        list(run_units(exec, [deadly], workers=1))


def test_an_error_of_the_work_is_an_error_of_the_run():
    with pytest.raises(TypeError):
        list(run_units(abs, ["text"], workers=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_request_ends_the_work_between_units(workers):
    stop = StopRequest()
    seen = []

    def stop_after_one() -> None:
        for unit, _ in run_units(abs, [1, 2, 3, 4], workers=workers, stop=stop):
            seen.append(unit)
            stop.signal = signal.SIGTERM

    with pytest.raises(Stopped):
        stop_after_one()
    assert 1 <= len(seen) <= max(1, 2 * workers)  # units already in a worker's hands may come back together
