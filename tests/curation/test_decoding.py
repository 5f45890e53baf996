import csv
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from curation.config import CurateConfig, DecodeConfig, SourceConfig
from curation.decoding import THUMB, decode_stage
from curation.items import items_stage, list_items
from curation.rows import Rows, read_rows, read_thumbs, thumb_files
from curation.stage import WHOLE, Stage
from runtime.errors import UserError
from runtime.files import locate


def decoded(out: Path, config: CurateConfig) -> tuple[Rows, Stage]:
    items, decode = Stage(out, "items", {}), Stage(out, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    return read_rows(items, decode), decode


def config_of(*paths, **options) -> CurateConfig:
    source = SourceConfig(paths=tuple(map(str, paths)), part_size=options.pop("part_size", 1024))
    return replace(CurateConfig(device="cpu", workers=0), source=source, **options)


def test_odd_files_become_rows_as_their_truth_says(tmp_path):
    rows, _ = decoded(tmp_path, config_of("embedded:corrupt/files", decode=DecodeConfig(min_side=1)))
    found = {row["key"]: row for row in rows.table.to_pylist()}
    with locate("embedded:corrupt/truth.csv").open(newline="") as file:
        truth = list(csv.DictReader(file))
    assert len(found) == len(truth) == 22
    for row in truth:
        assert found[row["file"]]["reason"] == (row["reason"] or None)
        assert found[row["file"]]["item_id"] == row["sha256"][:32]
        if row["width"]:
            assert (found[row["file"]]["width"], found[row["file"]]["height"]) == (
                int(row["width"]),
                int(row["height"]),
            )
        assert (found[row["file"]]["detail"] is None) == (row["reason"] == "")


def test_small_and_unreadable_images_have_their_own_reasons(tmp_path):
    (tmp_path / "heap").mkdir()
    good = locate("embedded:corrupt/files/baseline.jpg").read_bytes()
    (tmp_path / "heap" / "good.jpg").write_bytes(good)
    (tmp_path / "heap" / "small.png").write_bytes(locate("embedded:corrupt/files/one_pixel.png").read_bytes())
    with open(os.fsencode(tmp_path / "heap") + b"/\xff.jpg", "wb") as file:
        file.write(good)
    rows, _ = decoded(tmp_path / "out", config_of(tmp_path / "heap"))
    reasons = {row["key"]: row["reason"] for row in rows.table.to_pylist()}
    assert reasons == {"good.jpg": None, "small.png": "too small", "\\udcff.jpg": "unreadable"}
    assert rows.of("pool").tolist() == [1]


def test_parts_and_workers_change_nothing(tmp_path):
    one, stage = decoded(tmp_path / "one", config_of("embedded:corrupt/files", "embedded:seeds"))
    many, others = decoded(
        tmp_path / "many", replace(config_of("embedded:seeds", "embedded:corrupt/files", part_size=7), workers=2)
    )
    assert one.table.equals(many.table)
    everything = np.arange(len(one.ids))
    thumbs = read_thumbs(thumb_files(stage), everything)
    assert thumbs.shape == (len(one.ids), THUMB, THUMB)
    np.testing.assert_array_equal(thumbs, read_thumbs(thumb_files(others), everything))
    order = np.random.default_rng(0).permutation(everything)[:20]
    np.testing.assert_array_equal(thumbs[order], read_thumbs(thumb_files(others), order))
    assert not thumbs[~one.good].any()
    assert thumbs[one.good].any(axis=(1, 2)).all()


def test_no_usable_image_is_an_error_that_says_why(tmp_path):
    (tmp_path / "heap").mkdir()
    (tmp_path / "heap" / "a.jpg").write_text("<html>")
    with pytest.raises(UserError, match=r"none of 1 images can be used\n  the first: HTML page"):
        decoded(tmp_path / "out", config_of(tmp_path / "heap"))


def test_an_image_that_kills_its_decoder_again_and_again_is_rejected(tmp_path):
    """The decoder is made to hang on a pipe in place of an image, and killed every time."""
    heap = tmp_path / "heap"
    heap.mkdir()
    good = locate("embedded:corrupt/files/baseline.jpg").read_bytes()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (heap / name).write_bytes(good)
    config = replace(config_of(heap), workers=1)
    items, decode = Stage(tmp_path / "out", "items", {}), Stage(tmp_path / "out", "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    (heap / "b.jpg").unlink()
    os.mkfifo(heap / "b.jpg")
    finished = threading.Event()
    seen: dict[int, int | None] = {}

    def standing(worker: int, journal: Path) -> int | None:
        """When the worker began with the second image; None if it has not, or if another wrote the journal."""
        try:
            begun, born = journal.stat().st_mtime_ns, Path(f"/proc/{worker}").stat().st_mtime_ns
            return begun if begun > born and journal.read_bytes().startswith(b"1 ") else None
        except FileNotFoundError:
            return None

    def kill_whoever_reads() -> None:
        while not finished.is_set():
            time.sleep(0.3)  # who still stands at the second image after this hangs on the pipe
            for worker in children(os.getpid()):
                before, seen[worker] = seen.get(worker), standing(worker, decode.folder / "part-00000.now")
                if before is not None and before == seen[worker]:
                    os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_whoever_reads)
    killer.start()
    try:
        decode_stage(config, items, decode, None, WHOLE)
    finally:
        finished.set()
        killer.join()
    table = decode.table().to_pylist()
    assert [row["reason"] for row in table] == [None, "corrupt", None]
    assert "died" in table[1]["detail"]


def children(parent: int) -> list[int]:
    """Process ids of spawned workers of a process."""
    found = subprocess.run(
        ["pgrep", "-P", str(parent), "-f", "spawn_main"], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]
