import numpy as np
import pyarrow as pa
import pytest

from curation.embeddings import open_embeddings
from runtime.errors import UserError
from runtime.files import write_array, write_table


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in enumerate((5, 3)):
        for name in ("copy", "retrieval"):
            write_array(tmp_path / f"part-{part:05d}-{name}.npy", generator.normal(size=(count, 4)).astype(np.float16))
        write_table(tmp_path / f"part-{part:05d}.parquet", pa.table({"row": np.arange(count) + 10 * part}))
    return tmp_path


def test_parts_follow_each_other_as_unit_vectors(folder):
    embeddings = open_embeddings(str(folder), "copy")
    stored = np.concatenate([np.load(folder / f"part-{part:05d}-copy.npy") for part in (0, 1)]).astype(np.float32)
    expected = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    assert (len(embeddings), embeddings.dim) == (8, 4)
    assert np.array_equal(np.concatenate(list(embeddings.chunks())), expected)
    assert np.array_equal(np.concatenate(list(embeddings.chunks(3, 7))), expected[3:7])
    assert np.array_equal(embeddings.read(np.array([7, 0])), expected[[7, 0]])
    assert embeddings.names().to_pylist() == [0, 1, 2, 3, 4, 10, 11, 12]


def test_item_ids_name_the_vectors_where_tables_have_them(folder):
    for part, count in enumerate((5, 3)):
        table = pa.table({"row": np.arange(count), "item_id": [f"{part}{i}" for i in range(count)]})
        write_table(folder / f"part-{part:05d}.parquet", table)
    assert open_embeddings(str(folder), "copy").names().to_pylist()[-2:] == ["11", "12"]


def test_matrices_of_any_name_have_positions_only(tmp_path):
    write_array(tmp_path / "b.npy", np.ones((2, 3), dtype=np.float32))
    write_array(tmp_path / "a.npy", np.eye(3))
    embeddings = open_embeddings(str(tmp_path))
    assert embeddings.read(slice(0, 3)).tolist() == np.eye(3).tolist()
    assert embeddings.names() is None
    assert len(open_embeddings(str(tmp_path / "b.npy"))) == 2


def test_a_part_without_table_gives_positions(folder):
    (folder / "part-00001.parquet").unlink()
    assert open_embeddings(str(folder), "copy").names() is None


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (lambda folder: None, None, "choose with --vectors NAME, one of: copy, retrieval"),
        (lambda folder: None, "clip", "no vectors called 'clip'; there are: copy, retrieval"),
        (lambda folder: [file.unlink() for file in folder.glob("*.npy")], None, "no .npy file"),
        (lambda folder: write_array(folder / "part-00001-copy.npy", np.ones((3, 5), np.float16)), "copy", "5 numbers"),
        (lambda folder: write_array(folder / "part-00001-copy.npy", np.ones(3)), "copy", "a matrix of floats"),
        (lambda folder: write_array(folder / "part-00001-copy.npy", np.ones((4, 4))), "copy", "3 rows beside 4"),
        (lambda folder: (folder / "part-00001-copy.npy").write_bytes(b"no"), "copy", "not a whole .npy"),
    ],
)
def test_what_is_wrong_is_said(folder, spoil, name, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        open_embeddings(str(folder), name)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        open_embeddings(str(tmp_path / "none"))


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_a_vector_without_direction_is_named(tmp_path, value):
    values = np.ones((6, 3), dtype=np.float32)
    values[4] = value
    write_array(tmp_path / "a.npy", values)
    with pytest.raises(UserError, match="vector 4 is zero or not finite"):
        list(open_embeddings(str(tmp_path)).chunks())
