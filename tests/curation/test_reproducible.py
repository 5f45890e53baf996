"""The same images, config and seed give the same manifest and the same shards, byte for byte, however they are made."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from curation import items
from curation.config import CurateConfig
from curation.run import PARALLEL, STAGES, curate
from curation.stage import Share
from runtime.config import to_yaml
from tools.cli import main

ROOT = Path(__file__).parents[2]
DYING = """
import os, signal
from runtime.config import load
from curation.config import CurateConfig
from curation.run import curate

left, before = {renames}, {before}
rename = os.replace


def die_after_some(source, target):
    global left
    left -= 1
    if left == 0 and before:
        os.killpg(0, signal.SIGKILL)
    rename(source, target)
    if left == 0:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os.replace = die_after_some
    curate(load(CurateConfig, {config!r}))
"""


def result_of(out: Path) -> dict[str, bytes]:
    """Every byte of a result that must not vary: the manifest, the shards with their indexes, and the hash."""
    files = [out / "manifest.parquet", *sorted((out / "shards").glob("*"))]
    summary = json.loads((out / "summary.json").read_text())
    return {path.name: path.read_bytes() for path in files} | {"hash": summary["manifest_sha256"].encode()}


@pytest.fixture(scope="module")
def several(config, pack) -> CurateConfig:
    """Several sources, parts and shards."""
    return replace(
        config,
        source=replace(config.source, paths=(f"{pack}/pool/a.tar", f"{pack}/pool/loose"), part_size=16),
        shards=replace(config.shards, max_samples=5),
    )


@pytest.fixture(scope="module")
def expected(several, tmp_path_factory) -> dict[str, bytes]:
    """The result of one run in one process."""
    result = result_of(curate(replace(several, out=str(tmp_path_factory.mktemp("reference") / "out"))))
    assert sum(name.endswith(".tar") for name in result) >= 3
    return result


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(several, expected, tmp_path, workers):
    assert result_of(curate(replace(several, out=str(tmp_path / "out"), workers=workers))) == expected


def test_sources_given_and_folders_listed_in_another_order(several, expected, tmp_path, monkeypatch):
    walk = os.walk

    def walk_backwards(place):
        for parent, folders, names in walk(place):
            folders.reverse()
            yield parent, folders, names[::-1]

    monkeypatch.setattr(items.os, "walk", walk_backwards)
    reordered = replace(several.source, paths=several.source.paths[::-1])
    assert result_of(curate(replace(several, out=str(tmp_path / "out"), source=reordered))) == expected


def test_units_shared_out_between_tasks(several, expected, tmp_path):
    """As an array of jobs does it: each stage by two tasks, then concluded; the second task first."""
    shared = replace(several, out=str(tmp_path / "out"))
    for name in STAGES:
        if name in PARALLEL:
            for index in (1, 0):
                curate(shared, stages=[name], share=Share(index, 2))
        curate(shared, stages=[name])
    assert result_of(tmp_path / "out") == expected


def test_a_task_that_never_ran_is_made_up_for(several, expected, tmp_path):
    shared = replace(several, out=str(tmp_path / "out"))
    curate(shared, stages=["items"])
    curate(shared, stages=["decode"], share=Share(1, 3))
    decoded = tmp_path / "out" / "stages" / "decode"
    done = {part: part.stat().st_mtime_ns for part in decoded.glob("part-*.parquet")}
    assert done
    assert not (decoded / "done.json").exists()
    assert result_of(curate(shared)) == expected
    assert {part: part.stat().st_mtime_ns for part in done} == done


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_killed_again_and_again(several, expected, tmp_path, before):
    """kill -9 at every fifteenth file that a run completes: just after its renaming, or just before it."""
    config = replace(several, out=str(tmp_path / "out"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    program = DYING.format(renames=15, before=before, config=str(tmp_path / "config.yaml"))
    kills = 0
    while subprocess.run([sys.executable, "-c", program], cwd=ROOT, start_new_session=True, check=False).returncode:
        kills += 1
        assert kills < 30
    assert kills >= 2
    assert result_of(tmp_path / "out") == expected
    assert not list((tmp_path / "out").rglob(".*.tmp"))


def launch(config: CurateConfig, folder: Path, cluster: str, *options: str) -> int:
    """`troodon launch --tasks 2 --wait` of a config with its output in `folder`."""
    (folder / "my.yaml").write_text(to_yaml(replace(config, out=str(folder / "out"))))
    command = ["launch", str(folder / "my.yaml"), "--verb", "curate", "--cluster", cluster, "--tasks", "2", "--wait"]
    return main([*command, *options])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_chain_of_jobs_on_this_machine(several, expected, tmp_path, monkeypatch, capfd):
    """It goes on where another run stood, its tasks run side by side, and a second launch finds nothing to do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    curate(replace(several, out=str(tmp_path / "out")), stages=STAGES[: STAGES.index("verify")])
    assert launch(several, tmp_path, "local") == 0
    assert result_of(tmp_path / "out") == expected
    assert "== verify x2 done in" in capfd.readouterr().err
    assert launch(several, tmp_path, "local") == 0
    assert "finished already" in capfd.readouterr().err


def slurm_answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        return subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=3, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not slurm_answers(), reason="no SLURM cluster answers here (sinfo)")
def test_a_chain_of_jobs_on_a_cluster(several, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert launch(several, tmp_path, "slurm", "--cpus", "1", "--hours", "0.2") == 0
    assert result_of(tmp_path / "out") == expected
    assert "verify x2" in capfd.readouterr().err
