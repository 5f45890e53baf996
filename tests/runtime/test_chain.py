"""Chains of jobs: what SLURM is told (a fake one), what is said of it, and real chains on this machine."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.chain import Driver, Link, Queued, describe, follow_chain, submit_chain, task_states
from runtime.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USER, UserError
from runtime.launch import Resources
from runtime.signals import StopRequest

ROOT = Path(__file__).parents[2]
# A program whose first argument says what it does; the others are files that it writes.
PROGRAM = (
    sys.executable,
    "-c",
    "import sys, time, pathlib, os, signal\n"
    "what, *files = sys.argv[1:]\n"
    "if what == 'wait': signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    "for file in files: pathlib.Path(file).write_text(str(time.monotonic()))\n"
    "if what == 'wait': time.sleep(60)\n"
    "if what == 'die': os.kill(os.getpid(), 9)\n"
    "if what.isdigit(): print('troodon: on purpose', file=sys.stderr); sys.exit(int(what))\n"
    "time.sleep(0.2)\n",
)


def link(name: str, *commands: tuple[str, ...], at_once: int | None = None, **resources) -> Link:
    return Link(name, commands, Resources(**resources), at_once)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder in which a fake sbatch leaves its scripts as 101, 102, ...; `queue` is what its squeue answers."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "queue").touch()
    programs = {
        "sbatch": 'n=$((101 + $(ls {f} | grep -c "^1"))); test -e {f}/refuse-$n && {{ echo no such partition >&2; '
        'exit 1; }}; cp "$1" {f}/$n; echo Submitted batch job $n',
        "squeue": "cat {f}/queue",
        "srun": "true",
        "scancel": 'echo "$@" > {f}/cancelled',
    }
    for name, text in programs.items():
        (folder / name).write_text("#!/bin/sh\n" + text.format(f=folder) + "\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def told(slurm: Path, job: int) -> dict[str, str]:
    """The sbatch options of a submitted job."""
    return dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", (slurm / str(job)).read_text()))


def nothing(_) -> int:
    return 0


def chain(tmp_path) -> tuple[Queued, ...]:
    links = [
        link("items", ("items",), cpus=2),
        link("decode", ("a",), ("b",), ("c",), at_once=2, cpus=4, extra=("qos=low", "dependency=after:7")),
        link("exact", ("exact",), gpus=1),
    ]
    return submit_chain(nothing, links, name="curate", logs=tmp_path / "logs")


def test_each_job_waits_for_the_one_before(slurm, tmp_path):
    queued = chain(tmp_path)
    assert [job.job_id for job in queued] == ["101", "102", "103"]
    first, array, last = (told(slurm, job) for job in (101, 102, 103))
    assert "dependency" not in first
    assert "array" not in first
    assert array["dependency"] == "afterok:101"
    assert array["kill-on-invalid-dep"] == last["kill-on-invalid-dep"] == "yes"
    assert array["array"] == "0-2%2"
    assert array["job-name"] == "curate-decode"
    assert array["qos"] == "low"
    assert array["cpus-per-task"] == "4"
    assert last["dependency"] == "afterok:102"
    assert last["gpus-per-node"] == "1"
    assert all("requeue" in options for options in (first, array, last))
    said = describe(queued)
    assert "items (101) -> decode x3 (102) -> exact (103)" in said
    assert "scancel 101 102 103" in said
    for task in range(3):
        assert (tmp_path / "logs" / f"102_{task}_submitted.pkl").is_file()


def test_a_refused_job_takes_the_others_back(slurm, tmp_path):
    (slurm / "refuse-103").touch()
    with pytest.raises(UserError, match=r"refused the job of exact: .*no such partition"):
        chain(tmp_path)
    assert (slurm / "cancelled").read_text().split() == ["101", "102"]


def test_without_slurm_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        chain(tmp_path)
    assert not (tmp_path / "logs").exists()


def leave(queued: Queued, task: int, status: int | None, said: str = "") -> None:
    """What a task that ran leaves behind."""
    queued.log(task).write_text(said)
    if status is not None:
        (queued.logs / f"{queued.task_id(task)}_0_exit").write_text(f"{status}\n")


def test_the_state_of_every_task(slurm, tmp_path):
    _, array, last = chain(tmp_path)
    leave(array, 0, 0)
    assert task_states(array, {"102_1": "RUNNING", "102_2": "PENDING"}) == ["done", "running", "waiting"]
    leave(array, 1, 75)
    leave(array, 2, None)
    assert task_states(array, {}) == ["done", "stopped", "killed"]
    assert task_states(array, {"102_1": "PENDING"})[1] == "waiting"  # preempted: it will start again
    leave(array, 2, 2)
    assert task_states(array, {})[2] == "failed"
    assert task_states(last, {}) == ["not run"]


def test_following_shows_each_link_and_ends_as_the_chain_ends(slurm, tmp_path, capsys):
    queued = chain(tmp_path)

    def cluster() -> None:
        waiting = [f"102_{task} PENDING" for task in range(3)] + ["103 PENDING"]
        show("101 RUNNING", *waiting)
        leave(queued[0], 0, 0)
        show("102_0 RUNNING", "102_1 RUNNING", *waiting[2:])
        for task in range(3):
            leave(queued[1], task, 0)
        leave(queued[2], 0, 0)
        show()

    def show(*lines: str) -> None:
        (slurm / "next").write_text("".join(f"{line}\n" for line in lines))
        (slurm / "next").replace(slurm / "queue")
        time.sleep(0.4)

    (slurm / "queue").write_text("101 PENDING\n")
    thread = threading.Thread(target=cluster)
    thread.start()
    assert follow_chain(queued, stop=StopRequest(), every=0.05) == 0
    thread.join()
    said = capsys.readouterr().err
    assert "items (101): running\n" in said
    assert "decode x3 (102): 2 running, 1 waiting\n" in said
    assert "decode x3 (102): 3 done\n" in said
    assert "not run" not in said
    assert said.endswith("exact (103): done\n")


@pytest.mark.parametrize(
    ("status", "ended", "word"),
    [(1, EXIT_FAILED, "failed"), (2, EXIT_USER, "failed"), (75, EXIT_RESUMABLE, "asked to stop"),
     (None, EXIT_FAILED, "was killed")],
)  # fmt: skip
def test_the_task_that_broke_a_chain_is_named(slurm, tmp_path, capsys, status, ended, word):
    queued = chain(tmp_path)
    leave(queued[0], 0, 0)
    for task in (0, 2):
        leave(queued[1], task, 0)
    leave(queued[1], 1, status, "much\ntroodon: source: the disk is gone\nTraceback ...\n")
    assert follow_chain(queued, stop=StopRequest(), every=0.05) == ended
    said = capsys.readouterr().err
    assert f"decode: task 1 of 3 {word}" in said or f"decode: task 1 of 3 was {word}" in said
    assert "102_1_0_log.err" in said
    assert "troodon: source: the disk is gone" in said
    assert "not run: exact" in said


def test_a_stop_ends_the_following_and_not_the_chain(slurm, tmp_path):
    queued = chain(tmp_path)
    (slurm / "queue").write_text("101 RUNNING\n")
    stop = StopRequest()
    stop.signal = signal.SIGINT
    assert follow_chain(queued, stop=stop, every=0.05) is None


def test_a_local_chain_runs_link_after_link(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("a", "b0", "b1", "c")}
    links = (
        link("a", ("go", str(files["a"]))),
        link("b", ("go", str(files["b0"])), ("go", str(files["b1"]))),
        link("c", ("go", str(files["c"]))),
    )
    assert Driver(PROGRAM, links, str(tmp_path))(()) == 0
    at = {name: float(path.read_text()) for name, path in files.items()}
    assert at["a"] + 0.15 < min(at["b0"], at["b1"])
    assert max(at["b0"], at["b1"]) + 0.15 < at["c"]
    assert "== b x2 done in" in capsys.readouterr().err


def test_a_local_chain_starts_no_more_than_it_may(tmp_path):
    files = [tmp_path / str(index) for index in range(3)]
    one = link("b", *(("go", str(file)) for file in files), at_once=1)
    assert Driver(PROGRAM, (one,), str(tmp_path))(()) == 0
    at = sorted(float(file.read_text()) for file in files)
    assert at[1] - at[0] > 0.15
    assert at[2] - at[1] > 0.15


@pytest.mark.parametrize(("what", "ended", "word"), [("1", 1, "failed"), ("2", 2, "failed"), ("die", 1, "was killed")])
def test_a_local_chain_ends_where_a_task_fails(tmp_path, capsys, what, ended, word):
    links = (
        link("b", ("go",), (what,), ("go", str(tmp_path / "other"))),
        link("c", ("go", str(tmp_path / "never"))),
    )
    assert Driver(PROGRAM, links, str(tmp_path))(()) == ended
    said = capsys.readouterr().err
    assert f"b: task 1 of 3 {word}" in said
    assert "not run: c" in said
    assert "on purpose" in said or what == "die"
    assert (tmp_path / "other").is_file()
    assert not (tmp_path / "never").exists()


def test_a_local_chain_asked_to_stop_asks_its_tasks(tmp_path):
    ready = [tmp_path / "0", tmp_path / "1"]
    script = (
        "import sys; from runtime.chain import Driver, Link; from runtime.launch import Resources\n"
        f"links = (Link('b', (('wait', {str(ready[0])!r}), ('wait', {str(ready[1])!r})), Resources()),\n"
        f"         Link('c', (('go', {str(tmp_path / 'never')!r}),), Resources()))\n"
        f"sys.exit(Driver({PROGRAM!r}, links, {str(tmp_path)!r})(()))\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    end = time.monotonic() + 20
    while not all(file.is_file() for file in ready):
        assert time.monotonic() < end
        time.sleep(0.02)
    driver.terminate()
    assert driver.wait(20) == EXIT_RESUMABLE
    assert not (tmp_path / "never").exists()
