import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from curation.config import CurateConfig, GuardConfig, SeedsConfig, SourceConfig
from curation.items import list_items, read_bytes
from runtime.errors import UserError


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def listed(*paths, **groups) -> tuple[list[dict], list[str]]:
    config = replace(CurateConfig(), source=SourceConfig(paths=tuple(map(str, paths))), **groups)
    table, problems = list_items(config)
    return table.to_pylist(), problems


@pytest.fixture
def heap(tmp_path) -> Path:
    for name in ("b.jpg", "deep/er/a.PNG", "deep/noextension", "notes.md", ".hidden.jpg", "b.json", "deep/alone.txt"):
        (tmp_path / "heap" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "heap" / name).write_bytes(name.encode())
    write_tar(tmp_path / "heap" / "t.tar", {"1.jpg": b"one", "1.json": b"{}", "1.seg.png": b"s", "2.json": b"{}"})
    return tmp_path / "heap"


def test_folders_and_the_tars_in_them_are_listed(heap):
    rows, problems = listed(heap)
    assert [(row["source"].removeprefix(f"{heap}/"), row["key"]) for row in rows] == [
        ("b.jpg", "b.jpg"),
        ("deep/er/a.PNG", "deep/er/a.PNG"),
        ("deep/noextension", "deep/noextension"),
        ("t.tar", "1"),
    ]
    assert [[side["extension"] for side in row["sidecars"]] for row in rows] == [["json"], [], [], ["json", "seg.png"]]
    assert problems == [f"{heap}/t.tar: 2: no image among .json"]


def test_bytes_are_read_where_the_table_says(heap):
    rows, _ = listed(heap)
    found = [read_bytes(row["source"], row["offset"], row["length"]) for row in rows]
    assert found == [b"b.jpg", b"deep/er/a.PNG", b"deep/noextension", b"one"]
    sidecars = [read_bytes(s["source"], s["offset"], s["length"]) for row in rows for s in row["sidecars"]]
    assert sidecars == [b"b.json", b"{}", b"s"]


def test_the_order_of_sources_does_not_matter_and_nothing_is_listed_twice(heap):
    expected = listed(heap)
    paths = [heap / "t.tar", heap / "deep", heap]
    rows, _ = listed(*paths)
    assert sorted(row["offset"] for row in rows) == sorted(row["offset"] for row in expected[0])
    assert listed(heap / "deep", heap / "t.tar") == listed(heap / "t.tar", heap / "deep")


def test_globs_and_single_files(heap):
    assert [row["key"] for row in listed(f"{heap}/*.tar")[0]] == ["1"]
    assert [row["source"] for row in listed(heap / "b.jpg")[0]] == [f"{heap}/b.jpg"]


def test_links_to_nothing_are_reported_and_links_to_files_followed(heap):
    os.symlink(heap / "nowhere", heap / "link.jpg")
    os.symlink(heap / "b.jpg", heap / "again.jpg")
    rows, problems = listed(heap)
    assert f"{heap}/link.jpg: link to nothing" in problems
    assert len(rows) == 4  # again.jpg is b.jpg


def test_a_name_that_is_not_text_can_still_be_listed(heap):
    with open(os.fsencode(heap) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    assert any("\\udcff" in row["key"] for row in listed(heap)[0])


def test_roles_and_sets(heap, tmp_path):
    for name in ("cats/1.jpg", "dogs/1.jpg", "2.jpg"):
        (tmp_path / "seeds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "seeds" / name).write_bytes(b"x")
    seeds = SeedsConfig(paths=(str(tmp_path / "seeds"),))
    rows, _ = listed(heap, seeds=seeds, guard=GuardConfig(paths=(str(heap / "deep"),)))
    assert [row["set"] for row in rows if row["role"] == "seed"] == ["seeds", "cats", "dogs"]
    assert sum(row["role"] == "guard" for row in rows) == 2


@pytest.mark.parametrize(
    ("group", "expected"), [("source", "source.paths: "), ("seeds", "seeds.paths: "), ("guard", "guard.paths: ")]
)
def test_missing_and_empty_folders_are_errors_that_name_the_field(heap, tmp_path, group, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").touch()
    kind = {"source": SourceConfig, "seeds": SeedsConfig, "guard": GuardConfig}[group]
    base = replace(CurateConfig(), source=SourceConfig(paths=(str(heap),)))
    with pytest.raises(UserError, match=f"{expected}.*no such folder"):
        list_items(replace(base, **{group: kind(paths=(str(tmp_path / "absent"),))}))
    with pytest.raises(UserError, match=f"{expected}no image in .*1 other file"):
        list_items(replace(base, **{group: kind(paths=(str(tmp_path / "empty"),))}))


def test_no_source_and_compressed_tars_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"source\.paths: empty"):
        list_items(CurateConfig())
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b....")
    with pytest.raises(UserError, match=r"gunzip -k"):
        listed(tmp_path)


def test_evaluation_sets_may_share_a_name_and_sources_may_not(tmp_path):
    for name in ("a/val", "b/val"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    paths = tuple(str(tmp_path / name) for name in ("a/val", "b/val"))
    rows, _ = listed(f"mine={paths[0]}", guard=GuardConfig(paths=paths))
    assert [(row["role"], row["source_name"]) for row in rows] == [("guard", "val"), ("guard", "val"), ("pool", "mine")]
    with pytest.raises(UserError, match="are both called 'val'"):
        listed(*paths)
