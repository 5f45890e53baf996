import pyarrow as pa

from curation.stage import Stage
from runtime.files import write_table


def test_parts_of_the_same_inputs_stay_and_those_of_others_go(tmp_path):
    stage = Stage(tmp_path, "decode", {"side": 1})
    stage.open()
    write_table(stage.part(0), pa.table({"a": [1]}))
    assert not stage.done
    again = Stage(tmp_path, "decode", {"side": 1})
    again.open()
    assert again.part(0).is_file()
    again.finish(images=1)
    assert again.done
    assert again.report()["counts"] == {"images": 1}
    other = Stage(tmp_path, "decode", {"side": 2})
    assert not other.done
    other.open()
    assert not other.part(0).is_file()


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    stage = Stage(tmp_path, "decode", {})
    stage.open()
    leftover = stage.folder / ".part-00000.parquet.4711.tmp"
    leftover.write_bytes(b"half")
    stage.open()
    assert not leftover.exists()


def test_parts_are_read_in_order(tmp_path):
    stage = Stage(tmp_path, "items", {})
    stage.open()
    for index in (2, 0, 1):
        write_table(stage.part(index), pa.table({"a": [index]}))
    assert stage.table()["a"].to_pylist() == [0, 1, 2]
