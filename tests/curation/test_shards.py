"""Shards hold the original bytes, read everywhere, and are the same bytes on every run."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.config import CurateConfig, DecodeConfig, ShardsConfig, SourceConfig
from curation.decoding import decode_stage
from curation.items import items_stage, list_items, read_bytes
from curation.rows import Rows, read_rows
from curation.shards import index_shards, inspect_shards, verify_shards, write_shards
from curation.stage import WHOLE, Stage
from runtime.errors import UserError
from runtime.files import locate
from runtime.tars import scan_tar


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def heap(tmp_path_factory) -> Path:
    """A tar with sidecars and a folder with every kind of good odd file."""
    folder = tmp_path_factory.mktemp("heap")
    shutil.copy(locate("embedded:corrupt/shards/good.tar"), folder / "good.tar")
    for path in locate("embedded:corrupt/files").iterdir():
        shutil.copy(path, folder)
    (folder / "photo").write_bytes((folder / "baseline.jpg").read_bytes() + b"made unique")
    (folder / "photo.json").write_text('{"license": "CC0"}')
    return folder


@pytest.fixture(scope="module")
def config(heap) -> CurateConfig:
    return replace(
        CurateConfig(workers=0), source=SourceConfig(paths=(str(heap),)), decode=DecodeConfig(min_side=1),
        shards=ShardsConfig(max_bytes=60_000),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(config, tmp_path_factory) -> Rows:
    out = tmp_path_factory.mktemp("out")
    items, decode = Stage(out, "items", {}), Stage(out, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    return read_rows(items, decode)


@pytest.fixture(scope="module")
def shards(config, rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(config, rows, rows.of("pool"), folder, share=WHOLE, stop=None)
    return folder


def test_plain_webdataset_reads_original_bytes_and_sidecars(rows, shards):
    urls = sorted(map(str, shards.glob("*.tar")))
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        found[sample["__key__"]] = members
    expected = {}
    for row in rows.of("pool"):
        item = rows.table.slice(row, 1).to_pylist()[0]
        extension = {"photo": "jpg"}.get(item["key"], item["extension"])
        expected[item["item_id"]] = {extension: read_bytes(item["source"], item["offset"], item["length"])} | {
            side["extension"]: read_bytes(side["source"], side["offset"], side["length"]) for side in item["sidecars"]
        }
    assert found == expected
    assert sum("json" in members for members in found.values()) == 9


def test_the_index_gives_random_access(shards):
    for tar in shards.glob("*.tar"):
        index = pq.read_table(tar.with_suffix(".idx"))
        assert index.schema.names == ["key", "extension", "offset", "length"]
        data = tar.read_bytes()
        with tarfile.open(tar) as archive:
            members = {entry.name: archive.extractfile(entry).read() for entry in archive}
        ours = {
            f"{r['key']}.{r['extension']}": data[r["offset"] : r["offset"] + r["length"]] for r in index.to_pylist()
        }
        assert list(ours.items()) == list(members.items())


def test_members_say_nothing_of_when_and_where(shards):
    for tar in shards.glob("*.tar"):
        with tarfile.open(tar) as archive:
            for entry in archive:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (0, 0, 0, "", "")
                assert entry.name.count(".") == 1
                assert len(entry.name.split(".")[0]) == 32


def test_shards_keep_to_their_size_and_the_manifest_describes_them(rows, shards, config):
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["samples"] == len(rows.of("pool"))
    assert [entry["name"] for entry in manifest["shards"]] == sorted(path.name for path in shards.glob("*.tar"))
    assert len(manifest["shards"]) > 2
    for entry in manifest["shards"]:
        assert entry["bytes"] == (shards / entry["name"]).stat().st_size
        assert entry["bytes"] <= config.shards.max_bytes + 1024 or entry["samples"] == 1
    assert verify_shards(shards) == []


def test_the_same_selection_gives_the_same_bytes_and_another_seed_another_order(config, rows, shards, tmp_path):
    shuffled = np.random.default_rng(0).permutation(rows.of("pool"))
    write_shards(replace(config, workers=2), rows, shuffled, tmp_path / "again", share=WHOLE, stop=None)
    assert files_of(tmp_path / "again") == files_of(shards)
    write_shards(replace(config, seed=1), rows, shuffled, tmp_path / "other", share=WHOLE, stop=None)
    assert files_of(tmp_path / "other") != files_of(shards)


def test_shards_that_are_there_are_kept_and_missing_ones_written(config, rows, shards, tmp_path):
    folder = tmp_path / "shards"
    write_shards(config, rows, rows.of("pool"), folder, share=WHOLE, stop=None)
    kept, lost = folder / "train-000000.tar", folder / "train-000001.idx"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    write_shards(config, rows, rows.of("pool"), folder, share=WHOLE, stop=None)
    assert kept.stat().st_mtime_ns == before
    assert files_of(folder) == files_of(shards)


def test_shards_of_another_selection_are_removed(config, rows, tmp_path):
    write_shards(config, rows, rows.of("pool"), tmp_path, share=WHOLE, stop=None)
    write_shards(config, rows, rows.of("pool")[:2], tmp_path, share=WHOLE, stop=None)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-000000.tar"]
    assert verify_shards(tmp_path) == []


def test_verification_finds_damage(shards, tmp_path):
    for name, damage in {
        "train-000000.tar: missing": lambda f: (f / "train-000000.tar").unlink(),
        "train-000000.tar: its .idx is missing": lambda f: (f / "train-000000.idx").unlink(),
        "train-000000.tar: check sum differs": lambda f: flip(f / "train-000000.tar", 700),
        "its bytes are not those of its name": lambda f: flip(f / "train-000000.tar", 700),
        "train-000099.tar: not in manifest.json": lambda f: shutil.copy(f / "train-000000.tar", f / "train-000099.tar"),
        "its .idx does not describe it": lambda f: shutil.copy(f / "train-000001.idx", f / "train-000000.idx"),
    }.items():
        folder = tmp_path / str(abs(hash(name)))
        shutil.copytree(shards, folder)
        damage(folder)
        assert any(name in line for line in verify_shards(folder)), name


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_foreign_tars_can_be_inspected_and_say_that_they_are_foreign(tmp_path):
    summary = inspect_shards(["embedded:corrupt/shards"])
    assert summary["shards"] == 4
    assert summary["samples"] == 8 + 5 + 8 + 8
    assert summary["members"]["jpg"] == 8 + 5 + 8 + 9
    assert any("cut off" in line for line in summary["problems"])
    with pytest.raises(UserError, match=r"no manifest\.json"):
        verify_shards(tmp_path)
    with pytest.raises(UserError, match=r"no \.tar in"):
        inspect_shards([str(tmp_path)])
    with pytest.raises(UserError, match=r"no file or folder"):
        inspect_shards([str(tmp_path / "absent")])


def test_a_source_that_changed_is_an_error(tmp_path):
    heap = tmp_path / "heap"
    heap.mkdir()
    shutil.copy(locate("embedded:corrupt/files/baseline.jpg"), heap / "a.jpg")
    config = replace(CurateConfig(workers=0), source=SourceConfig(paths=(str(heap),)))
    items, decode = Stage(tmp_path, "items", {}), Stage(tmp_path, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    rows = read_rows(items, decode)
    flip(heap / "a.jpg", 3000)
    with pytest.raises(UserError, match=r"a\.jpg has changed since it was decoded"):
        write_shards(config, rows, rows.of("pool"), tmp_path / "shards", share=WHOLE, stop=None)
    assert not list((tmp_path / "shards").glob("train-*"))


def test_a_full_disk_is_noticed_before_writing(config, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"writing shards needs about .* 1.0 KB are free"):
        write_shards(config, rows, rows.of("pool"), tmp_path / "shards", share=WHOLE, stop=None)


def test_long_extensions_and_strange_letters_survive(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        data = locate("embedded:corrupt/files/baseline.jpg").read_bytes()
        for name, content in {"a.jpg": data, f"a.{'x' * 90}.json": b"1", "a.übung.txt": b"2"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    config = replace(CurateConfig(workers=0), source=SourceConfig(paths=(str(tmp_path / "t.tar"),)))
    items, decode = Stage(tmp_path, "items", {}), Stage(tmp_path, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    write_shards(config, read_rows(items, decode), np.array([0]), tmp_path / "shards", share=WHOLE, stop=None)
    members, problem = scan_tar(tmp_path / "shards" / "train-000000.tar")
    assert problem is None
    assert [member.extension for member in members] == ["jpg", f"{'x' * 90}.json", "übung.txt"]
    assert verify_shards(tmp_path / "shards") == []


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_foreign_tars_get_an_index_that_training_reads(tmp_path):
    from pretrain.data.shards import ShardSet

    photo = locate("embedded:corrupt/files/baseline.jpg").read_bytes()
    tar_of(tmp_path / "a.tar", {"d/1.jpg": photo, "d/1.json": b"{}", "2.seg.png": photo, "2.txt": b"x", "none": b""})
    tar_of(tmp_path / "b.tar", {"3.JPG": photo + b"3"})
    scanned = ShardSet.open([str(tmp_path)])
    found = [(tar.name, text, fine) for tar, text, fine in index_shards([str(tmp_path)])]
    assert found == [
        ("a.tar", "indexed: 2 samples, 1 members left out, first none: no extension", True),
        ("b.tar", "indexed: 1 samples", True),
    ]
    indexed = ShardSet.open([str(tmp_path)])
    assert indexed.fingerprint == scanned.fingerprint
    assert [indexed.read(i) for i in range(len(indexed))] == [scanned.read(i) for i in range(len(scanned))]
    assert [text for _, text, _ in index_shards([str(tmp_path)])] == ["has its index"] * 2
    tar_of(tmp_path / "b.tar", {"4.jpg": photo})
    assert [fine for *_, fine in index_shards([str(tmp_path)])] == [True, False]


def test_our_own_index_is_what_indexing_would_write(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    before = {path.name: pq.read_table(path) for path in (tmp_path / "copy").glob("*.idx")}
    assert all(text == "has its index" for _, text, _ in index_shards([str(tmp_path / "copy")]))
    for path in (tmp_path / "copy").glob("*.idx"):
        path.unlink()
    list(index_shards([str(tmp_path / "copy")]))
    assert all(pq.read_table(tmp_path / "copy" / name).equals(table) for name, table in before.items())


def test_a_tar_that_is_cut_off_gets_no_index(tmp_path):
    tar = tar_of(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 700 for i in range(4)})
    tar.write_bytes(tar.read_bytes()[:3000])
    assert [fine for *_, fine in index_shards([str(tar)])] == [False]
    assert not tar.with_suffix(".idx").exists()


def test_inspection_counts_indexes_and_names_keys_that_come_in_two_shards(tmp_path):
    tar_of(tmp_path / "a.tar", {f"{i}.jpg": b"x" for i in range(20)})
    tar_of(tmp_path / "b.tar", {f"{i}.jpg": b"x" for i in range(5, 25)})
    list(index_shards([str(tmp_path / "a.tar")]))
    found = inspect_shards([str(tmp_path)])
    assert (found["shards"], found["indexed"], found["samples"], found["repeated_keys"]) == (2, 1, 40, 15)
    assert found["problems"][0] == "b.tar: 5: in a.tar too"
    assert found["problems"][10:] == ["and 5 more samples whose key is in an earlier shard"]
