"""Images in parquet files: rows as items, their other columns as sidecars, each row group read once."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import parquet
from curation.config import CurateConfig, DecodeConfig, SourceConfig
from curation.decoding import decode_stage
from curation.items import items_stage, list_items, read_bytes
from curation.rows import read_rows
from curation.shards import verify_shards, write_shards
from curation.stage import WHOLE, Stage
from runtime.errors import UserError
from runtime.files import locate
from runtime.tars import group_samples, scan_tar


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Ten images without defects."""
    return [path.read_bytes() for path in sorted(locate("embedded:seeds").rglob("*.jpg"))[:10]]


def listed(*paths) -> tuple[list[dict], list[str]]:
    table, problems = list_items(replace(CurateConfig(), source=SourceConfig(paths=tuple(map(str, paths)))))
    return table.to_pylist(), problems


def write(path: Path, columns: dict, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **settings)
    return path


@pytest.fixture
def hugging_face(tmp_path, pictures) -> Path:
    """As `datasets` writes images: a struct of bytes and path beside other columns, in several row groups."""
    images = [{"bytes": data, "path": f"img/{i}.jpg" if i else None} for i, data in enumerate(pictures)]
    columns = {
        "label": list(range(10)),
        "image": images,
        "caption": [f"ein Bär {i}" for i in range(10)],
        "score": [math.nan, *[0.5] * 9],
        "tags": [["a", "b"]] * 10,
        "raw": [b"binary"] * 10,
    }
    return write(tmp_path / "hf" / "train-00000-of-00001.parquet", columns, row_group_size=4)


def test_rows_are_items_and_their_other_columns_json(hugging_face, pictures):
    rows, problems = listed(hugging_face.parent)
    assert problems == []
    assert [row["key"] for row in rows] == [f"{i:08d}" for i in range(10)]
    assert [row["extension"] for row in rows] == ["", *["jpg"] * 9]
    assert {row["source"] for row in rows} == {str(hugging_face)}
    assert {row["source_name"] for row in rows} == {"hf"}
    for row, data in zip(rows, pictures, strict=True):
        assert row["length"] == len(data)
        assert read_bytes(row["source"], row["offset"], row["length"]) == data
    sidecars = [read_bytes(s["source"], s["offset"], s["length"]) for row in rows for s in row["sidecars"]]
    assert [row["sidecars"][0]["length"] for row in rows] == list(map(len, sidecars))
    assert json.loads(sidecars[0]) == {
        "label": 0, "image": None, "caption": "ein Bär 0", "score": None, "tags": ["a", "b"],
    }  # fmt: skip
    assert json.loads(sidecars[3])["image"] == "img/3.jpg"


def test_each_row_group_is_read_once_for_work_in_order(hugging_face, monkeypatch):
    rows, _ = listed(hugging_face)
    parquet._read_group.cache_clear()
    for row in rows:
        read_bytes(row["source"], row["offset"], row["length"])
        read_bytes(row["sidecars"][0]["source"], row["offset"], 0)
    assert parquet._read_group.cache_info().misses == 2 * 3  # images and sidecars of three row groups


def test_plain_binary_columns_by_name_and_by_content(tmp_path, pictures):
    named = write(tmp_path / "named.parquet", {"vector": [b"\0\1"] * 10, "png": pictures, "url": ["u"] * 10})
    found = write(tmp_path / "found.parquet", {"vector": [b"\0\1"] * 10, "content": pictures})
    large = write(tmp_path / "large.parquet", {"picture": pa.array(pictures, pa.large_binary())})
    for path, extension, sidecars in ((named, "png", 1), (found, "", 0), (large, "", 0)):
        rows, _ = listed(path)
        assert [read_bytes(row["source"], row["offset"], row["length"]) for row in rows] == pictures
        assert {row["extension"] for row in rows} == {extension}
        assert {len(row["sidecars"]) for row in rows} == {sidecars}


def test_rows_without_image_damaged_files_and_tables_of_numbers_are_reported(tmp_path, pictures, hugging_face):
    write(tmp_path / "hf" / "gaps.parquet", {"image": [pictures[0], None, b"", None]})
    write(tmp_path / "hf" / "numbers.parquet", {"x": [1], "y": [2]})
    data = hugging_face.read_bytes()
    (tmp_path / "hf" / "cut.parquet").write_bytes(data[: len(data) // 2])
    rows, problems = listed(tmp_path / "hf")
    assert len(rows) == 12
    lines = [line.removeprefix(f"{tmp_path}/hf/") for line in problems]
    assert lines[0].startswith("cut.parquet: not readable as parquet")
    assert lines[1:] == ["gaps.parquet: 2 of 4 rows without image (2 no bytes)"]
    with pytest.raises(UserError, match=r"no image in .*numbers\.parquet: no column of images among x, y"):
        listed(tmp_path / "hf" / "numbers.parquet")


def test_a_row_beyond_the_end_is_an_error_and_a_replaced_file_is_read_anew(tmp_path, pictures):
    path = write(tmp_path / "a.parquet", {"image": pictures})
    assert read_bytes(str(path), 0, 0) == pictures[0]
    write(path, {"image": pictures[1:3]})
    assert read_bytes(str(path), 0, 0) == pictures[1]
    with pytest.raises(OSError, match="no row 2 in a file of 2 rows"):
        read_bytes(str(path), 2, 0)


def curated(out: Path, *paths) -> tuple[list[dict], dict[str, dict[str, bytes]]]:
    """Items, and the members of the shards by key, of a run without near-duplicate search."""
    config = replace(CurateConfig(workers=0), source=SourceConfig(paths=tuple(map(str, paths))),
                     decode=DecodeConfig(min_side=1))  # fmt: skip
    items, decode = Stage(out, "items", {}), Stage(out, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    rows = read_rows(items, decode)
    write_shards(config, rows, rows.of("pool"), out / "shards", share=WHOLE, stop=None)
    assert verify_shards(out / "shards") == []
    samples = {}
    for tar in sorted((out / "shards").glob("*.tar")):
        data = tar.read_bytes()
        for sample in group_samples(scan_tar(tar)[0])[0]:
            samples[sample[0].key] = {m.extension: data[m.offset : m.offset + m.length] for m in sample}
    return rows.table.to_pylist(), samples


def test_rows_become_samples_of_shards_with_their_original_bytes(hugging_face, pictures, tmp_path):
    items, samples = curated(tmp_path / "out", hugging_face)
    good = [item for item in items if item["reason"] is None]
    assert len(good) == len(samples) == 10
    for item in good:
        sample = samples[item["item_id"]]
        assert json.loads(sample.pop("json"))["label"] == item["offset"]
        assert list(sample.values()) == [pictures[item["offset"]]]


def img2dataset_folder(folder: Path, pictures: list[bytes]) -> None:
    """A folder exactly as img2dataset 1.47 leaves it (output_format=webdataset), with two failures in shard 0."""
    import io
    import tarfile

    folder.mkdir(parents=True)
    for shard, number in ((0, 6), (1, 4)):
        table = {name: [] for name in ("url", "caption", "key", "status", "error_message", "width", "height",
                                       "original_width", "original_height", "exif", "sha256")}  # fmt: skip
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(number):
                key = f"{shard:05d}{i:04d}"
                status = "failed_to_download" if (shard, i) in ((0, 1), (0, 4)) else "success"
                values = {"url": f"http://x/{key}.jpg", "caption": f"picture {key}", "key": key, "status": status}
                values |= {"error_message": None if status == "success" else "HTTP Error 404: Not Found"}
                for name, column in table.items():
                    column.append(values.get(name))
                if status != "success":
                    continue
                members = {"jpg": pictures[6 * shard + i], "json": json.dumps(values).encode(),
                           "txt": values["caption"].encode()}  # fmt: skip
                for extension, data in members.items():
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size, entry.uname, entry.gname, entry.mode = len(data), "bigdata", "bigdata", 0o444
                    tar.addfile(entry, io.BytesIO(data))
        pq.write_table(pa.table(table), folder / f"{shard:05d}.parquet")
        stats = {"count": number, "successes": number - 2 * (shard == 0), "status_dict": {}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def test_a_folder_of_img2dataset_is_taken_as_it_is(tmp_path, pictures):
    folder = tmp_path / "laion"
    img2dataset_folder(folder, pictures)
    rows, problems = listed(folder)
    assert problems == [f"{folder}/00000.parquet: img2dataset did not get 2 of 6 images (2 failed_to_download)"]
    assert [row["key"] for row in rows] == [f"00000000{i}" for i in (0, 2, 3, 5)] + [f"00001000{i}" for i in range(4)]
    assert {row["source_name"] for row in rows} == {"laion"}
    items, samples = curated(tmp_path / "out", f"web={folder}")
    assert {item["source_name"] for item in items} == {"web"}
    good = [item for item in items if item["reason"] is None]
    for item in good:
        told = json.loads(samples[item["item_id"]]["json"])
        assert told["key"] == item["key"]
        assert samples[item["item_id"]]["txt"].decode() == told["caption"]
        assert told["url"].startswith("http://x/")


def test_img2dataset_without_its_tar_and_with_images_in_its_table(tmp_path, pictures):
    img2dataset_folder(tmp_path / "a", pictures)
    (tmp_path / "a" / "00001.tar").unlink()
    assert f"{tmp_path}/a/00001.parquet: img2dataset's table; its tar is missing" in listed(tmp_path / "a")[1]
    images = {"key": ["1", "2"], "url": ["u", "v"], "status": ["success", "failed_to_download"]}
    path = write(tmp_path / "b" / "00000.parquet", images | {"jpg": [pictures[0], None]})
    rows, problems = listed(path)
    assert [row["extension"] for row in rows] == ["jpg"]
    assert problems == [f"{path}: 1 of 2 rows without image (1 failed_to_download)"]
