"""Work units in worker processes that may die: a dead worker is replaced and its units are repeated."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from runtime.errors import UserError
from runtime.progress import say
from runtime.signals import StopRequest

Unit = TypeVar("Unit")
Result = TypeVar("Result")
PATIENCE = 5  # deaths of one unit, alone in its process, before the run gives up


def run_units(
    work: Callable[[Unit], Result],
    units: Sequence[Unit],
    *,
    workers: int,
    stop: StopRequest | None = None,
    on_death: Callable[[Unit], Unit] = lambda unit: unit,
) -> Iterator[tuple[Unit, Result]]:
    """(unit, work(unit)) for every unit, in the order in which they are finished.

    `work` is a module-level function and must be idempotent. With workers=0 it runs in this process. When a worker dies
    (killed, out of memory, a fault in a library), the units that were running are repeated one by one, each alone in a
    fresh process; `on_death` may replace a unit that died there. Raises UserError when a unit dies again and again, and
    Stopped between units when a stop was requested.
    """
    if workers == 0:
        for unit in units:
            _check(stop)
            yield unit, work(unit)
        return
    suspects = yield from _run_pool(work, list(units), min(workers, max(1, len(units))), stop)
    for unit in suspects:
        for _ in range(PATIENCE):
            dead = yield from _run_pool(work, [unit], 1, stop)
            if not dead:
                break
            unit = on_death(unit)
        else:
            raise UserError(f"workers: {unit!r} ended its process {PATIENCE} times\n  is the machine out of memory?")


def _run_pool(
    work: Callable[[Unit], Result], units: list[Unit], workers: int, stop: StopRequest | None
) -> Iterator[tuple[Unit, Result]]:
    """Like `run_units`, in one pool at a time; returns the units that were running when a worker died."""
    suspects: list[Unit] = []
    waiting = units[::-1]
    while waiting:
        # spawn: forking a process that holds OpenMP or CUDA threads can lock up its child.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            running: dict[Future[Result], Unit] = {}
            try:
                while waiting or running:
                    _check(stop)
                    while waiting and len(running) < 2 * workers:
                        running[pool.submit(work, waiting[-1])] = waiting[-1]
                        waiting.pop()  # only now: a broken pool refuses the submission
                    for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                suspects += running.values()
                say(f"a worker process died; repeating {len(running)} units")
            except BaseException:
                for future in running:
                    future.cancel()
                raise
    return suspects


def _check(stop: StopRequest | None) -> None:
    if stop is not None:
        stop.check()


def _start_worker() -> None:
    """A stop is the parent's business; and a worker whose parent was killed must not stay behind."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
