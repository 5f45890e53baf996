"""One image's story agrees with the manifest, and any usual way to name it finds it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.explain import as_text, explain
from curation.manifest import read_manifest
from curation.run import curate
from runtime.errors import UserError


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    return curate(replace(config, out=str(tmp_path_factory.mktemp("explain") / "out")))


@pytest.fixture(scope="module")
def manifest(finished) -> list[dict]:
    return read_manifest(finished).to_pylist()


def one(manifest: list[dict], **wanted) -> dict:
    return next(row for row in manifest if all(row[name] == value for name, value in wanted.items()))


def test_every_image_has_a_story_that_agrees_with_the_manifest(finished, manifest):
    for row in manifest:
        name = f"{row['source']}/{row['key']}" if row["source"].endswith(".tar") else row["source"]
        story = explain(finished, name)
        assert (story["fate"], story.get("reason"), story.get("item_id")) == (
            row["fate"], row["reason"], row["item_id"],
        )  # fmt: skip
        assert story["source_name"] == row["source_name"]
        assert json.loads(json.dumps(story)) == story
        assert as_text(story).startswith(f"image: {story['image']}\n")


def test_a_duplicate_says_who_stays_why_and_how_alike_they_are(finished, manifest):
    row = one(manifest, reason="near-duplicate", fate="duplicate")
    story = explain(finished, row["item_id"])
    assert story["witness"]["item_id"] == row["witness_id"] == row["group_id"]
    stays = explain(finished, row["group_id"])
    assert story["group"]["stays"] == stays["image"]
    assert story["group"]["size"] == sum(other["group_id"] == row["group_id"] for other in manifest)
    assert any(word in story["group"]["because"] for word in ("larger", "less compressed", "content id"))
    assert any(pair["near_duplicate"] for pair in story["candidate_pairs"])
    assert {pair["image"] for pair in story["candidate_pairs"]} - {story["image"]}
    distances = [
        abs((pair["cosine"] if pair["score"] is None else pair["score"]) - pair["threshold"])
        for pair in story["candidate_pairs"]
    ]
    assert distances == pytest.approx(sorted(distances), abs=1e-3)


def test_a_leak_names_the_evaluation_image_and_a_reject_its_reason(finished, manifest):
    row = one(manifest, fate="leak", reason="copy of an evaluation image")
    story = explain(finished, row["item_id"])
    assert story["evaluation"][0]["leak"] == "copy"
    assert story["evaluation"][0]["image"] == row["witness_source"]
    assert any(pair.get("accepted") for pair in story["evaluation"][1:])
    rejected = explain(finished, one(manifest, reason="truncated")["source"])
    assert rejected["decoded"]["verdict"] == "truncated"
    assert "ends early" in rejected["decoded"]["detail"]


def test_what_is_kept_has_its_seed_and_its_place_in_a_shard(finished, manifest):
    row = one(manifest, fate="kept")
    story = explain(finished, row["item_id"])
    assert any(entry.get("seed_set") == row["seed_set"] for entry in story["retrieved"])
    offset = story["shard"][f"{story['image'].rpartition('.')[2]} at"] if "loose" in story["image"] else None
    index = pq.read_table((finished / "shards" / row["shard"]).with_suffix(".idx")).to_pylist()
    assert offset is None or offset in {member["offset"] for member in index if member["key"] == row["item_id"]}


def test_usual_ways_to_name_an_image(finished, manifest, monkeypatch):
    loose = next(row for row in manifest if "/loose/" in row["source"])
    member = next(row for row in manifest if row["source"].endswith("a.tar"))
    monkeypatch.chdir(Path(loose["source"]).parents[1])
    for name in (loose["source"], f"loose/{loose['key']}", f"./loose/{loose['key']}", loose["key"],
                 os.path.relpath(loose["source"]), f"../pool/loose/{loose['key']}"):  # fmt: skip
        assert explain(finished, name)["lies"]["source"] == loose["source"], name
    for name in (f"{member['source']}/{member['key']}", f"a.tar/{member['key']}", f"./a.tar/{member['key']}.jpg",
                 member["key"], member["item_id"], member["item_id"][:10]):  # fmt: skip
        story = explain(finished, name)
        assert (story["lies"]["source"], story["lies"]["key"]) == (member["source"], member["key"]), name


def test_evaluation_images_and_seeds_have_a_story_too(finished, pack):
    path = next((pack / "eval").rglob("*.jpg"))
    story = explain(finished, str(path))
    assert story["role"] == "guard"
    assert "fate" not in story


def test_unknown_and_ambiguous_names_say_which_are_near(finished, manifest, tmp_path):
    loose = next(row for row in manifest if "/loose/odd_" in row["source"])
    with pytest.raises(UserError, match=r"no image odd_trunkated_half\.jpg in .*nearest: .*odd_truncated_half\.jpg"):
        explain(finished, "odd_trunkated_half.jpg")
    with pytest.raises(UserError, match="no image zzzz"):
        explain(finished, "zzzz")
    assert loose["key"].startswith("odd_")
    with pytest.raises(UserError, match="no folder"):
        explain(tmp_path / "absent", "x")
    with pytest.raises(UserError, match="no finished curation"):
        explain(tmp_path, "x")


def test_a_name_that_means_several_images_lists_them(config, pack, tmp_path):
    source = sorted((pack / "pool" / "loose").glob("[0-9]*.jpg"))[:4]
    for folder, files in (("a", source[:2]), ("b", source[2:])):
        (tmp_path / folder).mkdir()
        for number, file in enumerate(files):
            (tmp_path / folder / f"{number}.jpg").write_bytes(file.read_bytes())
    (tmp_path / "b" / "again.jpg").write_bytes(source[0].read_bytes())
    paths = (f"one={tmp_path}/a", f"two={tmp_path}/b")
    other = replace(config, out=str(tmp_path / "out"), source=replace(config.source, paths=paths),
                    guard=replace(config.guard, paths=()), seeds=replace(config.seeds, paths=()))  # fmt: skip
    curate(other)
    with pytest.raises(UserError, match=rf"0\.jpg means 2 images.*\n.*{tmp_path}/a/0\.jpg\n.*{tmp_path}/b/0\.jpg"):
        explain(tmp_path / "out", "0.jpg")
    story = explain(tmp_path / "out", f"{tmp_path}/b/again.jpg")
    assert story["copy_of"][0] == {"reason": "same bytes", "image": f"{tmp_path}/a/0.jpg"}
    assert story["same_bytes_at"] == [f"{tmp_path}/a/0.jpg"]
    assert explain(tmp_path / "out", story["item_id"])["image"] == f"{tmp_path}/a/0.jpg"
