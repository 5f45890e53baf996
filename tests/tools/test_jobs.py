"""Which jobs a curation becomes."""

from dataclasses import replace

import pytest

from curation.run import PARALLEL, STAGES
from runtime.errors import EXIT_USER
from runtime.launch import Resources
from tools import jobs
from tools.cli import main
from tools.pipeline import CurateRunConfig

COMMAND = ("curate", "default", "out=x")


@pytest.fixture
def chain(monkeypatch):
    """The chain of a config of which these stages are left."""

    def of(*left: str, config: CurateRunConfig | None = None, tasks: int = 3, gpus: int | None = None):
        monkeypatch.setattr(jobs, "unfinished", lambda _: left)
        return jobs.curation_chain(
            config or CurateRunConfig(), COMMAND, tasks=tasks, at_once=2, resources=Resources(gpus=gpus, cpus=4)
        )

    return of


def stages_of(link) -> str:
    words = link.commands[0]
    return words[words.index("--stages") + 1]


def test_arrays_and_single_jobs_take_turns(chain):
    links = chain(*STAGES)
    assert [(link.name, stages_of(link), len(link.commands)) for link in links] == [
        ("items", "items", 1),
        ("decode", "decode", 3),
        ("after-decode", "decode,exact", 1),
        ("embed", "embed", 3),
        ("after-embed", "embed,index", 1),
        ("join", "join", 3),
        ("after-join", "join", 1),
        ("verify", "verify", 3),
        ("after-verify", "verify,dedup,guard,retrieve", 1),
        ("shards", "shards", 3),
        ("after-shards", "shards", 1),
    ]
    assert links[1].commands[2] == (*COMMAND, "--stages", "decode", "--share", "2/3")
    assert {link.at_once for link in links if link.name in PARALLEL} == {2}


def test_every_stage_is_concluded_by_a_job_without_share_and_after_its_array(chain):
    done: list[str] = []
    for link in chain(*STAGES):
        for command in link.commands:
            assert ("--share" in command) == (link.name in PARALLEL)
        if link.name not in PARALLEL:
            done += stages_of(link).split(",")
    assert done == list(STAGES)


def test_a_second_launch_goes_on_where_the_first_ended(chain):
    assert [link.name for link in chain("dedup", "guard", "retrieve", "shards")] == ["dedup", "shards", "after-shards"]
    links = chain("verify", "dedup", "shards")
    assert [(link.name, stages_of(link)) for link in links[:2]] == [("after-join", "join"), ("verify", "verify")]
    assert chain() == ()


def test_gpus_go_to_the_jobs_that_use_the_device(chain):
    links = chain(*STAGES, gpus=1)
    without = [link.name for link in links if link.resources.gpus is None]
    assert without == ["items", "decode", "shards", "after-shards"]
    assert {link.resources.cpus for link in links} == {4}
    on_cpu = chain(*STAGES, gpus=1, config=replace(CurateRunConfig(), device="cpu"))
    assert {link.resources.gpus for link in on_cpu} == {None}


def test_a_dry_run_shows_the_chain_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["launch", "default", "--verb", "curate", "--cluster", "slurm", "--tasks", "4", "--at-once", "2",
               "--partition", "big", "source.paths=[embedded:pool]", f"out={out}", "--dry-run"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert (
        f"# decode x4: troodon curate default source.paths=[embedded:pool] out={out} --stages decode --share 0/4"
        in said
    )
    assert "array_parallelism=2" in said
    assert "dependency=afterok:decode x4 kill-on-invalid-dep=yes" in said
    assert "partition=big" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--verb", "run", "--tasks", "2"], "--tasks: goes with --verb curate"),
        (["--verb", "curate", "--tasks", "0"], "above zero"),
        (["--verb", "curate", "--tasks", "2", "--at-once", "0"], "above zero"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path, capsys, asked, said):
    config = "quickstart" if "run" in asked else "default"
    assert main(["launch", config, "--cluster", "local", *asked, f"out={tmp_path / 'out'}"]) == EXIT_USER
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
