"""`troodon index` from the command line."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from runtime.errors import EXIT_DONE, EXIT_USER
from runtime.files import write_array
from tools.cli import main


@pytest.fixture
def vectors(tmp_path):
    values = np.random.default_rng(0).normal(size=(600, 16)).astype(np.float16)
    for part in range(2):
        write_array(tmp_path / "vectors" / f"part-{part:05d}-copy.npy", values[300 * part : 300 * (part + 1)])
    return tmp_path / "vectors"


def test_build_info_search_add_and_merge(vectors, tmp_path, capfd):
    index = tmp_path / "index"
    assert main(["index", "build", str(vectors), str(index), "--kind", "ivf", "--target-recall", "0.9"]) == EXIT_DONE
    out = capfd.readouterr().out
    assert "vectors  600 of width 16" in out
    assert "95 % interval" in out
    assert main(["index", "info", str(index), "--json"]) == EXIT_DONE
    info = json.loads(capfd.readouterr().out)
    assert info["recall"]["recall_at_10"] >= 0.9
    found = tmp_path / "found.parquet"
    search = ["index", "search", str(index), str(vectors / "part-00001-copy.npy"), "--k", "3", "--out", str(found)]
    assert main(search) == EXIT_DONE
    assert capfd.readouterr().out.strip() == str(found)
    first = pq.read_table(found, filters=[("rank", "=", 0)])
    assert first["id"].to_pylist() == list(range(300, 600))
    assert main(["index", "add", str(index), str(vectors), str(tmp_path / "twice"), "--json"]) == EXIT_DONE
    assert json.loads(capfd.readouterr().out)["vectors"] == 1200
    assert main(["index", "merge", str(index), str(index), str(tmp_path / "merged")]) == EXIT_DONE
    assert "1200 of width 16" in capfd.readouterr().out


def test_lists_on_disk_leave_stdout_to_results(vectors, tmp_path, capfd):
    build = ["index", "build", str(vectors), str(tmp_path / "index"), "--on-disk", "--json"]
    assert main(build) == EXIT_DONE
    assert json.loads(capfd.readouterr().out)["on_disk"]
    assert main(["index", "info", str(tmp_path / "index")]) == EXIT_DONE
    assert capfd.readouterr().out.count("\n") == 6


def test_a_mistake_is_the_users_and_leaves_nothing(vectors, tmp_path, capfd):
    out = tmp_path / "index"
    assert main(["index", "build", str(vectors), str(out), "--kind", "hnsw", "--on-disk"]) == EXIT_USER
    assert main(["index", "build", str(vectors), str(out), "--factory", "Nonsense"]) == EXIT_USER
    assert main(["index", "build", str(tmp_path / "none"), str(out)]) == EXIT_USER
    assert "no such folder" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vectors"]
