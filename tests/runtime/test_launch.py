"""Jobs through submitit: real local ones always, real SLURM ones where a cluster answers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

from runtime.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USER, UserError
from runtime.launch import Resources, Submitted, follow, parameters, submit
from runtime.signals import StopRequest

ROOT = Path(__file__).parents[2]
STARTED: list[Submitted] = []


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Jobs import the rooms from here, installed or not, and get this file's functions by value."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)
    while STARTED:
        job = STARTED.pop()
        if not job.ended():  # a test failed before its end: leave no process behind
            subprocess.run(job.stop_command, shell=True, check=True)


def greet(arguments):
    import os

    print("hello", *arguments, os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
    return 0


def fail(arguments):
    return int(arguments[0])


def die(arguments):
    import os

    os.kill(os.getpid(), 9)


def wait_for_stop(arguments):
    import time

    from runtime.signals import stop_on_signals

    with stop_on_signals() as stop:
        print("ready", flush=True)
        while not stop:
            time.sleep(0.02)
    print("saved", flush=True)
    return 75


def add_ranks(arguments):
    import torch

    from runtime.world import open_world

    with open_world("cpu") as world:
        total = torch.tensor([world.rank + 1])
        torch.distributed.all_reduce(total)
        print(f"rank {world.rank} of {world.size}: {total.item()}", flush=True)
    return 0


def start(main, logs, *arguments, cluster="local", **resources) -> Submitted:
    job = submit(main, arguments, name="test", cluster=cluster, logs=logs, resources=Resources(**resources))
    STARTED.append(job)
    return job


def wait_for_text(path: Path, text: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < end, f"{text!r} never came in {path}"
        time.sleep(0.05)


def test_local_job_shows_its_log_and_exits_well(tmp_path, capsys):
    job = start(greet, tmp_path / "logs", "world", "x=1")
    assert follow(job, stop=StopRequest(), every=0.05) == 0
    assert "hello world x=1" in capsys.readouterr().out
    assert job.log("out").parent == tmp_path / "logs"


@pytest.mark.parametrize("visible", [None, "", "1,2"])
def test_local_job_sees_the_gpus_of_the_submitting_shell(tmp_path, monkeypatch, capsys, visible):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    follow(start(greet, tmp_path / "logs"), stop=StopRequest(), every=0.05)
    expected = "all" if visible is None else visible
    assert f"hello {expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize("status", [EXIT_FAILED, EXIT_USER])
def test_exit_status_comes_back(tmp_path, status):
    assert follow(start(fail, tmp_path / "logs", str(status)), stop=StopRequest(), every=0.05) == status


def test_killed_job_is_a_failure(tmp_path, capsys):
    assert follow(start(die, tmp_path / "logs"), stop=StopRequest(), every=0.05) == EXIT_FAILED
    assert "was killed before it ended" in capsys.readouterr().err


def test_the_printed_stop_command_asks_the_verb_to_save(tmp_path):
    job = start(wait_for_stop, tmp_path / "logs")
    wait_for_text(job.log("out"), "ready")
    assert f"stop  {job.stop_command} " in job.describe()
    subprocess.run(job.stop_command, shell=True, check=True)
    assert follow(job, stop=StopRequest(), every=0.05) == EXIT_RESUMABLE
    assert "saved" in job.log("out").read_text()


def test_ctrl_c_in_the_terminal_ends_the_following_and_not_the_job(tmp_path):
    """A process group of its own stands for the terminal: Ctrl-C there signals the whole group."""
    script = (
        "import sys, tests_launch_main; from pathlib import Path\n"
        "from runtime.launch import Resources, follow, submit; from runtime.signals import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        "    job = submit(tests_launch_main.wait_for_stop, (), name='t', cluster='local', logs=Path(sys.argv[1]),\n"
        "                 resources=Resources())\n"
        "    print(job.job_id, flush=True)\n"
        "    status = follow(job, stop=stop, every=0.05)\n"
        "    print('status', status, flush=True)\n"
    )
    (tmp_path / "tests_launch_main.py").write_text(Path(__file__).read_text())
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    logs = tmp_path / "logs"
    terminal = subprocess.Popen(
        [sys.executable, "-c", script, str(logs)],
        env=env, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    assert terminal.stdout is not None
    job_id = terminal.stdout.readline().strip()
    wait_for_text(logs / f"{job_id}_0_log.out", "ready")
    os.killpg(terminal.pid, signal.SIGINT)
    rest, _ = terminal.communicate(timeout=30)
    assert "status None" in rest
    time.sleep(1.5)  # submitit's controller would kill its tasks a second after SIGINT
    assert "saved" not in (logs / f"{job_id}_0_log.out").read_text()
    os.kill(int(job_id), 0)
    os.kill(int(job_id), signal.SIGTERM)
    wait_for_text(logs / f"{job_id}_0_log.out", "saved")


@pytest.mark.slow
def test_local_job_of_two_processes_is_one_group(tmp_path):
    job = start(add_ranks, tmp_path / "logs", processes=2)
    assert follow(job, stop=StopRequest(), every=0.1) == 0
    said = "".join((tmp_path / "logs" / f"{job.job_id}_{rank}_log.out").read_text() for rank in (0, 1))
    assert "rank 0 of 2: 3" in said
    assert "rank 1 of 2: 3" in said


def test_slurm_without_slurm_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        start(greet, tmp_path / "logs", cluster="slurm")
    assert not (tmp_path / "logs").exists()


def test_slurm_parameters():
    asked = Resources(
        hours=2.5, processes=4, cpus=12, gpus=4, memory=64.0, partition="gpu", extra=("qos=low", "--exclude=n1")
    )
    told = parameters("troodon-pretrain", "slurm", asked)
    assert told["timeout_min"] == 150
    assert told["tasks_per_node"] == 4
    assert told["gpus_per_node"] == 4
    assert told["slurm_additional_parameters"] == {"qos": "low", "exclude": "n1"}
    with pytest.raises(UserError, match="KEY=VALUE"):
        parameters("x", "slurm", Resources(extra=("exclusive",)))


def slurm_answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=3, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


slurm = pytest.mark.skipif(not slurm_answers(), reason="no SLURM cluster answers here (sinfo)")


@slurm
@pytest.mark.slow
def test_slurm_job_comes_back_and_can_be_stopped(tmp_path):
    job = start(greet, tmp_path / "logs", "cluster", cluster="slurm", hours=0.1)
    assert follow(job, stop=StopRequest()) == 0
    assert "hello cluster" in job.log("out").read_text()
    job = start(wait_for_stop, tmp_path / "logs", cluster="slurm", hours=0.1)
    wait_for_text(job.log("out"), "ready", seconds=60)
    assert f"stop  {job.stop_command} " in job.describe()
    subprocess.run(job.stop_command, shell=True, check=True)
    assert follow(job, stop=StopRequest()) == EXIT_RESUMABLE


@slurm
@pytest.mark.slow
def test_slurm_requeue_starts_the_same_command_again(tmp_path):
    job = start(wait_for_stop, tmp_path / "logs", cluster="slurm", hours=0.1)
    wait_for_text(job.log("out"), "ready", seconds=60)
    subprocess.run(["scontrol", "requeue", job.job_id], check=True)
    end = time.monotonic() + 180
    while job.log("out").read_text().count("ready") < 2:
        assert time.monotonic() < end, "the job did not start again"
        time.sleep(1)
        # SLURM keeps a requeued job waiting for two minutes; once it waits, this ends the wait.
        subprocess.run(["scontrol", "update", f"JobId={job.job_id}", "StartTime=now"], capture_output=True, check=False)
    assert not job.ended()
    subprocess.run(["scancel", "--signal=TERM", job.job_id], check=True)
    assert follow(job, stop=StopRequest()) == EXIT_RESUMABLE


@slurm
@pytest.mark.slow
def test_slurm_job_of_two_processes_is_one_group(tmp_path):
    job = start(add_ranks, tmp_path / "logs", cluster="slurm", processes=2, hours=0.1)
    assert follow(job, stop=StopRequest()) == 0
    said = "".join((tmp_path / "logs" / f"{job.job_id}_{rank}_log.out").read_text() for rank in (0, 1))
    assert "rank 0 of 2: 3" in said
    assert "rank 1 of 2: 3" in said


@slurm
def test_slurm_refusal_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="refused the job"):
        start(greet, tmp_path / "logs", cluster="slurm", partition="no-such-partition")
    assert not (tmp_path / "logs").exists()
