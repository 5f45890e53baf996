"""The plan of a curation: true counts, upper bounds, rates that were measured, and nothing written."""

from dataclasses import replace

import pyarrow as pa
import pytest

from curation.config import EmbedConfig, GuardConfig, SeedsConfig, SourceConfig
from curation.items import list_items
from curation.plan import Measured, plan, plan_stages
from curation.run import STAGES, curate
from runtime.errors import UserError
from runtime.files import read_json

RATES = Measured(
    listing=1.0,
    decode=100.0,
    pixels=200.0,
    embed=50.0,
    dims={"copy": 64, "retrieval": 32},
    weights=1_000_000,
    sizes=(64,),
    verify=10.0,
    copy=1e6,
    base=500_000_000,
)


@pytest.fixture
def fresh(config, tmp_path):
    return replace(config, out=str(tmp_path / "out"), workers=0)


@pytest.fixture
def table(fresh) -> pa.Table:
    return list_items(fresh)[0]


def test_every_stage_that_has_work_is_planned_and_nothing_written(fresh, tmp_path):
    stages = plan(fresh)
    assert [stage.stage for stage in stages] == list(STAGES)
    assert all(stage.memory > 0 and stage.units > 0 for stage in stages)
    assert not list(tmp_path.iterdir())
    bare = replace(fresh, seeds=SeedsConfig(), guard=GuardConfig(), dedup=replace(fresh.dedup, verify=False))
    assert [stage.stage for stage in plan(bare)] == [s for s in STAGES if s not in ("verify", "guard", "retrieve")]


def test_counts_are_those_of_the_sources(fresh, table):
    stages = {stage.stage: stage for stage in plan_stages(fresh, table, RATES)}
    roles = table["role"].to_pylist()
    assert stages["decode"].count == len(roles)
    assert stages["decode"].units == -(-len(roles) // fresh.source.part_size)
    assert stages["exact"].count == stages["shards"].count == roles.count("pool")
    assert stages["guard"].count == roles.count("guard")
    assert stages["verify"].what == "pairs"


def test_time_follows_from_the_rates_and_the_workers(fresh, table, monkeypatch):
    monkeypatch.setattr("curation.plan.cores", lambda: 2)
    one, four = ({s.stage: s for s in plan_stages(replace(fresh, workers=workers), table, RATES)} for workers in (1, 4))
    assert one["decode"].seconds == pytest.approx(len(table) / 100)
    assert four["decode"].seconds == pytest.approx(len(table) / 200)
    assert one["embed"].seconds == four["embed"].seconds == pytest.approx(len(table) / 50)  # the models are slower
    assert one["verify"].seconds == pytest.approx(one["verify"].count / 10)
    assert four["decode"].memory - one["decode"].memory > 3 * 20 * fresh.decode.max_pixels


def test_memory_and_disk_grow_with_the_images(fresh, table):
    small, large = (
        {s.stage: s for s in plan_stages(fresh, rows, RATES)} for rows in (table, pa.concat_tables([table] * 10))
    )
    for name in STAGES:
        assert large[name].memory > small[name].memory
    assert large["embed"].disk == 10 * small["embed"].disk
    assert large["shards"].disk == pytest.approx(10 * small["shards"].disk, rel=0.01)


@pytest.mark.slow
def test_the_bounds_hold_for_a_real_run(fresh):
    """Disk and counts are upper bounds, and an earlier run tells the seconds of what cannot be measured."""
    planned = {stage.stage: stage for stage in plan(fresh)}
    out = curate(fresh)
    report = read_json(out / "stages" / "join" / "done.json")["counts"]
    for name in ("decode", "embed"):
        written = sum(path.stat().st_size for path in (out / "stages" / name).glob("part-*"))
        assert written < planned[name].disk + 20_000 * planned[name].units  # headers of the files
    again = {stage.stage: stage for stage in plan(fresh)}
    assert again["verify"].count == report["pool_pairs"] + report["guard_pairs"]
    assert again["exact"].basis == "an earlier run in this folder"
    assert planned["exact"].seconds is None


def test_a_bootstrap_model_is_a_step_of_its_own(fresh, table):
    trained = replace(fresh, embed=EmbedConfig(copy=replace(fresh.embed.copy, model="bootstrap")))
    stages = {stage.stage: stage for stage in plan_stages(trained, table, replace(RATES, embed=None, pixels=None))}
    assert list(stages).index("bootstrap") == list(stages).index("embed") - 1
    assert stages["embed"].seconds is None
    assert stages["bootstrap"].disk == stages["shards"].disk


def test_a_wrong_path_is_said(fresh):
    with pytest.raises(UserError, match=r"source\.paths: /nowhere"):
        plan(replace(fresh, source=SourceConfig(paths=("/nowhere",))))
