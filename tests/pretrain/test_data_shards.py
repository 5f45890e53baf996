"""Shards with and without an index give the same images; damaged or wrong ones are refused by name."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pretrain.data.shards import OPEN_FILES, ShardSet
from runtime.errors import UserError
from runtime.files import locate, write_table
from runtime.tars import scan_tar


def picture(shade: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 255 - shade)).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_index(tar: Path) -> Path:
    """The index that curation's file contract asks for."""
    members, _ = scan_tar(tar)
    columns = {name: [getattr(member, name) for member in members] for name in ("key", "extension", "offset", "length")}
    pq.write_table(pa.table(columns), tar.with_suffix(".idx"))
    return tar.with_suffix(".idx")


@pytest.fixture
def folder(tmp_path):
    write_tar(tmp_path / "b-1.tar", {"x.png": picture(1), "x.json": b"{}", "y.webp": picture(2, "WEBP")})
    write_tar(tmp_path / "a-0.tar", {"c.txt": b"c", "c.jpg": picture(3, "JPEG"), "dir/d.JPEG": picture(4, "JPEG")})
    return tmp_path


def test_a_folder_gives_its_tars_by_name_and_their_images_in_order(folder):
    shards = ShardSet.open([str(folder)])
    assert len(shards) == 4
    assert [shards.read(i) for i in range(4)] == [
        ("c", picture(3, "JPEG")), ("dir/d", picture(4, "JPEG")), ("x", picture(1)), ("y", picture(2, "WEBP")),
    ]  # fmt: skip


@pytest.mark.parametrize("patterns", [["a-0.tar", "b-1.tar"], ["*.tar"], ["a-*.tar", "b-?.tar"], ["[ab]-*.tar"]])
def test_tars_and_globs_equal_the_folder(folder, patterns):
    shards = ShardSet.open([str(folder / pattern) for pattern in patterns])
    assert shards.fingerprint == ShardSet.open([str(folder)]).fingerprint
    assert len(shards) == 4


def test_an_index_says_the_same_as_a_scan(folder):
    scanned = ShardSet.open([str(folder)])
    index = write_index(folder / "a-0.tar")
    indexed = ShardSet.open([str(folder)])
    assert indexed.fingerprint == scanned.fingerprint
    assert [indexed.read(i) for i in range(4)] == [scanned.read(i) for i in range(4)]
    pq.write_table(pq.read_table(index).slice(0, 2), index)  # proof that the index is what is read
    assert len(ShardSet.open([str(folder)])) == 3


def test_the_fingerprint_is_of_the_content_not_of_the_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for tar in folder.glob("*.tar"):
        (elsewhere / tar.name).write_bytes(tar.read_bytes())
    assert ShardSet.open([str(elsewhere)]).fingerprint == ShardSet.open([str(folder)]).fingerprint
    write_tar(elsewhere / "b-1.tar", {"x.png": picture(1), "x.json": b"{ }" * 300, "y.webp": picture(2, "WEBP")})
    assert ShardSet.open([str(elsewhere)]).fingerprint != ShardSet.open([str(folder)]).fingerprint


def test_of_several_images_under_one_key_the_first_counts(tmp_path):
    members = {"k.json": b"{}", "k.img1.png": picture(1), "k.img2.png": picture(2), "l.png": picture(3)}
    tar = write_tar(tmp_path / "t.tar", members)
    for _ in range(2):
        shards = ShardSet.open([str(tar)])
        assert [shards.read(i) for i in range(len(shards))] == [("k", picture(1)), ("l", picture(3))]
        write_index(tar)


def test_shards_that_webdataset_wrote_are_read_as_webdataset_reads_them(tmp_path):
    pattern = str(tmp_path / "foreign-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for i in range(12):
            writer.write({"__key__": f"{i:04d}", "png" if i % 2 else "webp": picture(i, "PNG" if i % 2 else "WEBP"),
                          "cls": i % 3})  # fmt: skip
    shards = ShardSet.open([str(tmp_path)])
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    theirs = [
        (sample["__key__"], sample.get("png") or sample["webp"])
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]
    assert len(theirs) == 12
    assert [shards.read(i) for i in range(len(shards))] == theirs


def test_more_shards_than_files_kept_open(tmp_path):
    for i in range(OPEN_FILES + 5):
        write_tar(tmp_path / f"{i:03d}.tar", {f"k{i}.png": picture(i)})
    shards = ShardSet.open([str(tmp_path)])
    order = [*range(len(shards)), *range(len(shards))]
    assert [shards.read(i)[0] for i in order] == [f"k{i}" for i in order]
    assert len(shards.files) == OPEN_FILES


def test_the_embedded_pool_opens():
    shards = ShardSet.open(["embedded:pool"])
    assert len(shards) == 639
    key, data = shards.read(638)
    assert key
    assert data[:2] == b"\xff\xd8"


def refused(*paths: object) -> str:
    with pytest.raises(UserError) as error:
        ShardSet.open([str(path) for path in paths])
    text = str(error.value)
    assert len(text.splitlines()) <= 3
    return text


def test_wrong_paths(tmp_path):
    assert "data.shards: empty" in refused()
    assert "no such file or folder" in refused(tmp_path / "absent")
    assert "no .tar in" in refused(tmp_path)
    assert "use a glob" in refused(tmp_path / "train-{000..010}.tar")
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "t.tar", {"k.png": picture(1)})
    assert f"did you mean {tmp_path / 'shards'}?" in refused(tmp_path)


def test_a_shard_cut_in_half_is_named(folder):
    tar = folder / "a-0.tar"
    tar.write_bytes(tar.read_bytes()[:1600])
    assert "a-0.tar is damaged: cut off" in refused(folder)
    assert "cut_off.tar is damaged" in refused(locate("embedded:corrupt/shards/cut_off.tar"))


def test_a_shard_shorter_than_its_index_is_named(folder):
    tar = folder / "a-0.tar"
    write_index(tar)
    tar.write_bytes(tar.read_bytes()[:1600])
    text = refused(folder)
    assert "a-0.tar has 1600 bytes" in text
    assert "a-0.idx" in text


def test_shards_without_images(tmp_path):
    tar = write_tar(tmp_path / "texts.tar", {"a.txt": b"a", "b.json": b"{}"})
    assert "no image in" in (text := refused(tar))
    assert "json, txt" in text
    write_tar(tar, {})
    assert "no image in" in refused(tar)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "photo.tar").write_bytes(picture(1) * 20)
    assert "photo.tar is damaged" in refused(tmp_path)
    (tmp_path / "photo.idx").write_bytes(b"not parquet")
    assert "photo.idx is no index of ours" in refused(tmp_path)


def test_an_index_of_something_else(folder):
    pq.write_table(pa.table({"name": ["x"]}), folder / "a-0.idx")
    assert "a-0.idx is no index of ours" in refused(folder)


def scans(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.scan"))


def counted(monkeypatch) -> list[Path]:
    """The tars that are scanned from now on."""
    seen = []

    def count_and_scan(path):
        seen.append(path)
        return scan_tar(path)

    monkeypatch.setattr("pretrain.data.shards.scan_tar", count_and_scan)
    return seen


def test_a_foreign_tar_is_scanned_once(tmp_path, monkeypatch):
    with webdataset.ShardWriter(str(tmp_path / "foreign-%02d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(8):
            writer.write({"__key__": f"{i:04d}", "png": picture(i)})
    seen = counted(monkeypatch)
    first = ShardSet.open([str(tmp_path)])
    assert len(seen) == 2
    again = ShardSet.open([str(tmp_path)])
    assert len(seen) == 2
    assert again.fingerprint == first.fingerprint
    assert [again.read(i) for i in range(8)] == [first.read(i) for i in range(8)]
    assert len(scans(tmp_path)) == 2
    assert all(name.startswith(".foreign-0") for name in scans(tmp_path))
    assert not list(tmp_path.glob("*.idx"))  # that name is for indices of ours


def test_a_changed_tar_is_scanned_again(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "t.tar", {"a.png": picture(1)})
    seen = counted(monkeypatch)
    assert len(ShardSet.open([str(tar)])) == 1
    write_tar(tar, {"a.png": picture(1), "b.png": picture(2)})
    assert len(ShardSet.open([str(tar)])) == 2
    os.utime(tar, ns=(0, 0))  # the same bytes at another time may be others
    assert len(ShardSet.open([str(tar)])) == 2
    assert len(seen) == 3
    assert len(scans(tmp_path)) == 1  # what was found of former states is gone


def test_scans_go_to_the_runs_folder_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    tars = [write_tar(tmp_path / "theirs" / f"{name}.tar", {f"{name}.png": picture(1)}) for name in "ab"]

    def refuse(path, table):
        if "theirs" in path.parts:
            raise PermissionError(13, "Permission denied")
        return write_table(path, table)

    monkeypatch.setattr("pretrain.data.shards.write_table", refuse)
    seen = counted(monkeypatch)
    for _ in range(2):
        assert len(ShardSet.open([str(tar) for tar in tars], index=tmp_path / "run" / "index")) == 2
    assert len(seen) == 2
    assert scans(tmp_path / "theirs") == []
    assert len(scans(tmp_path / "run" / "index")) == 2
    for _ in range(2):
        ShardSet.open([str(tars[0])])  # nowhere to keep it
    assert len(seen) == 4


def test_an_index_of_ours_stays_as_it_is(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "t.tar", {"a.png": picture(1)})
    index = write_index(tar)
    before, seen = index.read_bytes(), counted(monkeypatch)
    ShardSet.open([str(tmp_path)], index=tmp_path / "index")
    assert seen == []
    assert index.read_bytes() == before
    assert scans(tmp_path) == []


def test_the_images_of_the_package_are_left_alone():
    folder = locate("embedded:pool")
    before = sorted(folder.iterdir())
    ShardSet.open(["embedded:pool"])
    assert sorted(folder.iterdir()) == before
