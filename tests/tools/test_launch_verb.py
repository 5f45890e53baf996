"""`troodon launch` with real local jobs: the job runs the same command, and a wrong config never becomes a job."""

import os
from pathlib import Path

import pytest

from runtime.errors import EXIT_USER
from runtime.files import read_json
from tools.cli import main

ROOT = Path(__file__).parents[2]
TINY = ["data.shards=[embedded:pool]", "device=cpu", "workers=0", "model.arch=vit_pico", "crops.global_size=32",
        "crops.local_size=16", "crops.num_local=2", "heads.num_prototypes=32", "train.steps=3",
        "train.batch_size=4"]  # fmt: skip


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))


@pytest.mark.slow
def test_a_local_job_trains_and_a_second_one_finds_it_done(tmp_path, capfd):
    out = tmp_path / "run"
    command = ["launch", "tiny", "--verb", "pretrain", "--cluster", "local", "--wait", *TINY, f"out={out}"]
    assert main(command) == 0
    said = capfd.readouterr()
    job = said.out.splitlines()[0]
    assert (tmp_path / "run.jobs" / f"{job}_0_exit").read_text() == "0\n"
    assert "step 3 steps in" in said.err
    assert read_json(out / "status.json")["status"] == "done"
    card = out / "exports" / "step-00000003" / "card.json"
    written = card.stat().st_mtime_ns
    assert main(command) == 0
    assert card.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_job_whose_input_is_wrong_ends_as_its_verb_ends(tmp_path, capfd):
    command = ["launch", "tiny", "--verb", "pretrain", "--cluster", "local", "--wait", f"out={tmp_path / 'run'}"]
    assert main([*command, f"data.shards=[{tmp_path / 'absent'}]"]) == EXIT_USER
    assert "no such file or folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["train.stesp=3"], "did you mean train.steps?"),
        (["--processes", "0"], "above zero"),
        (["--verb", "run", "--processes", "2"], "unknown key"),
        (["--cluster", "slurm"], "sbatch is not on PATH"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(tmp_path, monkeypatch, capsys, asked, said):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    command = ["launch", "tiny", "--verb", "pretrain", "--cluster", "local", f"out={tmp_path / 'run'}"]
    assert main([*command, *asked]) == EXIT_USER
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run.jobs").exists()
    assert not (tmp_path / "run").exists()
