"""A run that takes over an earlier one gives the same bytes as a run from scratch, and does not do the work again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import curation.embed
from curation.config import CopyModelConfig, CurateConfig, EmbedConfig
from curation.previous import Ids
from curation.run import curate
from runtime.errors import UserError
from runtime.files import read_json


def result_of(out: Path) -> dict[str, bytes]:
    files = [out / "manifest.parquet", *sorted((out / "shards").glob("*"))]
    return {path.name: path.read_bytes() for path in files}


def counts(out: Path, stage: str) -> dict:
    return read_json(out / "stages" / stage / "done.json")["counts"]


@pytest.fixture(scope="module")
def sources(pack, tmp_path_factory) -> list[str]:
    """Two sources: many images; and a few, copies of old ones among them and one of the same bytes."""
    folder = tmp_path_factory.mktemp("sources")
    files = sorted((pack / "pool" / "loose").glob("*"))
    many, few = files[: len(files) * 2 // 3], files[len(files) * 2 // 3 :]
    for name, chosen in (("many", many), ("few", few)):
        (folder / name).mkdir()
        for file in chosen:
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "few" / "again.jpg").write_bytes(next(f for f in many if f.suffix == ".jpg").read_bytes())
    return [f"{folder}/many", f"new={folder}/few"]


@pytest.fixture(scope="module")
def base(config, sources) -> CurateConfig:
    """One image per batch, so that a vector cannot depend on its neighbours in it; the exact join; many pairs."""
    return replace(
        config,
        embed=replace(config.embed, batch_size=1),
        dedup=replace(config.dedup, join="exact", threshold=0.1),
        guard=replace(config.guard, threshold=0.1),
    )


def of(config: CurateConfig, out: Path, *paths: str, previous: Path | None = None) -> CurateConfig:
    source = replace(config.source, paths=paths)
    return replace(config, out=str(out), source=source, previous=str(previous) if previous else "")


@pytest.fixture(scope="module")
def runs(base, sources, tmp_path_factory) -> dict[str, Path]:
    """`first`: one source; `scratch`: both; `more`: both after `first`."""
    folder = tmp_path_factory.mktemp("runs")
    first = curate(of(base, folder / "first", *sources[:1]))
    scratch = curate(of(base, folder / "scratch", *sources))
    more = curate(of(base, folder / "more", *sources, previous=first))
    return {"first": first, "scratch": scratch, "more": more}


def test_added_sources_give_the_bytes_of_a_run_from_scratch(runs):
    assert result_of(runs["more"]) == result_of(runs["scratch"])
    assert result_of(runs["more"]) != result_of(runs["first"])


def test_what_was_known_is_not_done_again(runs):
    first, more = runs["first"], runs["more"]
    num_first = sum(counts(first, "items")[role] for role in ("pool", "seed", "guard"))
    assert counts(more, "decode")["taken_over"] == num_first + 1  # and the equal file among the new ones
    embedded = counts(more, "embed")
    num_embedded = pytest.approx(counts(first, "embed")["images"], abs=8)
    assert embedded["taken_over"] == {"copy": num_embedded, "retrieval": num_embedded}
    assert embedded["taken_over"]["copy"] < embedded["images"]
    joined = counts(more, "join")
    assert joined["taken_over"]["images"] > (counts(more, "index")["images"] - joined["taken_over"]["images"])
    assert joined["pool_pairs"] == counts(runs["scratch"], "join")["pool_pairs"]
    verified = counts(more, "verify")
    assert verified["compared"] < verified["pairs"] / 2
    assert counts(runs["scratch"], "verify")["compared"] == verified["pairs"]


def test_a_third_run_takes_over_what_the_second_took_over(base, runs, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(curation.embed, "load_pixels", None)  # would fail where an image had to be decoded
    third = curate(of(base, tmp_path / "third", *sources, previous=runs["more"]))
    assert result_of(third) == result_of(runs["scratch"])
    assert counts(third, "verify")["compared"] == 0
    assert counts(third, "join")["taken_over"]["images"] == counts(third, "index")["images"]


def test_fewer_sources_and_a_run_of_a_whole_pipeline(base, runs, sources, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "curate").symlink_to(runs["scratch"])
    fewer = curate(of(base, tmp_path / "out", *sources[:1], previous=tmp_path / "pipeline"))
    assert result_of(fewer) == result_of(runs["first"])


@pytest.mark.slow
def test_other_settings_are_not_taken_over_and_said(base, runs, sources, tmp_path, capsys):
    changed = replace(
        base,
        decode=replace(base.decode, min_side=20),
        embed=EmbedConfig(
            copy=CopyModelConfig(base.embed.retrieval.model, 32),
            retrieval=replace(base.embed.retrieval, size=32),
            batch_size=1,
        ),
        dedup=replace(base.dedup, threshold=0.8),
    )
    scratch = curate(of(changed, tmp_path / "scratch", *sources[:1]))
    capsys.readouterr()
    out = curate(of(changed, tmp_path / "out", *sources[:1], previous=runs["first"]))
    said = capsys.readouterr().err
    assert "decoded images and scores of pairs are not taken over: decode.min_side: 16 -> 20" in said
    assert "copy vectors are not taken over: embed.copy is another model or another size" in said
    assert result_of(out) == result_of(scratch)
    assert "taken_over" not in counts(out, "decode")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"threshold": 0.05}, {"join": "knn"}], ids=lambda change: next(iter(change)))
def test_the_join_is_redone_where_the_threshold_was_higher_or_the_join_another(base, runs, sources, tmp_path, change):
    changed = replace(base, dedup=replace(base.dedup, **change))
    scratch = curate(of(changed, tmp_path / "scratch", *sources))
    out = curate(of(changed, tmp_path / "out", *sources, previous=runs["first"]))
    assert result_of(out) == result_of(scratch)
    assert counts(out, "join")["taken_over"]["images"] == 0
    assert counts(out, "embed")["taken_over"]["copy"] > 0


def test_a_previous_run_must_be_a_finished_one(base, sources, tmp_path):
    with pytest.raises(UserError, match=r"previous: .*absent is not a finished curation \(no folder\)"):
        curate(of(base, tmp_path / "out", *sources[:1], previous=tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a folder without summary\.json"):
        curate(of(base, tmp_path / "out", *sources[:1], previous=tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_ids_are_found_by_content():
    ids = [number.tobytes().hex() for number in np.random.default_rng(0).integers(0, 2**63, (1000, 2))]
    known = Ids.of([None, *ids, ids[3], ""])
    assert known.find(ids).tolist() == list(range(1, 1001))
    assert known.find(["", "0" * 31 + "1", ids[7]]).tolist() == [-1, -1, 8]
    assert Ids.of([]).find(ids[:2]).tolist() == [-1, -1]
