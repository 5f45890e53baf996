"""The whole of curation on a small real pool: what it finds, that it repeats itself, and how it fails."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from curation.config import GuardConfig, SeedsConfig, SourceConfig
from curation.manifest import FATES, SCHEMA, read_manifest
from curation.run import STAGES, curate, write_raw_shards
from curation.shards import verify_shards
from runtime.config import to_yaml
from runtime.errors import UserError
from runtime.files import locate


def result_of(out: Path) -> dict[str, bytes]:
    """Every byte of a result that must not vary: the manifest and the shards."""
    files = [out / "manifest.parquet", *sorted((out / "shards").glob("*"))]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def truth(pack) -> dict:
    return json.loads((pack / "truth.json").read_text())


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory) -> Path:
    """The output of one run in one process."""
    return curate(replace(config, out=str(tmp_path_factory.mktemp("run") / "out")))


@pytest.fixture(scope="session")
def by_name(finished) -> dict[str, dict]:
    """Rows of the manifest by the number of the image in the pack."""
    return {row["key"].split(".")[0]: row for row in read_manifest(finished).to_pylist()}


def test_the_manifest_has_the_promised_columns_and_a_row_for_every_image(finished, pack, by_name):
    table = read_manifest(finished)
    assert table.schema.equals(SCHEMA)
    assert set(table["fate"].to_pylist()) <= set(FATES)
    places = list(zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True))
    assert places == sorted(set(places))
    num_loose = len(list((pack / "pool" / "loose").glob("*.jpg")))
    assert sum(source.endswith("a.tar") for source, _ in places) + num_loose == len(places)
    assert sum(f"{pack}/pool/loose" in source for source, _ in places) == num_loose


def test_planted_copies_are_grouped_and_nothing_else(by_name, truth):
    expected = {key: index for index, group in enumerate(truth["groups"]) for key in group}
    pairs = [(a, b) for group in truth["groups"] for a in group for b in group if a < b]
    found = sum(
        by_name[a]["group_id"] is not None and by_name[a]["group_id"] == by_name[b]["group_id"] for a, b in pairs
    )
    assert found / len(pairs) >= 0.95
    groups = defaultdict(set)
    for key, row in by_name.items():
        if row["group_id"] is not None and row["fate"] != "leak":
            groups[row["group_id"]].add(expected.get(key, key))
    assert all(len(members) == 1 for members in groups.values())


def test_every_duplicate_has_a_witness_in_its_group_that_was_not_a_duplicate(by_name):
    rows = {row["item_id"]: row for row in by_name.values() if row["fate"] != "duplicate"}
    duplicates = [row for row in by_name.values() if row["fate"] == "duplicate"]
    assert duplicates
    for row in duplicates:
        witness = rows[row["witness_id"]]
        assert witness["source"] == row["witness_source"]
        assert witness["group_id"] == row["group_id"] == row["witness_id"]
        assert row["reason"] in ("same bytes", "same pixels", "same look", "near-duplicate")
        assert -1 <= row["cosine"] <= 1
        assert witness["width"] * witness["height"] >= row["width"] * row["height"]


def test_leaks_are_found_with_the_evaluation_image_as_witness(by_name, truth):
    called = {key for key, row in by_name.items() if row["fate"] == "leak"}
    assert called == set(truth["leaks"])
    for key in called:
        assert by_name[key]["witness_source"].endswith(truth["leaks"][key])
        assert len(by_name[key]["witness_id"]) == 32


def test_rejects_have_their_reasons(by_name):
    reasons = {key: row["reason"] for key, row in by_name.items() if row["fate"] == "rejected"}
    assert reasons == {"odd_truncated_half": "truncated", "odd_empty": "empty", "odd_not_found": "not an image"}


def test_what_is_kept_was_retrieved_and_lies_in_a_shard(by_name, finished, config):
    kept = [row for row in by_name.values() if row["fate"] == "kept"]
    assert all(row["seed_set"] in ("airplanes", "daisy", "dandelion", "leopards") for row in kept)
    assert all(0 <= row["rank"] < config.retrieval.k and row["shard"] == "train-000000.tar" for row in kept)
    assert all(row["shard"] is None for row in by_name.values() if row["fate"] != "kept")
    assert verify_shards(finished / "shards") == []
    manifest = json.loads((finished / "shards" / "manifest.json").read_text())
    assert manifest["samples"] == len(kept)


def test_the_summary_adds_up(finished, by_name):
    summary = json.loads((finished / "summary.json").read_text())
    fates = [row["fate"] for row in by_name.values()]
    assert summary["fates"] == {fate: fates.count(fate) for fate in FATES}
    funnel = summary["funnel"]
    assert [step["stage"] for step in funnel] == ["items", "decode", "dedup", "guard", "retrieve"]
    assert funnel[0]["in"] == len(fates)
    for before, after in itertools.pairwise(funnel):
        assert before["out"] == after["in"]
        assert after["in"] - after["out"] == sum(after["removed"].values())
    assert funnel[-1]["out"] == fates.count("kept")
    recall = summary["pair_recall"]
    assert "exact" in recall["search"]
    assert recall["found"] <= recall["pairs"]
    assert recall["interval_95"][0] <= recall["recall"] <= recall["interval_95"][1]
    assert set(summary["seconds"]) == set(STAGES)


def test_a_second_run_does_nothing_and_says_so(config, finished, capsys):
    before = result_of(finished) | {"summary.json": (finished / "summary.json").read_bytes()}
    curate(replace(config, out=str(finished)))
    assert "finished already" in capsys.readouterr().err
    assert result_of(finished) | {"summary.json": (finished / "summary.json").read_bytes()} == before


def test_two_workers_and_another_order_of_sources_give_the_same_bytes(config, finished, tmp_path):
    paths = tuple(reversed(config.source.paths))
    other = replace(config, out=str(tmp_path / "out"), workers=2, source=replace(config.source, paths=paths))
    assert result_of(curate(other)) == result_of(finished)


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes(config, finished, tmp_path):
    """kill -9 as soon as some file appears, again and again."""
    other = replace(config, out=str(tmp_path / "out"), workers=1)
    (tmp_path / "config.yaml").write_text(to_yaml(other))
    program = (
        "from runtime.config import load; from curation.config import CurateConfig; from curation.run import curate\n"
        f"if __name__ == '__main__': curate(load(CurateConfig, {str(tmp_path / 'config.yaml')!r}))"
    )
    for appears in ("decode/part-00001.parquet", "embed/part-00002.parquet", "guard/stage.json"):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parents[2], start_new_session=True
        )
        while not (tmp_path / "out" / "stages" / appears).exists():
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "manifest.parquet").exists()
    assert result_of(curate(other)) == result_of(finished)


def test_finished_parts_are_not_done_again(config, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "stages" / "decode" / "done.json").unlink()
    (out / "stages" / "decode" / "part-00001.parquet").unlink()
    kept = out / "stages" / "decode" / "part-00000.parquet"
    before = kept.stat().st_mtime_ns
    curate(replace(config, out=str(out)))
    assert kept.stat().st_mtime_ns == before
    assert result_of(out) == result_of(finished)


def test_stages_can_be_run_one_by_one(config, finished, tmp_path):
    other = replace(config, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"stage items is not finished"):
        curate(other, stages=["decode"])
    assert not (tmp_path / "out").exists()
    curate(other, stages=["items", "decode", "exact"])
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    raw = write_raw_shards(other, tmp_path / "raw")
    assert verify_shards(raw) == []
    exact = json.loads((tmp_path / "out" / "stages" / "exact" / "done.json").read_text())
    assert json.loads((raw / "manifest.json").read_text())["samples"] == exact["counts"]["out"]
    for name in STAGES[3:]:
        curate(other, stages=[name])
    assert result_of(tmp_path / "out") == result_of(finished)
    with pytest.raises(UserError, match=r"no stage 'dedupe'; the stages are items, decode"):
        curate(other, stages=["dedupe"])


def test_without_seeds_and_evaluation_sets_everything_distinct_is_kept(config, tmp_path, capsys):
    bare = replace(config, out=str(tmp_path / "out"), seeds=SeedsConfig(), guard=GuardConfig())
    fates = read_manifest(curate(bare))["fate"].to_pylist()
    assert set(fates) == {"kept", "rejected", "duplicate"}
    said = capsys.readouterr().err
    assert "guard: skipped, guard.paths is empty" in said
    assert "retrieve: skipped, seeds.paths is empty" in said
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"]) == {"guard", "retrieve"}


def test_without_verification_the_cosine_decides(config, tmp_path):
    plain = replace(config, out=str(tmp_path / "out"), seeds=SeedsConfig(), guard=GuardConfig())
    plain = replace(plain, dedup=replace(plain.dedup, verify=False, threshold=0.8, phash_distance=0))
    rows = read_manifest(curate(plain)).to_pylist()
    near = [row for row in rows if row["reason"] == "near-duplicate"]
    assert near
    assert any(row["cosine"] >= 0.8 for row in near)


@pytest.mark.parametrize("same", [True, False])
def test_two_images_are_enough(config, tmp_path, same):
    heap = tmp_path / "heap"
    heap.mkdir()
    names = ["baseline.jpg", "trailing_garbage.jpg" if same else "progressive.jpg"]
    first = locate(f"embedded:corrupt/files/{names[0]}").read_bytes()
    (heap / "1.jpg").write_bytes(first)
    (heap / "2.jpg").write_bytes(first + b"more" if same else locate(f"embedded:corrupt/files/{names[1]}").read_bytes())
    two = replace(config, out=str(tmp_path / "out"), source=SourceConfig(paths=(str(heap),)), seeds=SeedsConfig())
    rows = read_manifest(curate(two)).to_pylist()
    assert sorted(row["fate"] for row in rows) == (["duplicate", "kept"] if same else ["kept", "kept"])
    if same:
        assert next(row["reason"] for row in rows if row["fate"] == "duplicate") == "same pixels"


def test_a_wrong_path_leaves_no_folder_behind(config, tmp_path):
    wrong = replace(config, out=str(tmp_path / "out"), source=SourceConfig(paths=("/nowhere",)))
    with pytest.raises(UserError, match=r"source\.paths: /nowhere: no such folder"):
        curate(wrong)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_config_is_refused(config, finished):
    with pytest.raises(UserError, match=r"belongs to another config\n  differs in dedup.k: 4 -> 5"):
        curate(replace(config, out=str(finished), dedup=replace(config.dedup, k=5)))


def test_a_full_disk_is_noticed(config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"out: decoding needs about .* 1.0 KB are free"):
        curate(replace(config, out=str(tmp_path / "out")))
