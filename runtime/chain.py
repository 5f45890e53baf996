"""Jobs that follow one another, some of them arrays of tasks: by `afterok` on SLURM, by one driver job on this machine.

A link starts only when every task of the link before it ended well. Where one fails, SLURM takes the links after it off
the queue; the tasks are idempotent, so launching the same chain again does what is missing. submitit's local executor
knows neither dependencies nor a limit on what runs at once: there one local job runs the links one after the other, the
tasks of a link as processes of their own.
"""

import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, UserError
from .launch import ACTIVE, Resources, Work, exit_file, parameters, require
from .progress import clock, say
from .signals import StopRequest, stop_on_signals

State = Literal["waiting", "running", "done", "stopped", "failed", "killed", "not run"]
BAD: tuple[State, ...] = ("failed", "killed", "stopped")


@dataclass(frozen=True)
class Link:
    """One job of a chain."""

    name: str
    commands: tuple[tuple[str, ...], ...]  # the arguments of each task; more than one makes an array
    resources: Resources
    at_once: int | None = None  # tasks that may run at the same time; None: all

    @property
    def title(self) -> str:
        return self.name if len(self.commands) == 1 else f"{self.name} x{len(self.commands)}"


@dataclass(frozen=True)
class Queued:
    """A link that was handed to SLURM."""

    link: Link
    job_id: str  # of the array as a whole where it is one
    logs: Path

    def task_id(self, task: int) -> str:
        return self.job_id if len(self.link.commands) == 1 else f"{self.job_id}_{task}"

    def log(self, task: int) -> Path:
        return self.logs / f"{self.task_id(task)}_0_log.err"

    def status(self, task: int) -> int | None:
        """Exit status that a task left; None where it left none."""
        path = exit_file(self.logs, self.task_id(task), 0)
        return int(path.read_text()) if path.is_file() else None


def chained_parameters(link: Link, name: str, after: str | None) -> dict[str, Any]:
    """What submitit is told of a link on SLURM. `after`: id of the job that must end well first.

    A dependency that the user gave holds for the first link. Tasks may be requeued, whatever the cluster's default.
    """
    told = parameters(name, "slurm", link.resources)
    extra = {"requeue": True, **told["slurm_additional_parameters"]}
    if after is not None:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    if link.at_once is not None:
        told["slurm_array_parallelism"] = link.at_once
    return told | {"slurm_additional_parameters": extra}


def submit_chain(
    main: Callable[[Sequence[str]], int], links: Sequence[Link], *, name: str, logs: Path
) -> tuple[Queued, ...]:
    """Hand a chain over to SLURM; all of it or, with a UserError, nothing. Job names are `<name>-<link>`."""
    require("slurm")
    import submitit
    from submitit.core.utils import UncompletedJobError

    fresh = not logs.exists()
    logs = logs.absolute()
    queued: list[Queued] = []
    for link in links:
        executor = submitit.AutoExecutor(folder=logs, cluster="slurm")
        after = queued[-1].job_id if queued else None
        executor.update_parameters(**chained_parameters(link, f"{name}-{link.name}", after))
        try:
            jobs = executor.submit_array([Work(main, command, str(logs), None) for command in link.commands])
        except UncompletedJobError as error:
            if queued:
                subprocess.run(["scancel", *(job.job_id for job in queued)], check=False)
            elif fresh:
                shutil.rmtree(logs, ignore_errors=True)
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"launch: slurm refused the job of {link.name}: {reason}") from error
        queued.append(Queued(link, jobs[0].job_id.partition("_")[0], logs))
    return tuple(queued)


def describe(queued: Sequence[Queued]) -> str:
    """What was handed over, where to look, how to stop."""
    ids = [job.job_id for job in queued]
    return (
        f"{' -> '.join(f'{job.link.title} ({job.job_id})' for job in queued)}\n"
        f"  logs  {shlex.quote(str(queued[0].logs))}/JOB_TASK_0_log.err\n"
        f"  look  squeue -j {','.join(ids)}\n"
        f"  stop  scancel {' '.join(ids)}   (launching the same again goes on)"
    )


def follow_chain(queued: Sequence[Queued], *, stop: StopRequest, every: float = 5.0) -> int | None:
    """A line per change of a link until no job is left; returns the chain's exit status, None when asked to stop."""
    shown: dict[str, str] = {}
    while not stop:
        active = _active(queued)
        if active is not None:
            for job in queued:
                states = task_states(job, active)
                line = f"{job.link.title} ({job.job_id}): {_count(states)}"
                if shown.get(job.job_id) != line and not set(states) <= {"waiting", "not run"}:
                    say(line)
                shown[job.job_id] = line
            if not active:
                return _outcome(queued)
        _sleep(every, stop)
    return None


def task_states(job: Queued, active: dict[str, str]) -> list[State]:
    """The state of each task of a link. `active`: SLURM's word for the tasks it still holds, by id."""
    states: list[State] = []
    for task in range(len(job.link.commands)):
        word, status = active.get(job.task_id(task)), job.status(task)
        if word is not None:
            states.append("waiting" if word in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING") else "running")
        elif status is None:
            states.append("killed" if job.log(task).is_file() else "not run")
        else:
            states.append(_state(status))
    return states


def _state(status: int) -> State:
    """Of a task that is over, by its exit status; negative: killed by that signal."""
    if status == EXIT_DONE:
        return "done"
    if status == EXIT_RESUMABLE:
        return "stopped"
    return "killed" if status < 0 else "failed"


def _active(queued: Sequence[Queued]) -> dict[str, str] | None:
    """Task id -> state of what SLURM still holds of a chain; None when its controller does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(job.job_id for job in queued)}"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        return {} if "Invalid job id" in asked.stderr else None
    pairs = (line.split() for line in asked.stdout.splitlines() if line.strip())
    return {task: word for task, word in pairs if word in ACTIVE}


def _count(states: Sequence[State]) -> str:
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{number} {state}" for state, number in sorted(Counter(states).items()))


def _outcome(queued: Sequence[Queued]) -> int:
    """The exit status of a chain that is over; says which link broke it."""
    for position, job in enumerate(queued):
        states = task_states(job, {})
        if set(states) == {"done"}:
            continue
        bad = [task for task, state in enumerate(states) if state in BAD]
        if not bad:
            say(f"{job.link.name}: never started; it was cancelled, or SLURM could not start it")
            return EXIT_FAILED
        task = min(bad, key=lambda index: BAD.index(states[index]))
        say(breakage(job.link, task, states[task], job.log(task), [later.link for later in queued[position + 1 :]]))
        return _worst([job.status(task) for task in bad])
    return EXIT_DONE


def breakage(link: Link, task: int, state: State, log: Path, later: Sequence[Link]) -> str:
    """What to say of a task that ended a chain: which, its last words, what was not run, what to do."""
    words = {
        "failed": "failed",
        "stopped": "was asked to stop (a time limit, or a person)",
        "killed": "was killed (out of memory, time or node?)",
    }
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    said = [line for line in lines if line.startswith("troodon: ")] or lines
    which = f"{link.name}: task {task} of {len(link.commands)}" if len(link.commands) > 1 else link.name
    rest = f"; not run: {', '.join(other.name for other in later)}" if later else ""
    last = f"\n  {said[-1][:200]}" if said else ""
    return f"{which} {words[state]}, see {log}{last}\n  launching the same again does what is missing{rest}"


def _worst(statuses: Sequence[int | None]) -> int:
    """1 and 2 are worse than 75; a task that left no status was killed."""
    return min((EXIT_FAILED if status is None else status for status in statuses if status != 0), default=EXIT_DONE)


def _sleep(seconds: float, stop: StopRequest) -> None:
    end = time.monotonic() + seconds
    while not stop and time.monotonic() < end:
        time.sleep(min(0.2, seconds))


@dataclass(frozen=True)
class Driver:
    """A chain on this machine: what one local job runs in the place of a command (see `launch.submit`)."""

    program: tuple[str, ...]  # what stands before a task's arguments, e.g. python -m tools.cli
    links: tuple[Link, ...]
    logs: str

    def __call__(self, _: Sequence[str]) -> int:
        """Run link after link; the exit status of the first that did not end well, else 0."""
        with stop_on_signals() as stop:
            for position, link in enumerate(self.links):
                start = time.monotonic()
                say(f"== {link.title}, logs {self.logs}/{link.name}-*.log")
                statuses = self._run(link, stop)
                bad = {task: status for task, status in statuses.items() if status}
                if stop:
                    say(f"{link.title}: stopped; what is done stays done, launching the same again goes on")
                    return EXIT_RESUMABLE
                if bad:
                    task = min(bad, key=lambda index: (bad[index] == EXIT_RESUMABLE, index))
                    say(breakage(link, task, _state(bad[task]), self.log(link, task), self.links[position + 1 :]))
                    return _worst([None if status < 0 else status for status in bad.values()])
                say(f"== {link.title} done in {clock(time.monotonic() - start)}")
        return EXIT_DONE

    def log(self, link: Link, task: int) -> Path:
        """Both streams of a task, of the newest attempt last."""
        return Path(self.logs) / f"{link.name}-{task}.log"

    def _run(self, link: Link, stop: StopRequest) -> dict[int, int]:
        """The exit status of every task of a link that was started; negative: killed by that signal."""
        waiting = list(range(len(link.commands)))[::-1]
        running: dict[int, subprocess.Popen[bytes]] = {}
        statuses: dict[int, int] = {}
        asked = False
        while running or (waiting and not stop):
            while waiting and not stop and len(running) < (link.at_once or len(link.commands)):
                task = waiting.pop()
                with self.log(link, task).open("ab") as log:
                    # A group of its own: a signal reaches a task once, from here.
                    running[task] = subprocess.Popen(
                        [*self.program, *link.commands[task]], stdout=log, stderr=log, start_new_session=True
                    )
            if stop and not asked:
                asked = True
                for process in running.values():
                    process.terminate()
            for task, process in list(running.items()):
                if process.poll() is not None:
                    statuses[task] = process.returncode
                    del running[task]
                    if len(link.commands) > 1:
                        say(f"{link.name}: {len(statuses)} of {len(link.commands)} tasks ended")
            time.sleep(0.05)
        return statuses
