"""One command as a job of this machine or of a SLURM cluster, through submitit, on one node.

The job calls the command line's own `main`, which puts its signal handlers over submitit's. submitit would ignore
SIGTERM and take every job of ten minutes or less for timed out; ours ask the verb to stop and save. What is done stays
done, so launching the same command again goes on, and so does a job that SLURM requeues.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import EXIT_DONE, EXIT_FAILED, UserError
from .files import write_text
from .progress import say
from .signals import StopRequest

Cluster = Literal["local", "slurm"]
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SIGNALING")
WARNING = 120  # seconds between the request to stop and the kill at a SLURM job's time limit


@dataclass(frozen=True)
class Resources:
    """What to ask the cluster for; `local` heeds `hours` and `processes` only."""

    hours: float = 24.0  # time limit; the job is asked to stop shortly before
    processes: int = 1  # of one torch.distributed group, all on one node
    cpus: int | None = None  # cores of each process
    gpus: int | None = None  # of the node
    memory: float | None = None  # GB of the node
    partition: str | None = None
    extra: tuple[str, ...] = ()  # further sbatch options, key=value


@dataclass(frozen=True)
class Work:
    """What runs inside the job: `main(arguments)`, once per process; its exit status becomes the process's."""

    main: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]
    logs: str
    cuda: str | None  # CUDA_VISIBLE_DEVICES of the submitting shell; submitit's local executor hides every GPU

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        if job.cluster == "local":
            os.setsid()  # else Ctrl-C in the terminal that follows the job would reach it
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if self.cuda is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.cuda
        if job.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # one node; its SLURM name need not resolve
        left = exit_file(Path(self.logs), job.job_id, job.global_rank)
        left.unlink(missing_ok=True)  # of the attempt before a requeue
        status = self.main(self.arguments)
        write_text(left, f"{status}\n")
        if status != EXIT_DONE:
            raise SystemExit(status)


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over."""

    cluster: Cluster
    job_id: str
    logs: Path
    processes: int
    handle: Any  # submitit's job

    def describe(self) -> str:
        """Where to look, how to stop."""
        look = f"ps -p {self.job_id}" if self.cluster == "local" else f"squeue -j {self.job_id}"
        return (
            f"job {self.job_id} ({self.cluster})\n"
            f"  logs  tail -f {shlex.quote(str(self.log('err')))}\n"
            f"  look  {look}\n"
            f"  stop  {self.stop_command}   (saves; launching the same again goes on)"
        )

    @property
    def stop_command(self) -> str:
        """What asks the job to save and end. Plain scancel kills it half a minute later, saved or not."""
        return f"kill {self.job_id}" if self.cluster == "local" else f"scancel --signal=TERM {self.job_id}"

    def log(self, kind: Literal["out", "err"]) -> Path:
        return self.logs / f"{self.job_id}_0_log.{kind}"

    def ended(self) -> bool:
        """Whether the job is over, well or badly. A SLURM controller that does not answer leaves it running."""
        if self.cluster == "local":
            return self.handle.done()
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={self.job_id}"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode:
            return "Invalid job id" in asked.stderr
        return not any(state in ACTIVE for state in asked.stdout.split())

    def exit_status(self) -> int | None:
        """The worst status of the job's processes; None when one of them left none (killed)."""
        statuses = []
        for rank in range(self.processes):
            path = exit_file(self.logs, self.job_id, rank)
            if not path.is_file():
                return None
            statuses.append(int(path.read_text()))
        return min((status for status in statuses if status), default=EXIT_DONE)  # 1 and 2 are worse than 75


def submit(
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[str],
    *,
    name: str,
    cluster: Cluster,
    logs: Path,
    resources: Resources,
) -> Submitted:
    """Hand `main(arguments)` over as a job that logs into `logs`. Raises UserError when the cluster refuses it."""
    require(cluster)
    import submitit
    from submitit.core.utils import UncompletedJobError

    fresh = not logs.exists()
    logs = logs.absolute()
    executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    executor.update_parameters(**parameters(name, cluster, resources))
    work = Work(main, tuple(arguments), str(logs), os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        with _like_nohup() if cluster == "local" else nullcontext():
            handle = executor.submit(work)
    except UncompletedJobError as error:
        if fresh:
            shutil.rmtree(logs, ignore_errors=True)
        raise UserError(f"launch: {cluster} refused the job: {str(error).strip().splitlines()[-1]}") from error
    return Submitted(cluster, handle.job_id, logs, resources.processes, handle)


def require(cluster: Cluster) -> None:
    """Raise UserError when `cluster` cannot be reached from this machine."""
    missing = [tool for tool in ("sbatch", "srun", "squeue") if cluster == "slurm" and shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"cluster: slurm was asked for and {missing[0]} is not on PATH here\n"
            f"  run this on a login node of the cluster, or use --cluster local"
        )


def parameters(name: str, cluster: Cluster, resources: Resources) -> dict[str, Any]:
    """What submitit is told. Raises UserError on an extra option without `=`."""
    shared = {
        "name": name,
        "timeout_min": max(1, round(resources.hours * 60)),
        "nodes": 1,
        "tasks_per_node": resources.processes,
    }
    if cluster == "local":
        return shared
    extra = {}
    for option in resources.extra:
        key, equals, value = option.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"--slurm {option}: expected KEY=VALUE as sbatch has it, for example qos=low")
        extra[key] = value
    return {
        **shared,
        "cpus_per_task": resources.cpus,
        "gpus_per_node": resources.gpus,
        "mem_gb": resources.memory,
        "slurm_partition": resources.partition,
        "slurm_signal_delay_s": WARNING,
        "slurm_additional_parameters": extra,
        # When one process is gone the others of its group wait for it; srun ends them.
        "slurm_srun_args": [f"--wait={WARNING}"],
    }


def follow(job: Submitted, *, stop: StopRequest, every: float = 0.5) -> int | None:
    """Copy the logs of the first process here until the job is over; returns the job's exit status.

    `every`: seconds between looks. A stop ends the following, not the job: then the result is None.
    """
    streams = [(_tail(job.log("out")), sys.stdout), (_tail(job.log("err")), sys.stderr)]
    over = False
    while not over:
        if stop:
            return None
        over = job.ended()  # asked before reading: what was written before the end is read after it
        for lines, stream in streams:
            stream.write(next(lines))
            stream.flush()
        if not over:
            time.sleep(every if job.cluster == "local" else max(every, 2.0))
    status = job.exit_status()
    if status is None:
        say(f"job {job.job_id} was killed before it ended: out of memory, time or node? see {job.logs}")
        return EXIT_FAILED
    return status


def _tail(path: Path) -> Iterator[str]:
    """What was appended to a file since the last look, '' for nothing."""
    while not path.is_file():
        yield ""
    with path.open() as file:
        while True:
            yield file.read()


def exit_file(logs: Path, job_id: str, rank: int) -> Path:
    """Where a process of a job leaves its exit status."""
    return logs / f"{job_id}_{rank}_exit"


@contextmanager
def _like_nohup() -> Iterator[None]:
    """Processes started within outlive this terminal: SIGINT and SIGHUP ignored, nothing read, nothing written.

    Ctrl-C would else reach submitit's controller, which kills the job a second later, and `$(troodon launch ...)`
    would wait for the controller to close its end of the pipe.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    kept = [os.dup(number) for number in (0, 1, 2)]
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
        for opened in (*kept, nothing):
            os.close(opened)
        for number, handler in handlers.items():
            signal.signal(number, handler)
