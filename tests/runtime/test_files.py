"""Files are complete or absent, and the same content gives the same bytes."""

import hashlib
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest

from runtime.errors import UserError
from runtime.files import (
    human_bytes,
    locate,
    read_json,
    replacing,
    require_space,
    sha256,
    write_array,
    write_json,
    write_table,
    write_text,
)


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename does not cross file systems
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_folders_are_replaced_too(tmp_path):
    def make(fails):
        with replacing(tmp_path / "export") as temporary:
            temporary.mkdir()
            (temporary / "model").write_text("weights")
            if fails:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make(fails=True)
    assert os.listdir(tmp_path) == []
    make(fails=False)
    assert (tmp_path / "export" / "model").read_text() == "weights"


def test_what_a_kill_leaves_behind_has_another_name(tmp_path):
    context = replacing(tmp_path / "part-0.parquet")
    temporary = context.__enter__()
    temporary.write_text("half")
    assert [path.name for path in tmp_path.glob("*.parquet")] == []
    context.__exit__(None, None, None)
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["part-0.parquet"]


def test_same_content_same_bytes(tmp_path):
    table = pa.table({"id": ["a", "b"], "score": pa.array([0.5, None], pa.float32())})
    for name in ("one", "two"):
        write_table(tmp_path / f"{name}.parquet", table)
        write_array(tmp_path / f"{name}.npy", np.arange(6, dtype=np.float16).reshape(2, 3))
        write_json(tmp_path / f"{name}.json", {"b": 1, "a": [1.5, None]})
    for kind in ("parquet", "npy", "json"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    assert read_json(tmp_path / "one.json") == {"b": 1, "a": [1.5, None]}
    assert np.load(tmp_path / "one.npy").dtype == np.float16


def test_sha256(tmp_path):
    write_text(tmp_path / "a", "abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_embedded_paths_lead_to_the_shipped_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # from anywhere
    assert (locate("embedded:pool") / "quick-0000.tar").is_file()
    assert str(locate("some/folder")) == "some/folder"
    assert locate("~/x").is_absolute()


def test_too_little_space_is_said_before_work_starts(tmp_path):
    require_space(tmp_path / "not" / "there" / "yet", 1, what="a byte")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"out: 3 checkpoints needs about .* are free"):
        require_space(tmp_path, 2 * free + 10**12, what="3 checkpoints")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (4_400_000, "4.4 MB"), (2.5e12, "2.5 TB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text
