"""Scores of many pairs: in parts, by any number of threads, and done again only where they must be."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation import scoring
from curation.config import CurateConfig, SourceConfig
from curation.decoding import decode_stage
from curation.items import items_stage, list_items
from curation.rows import Rows, read_rows
from curation.scoring import score_pairs
from curation.stage import WHOLE, Stage
from runtime.errors import Stopped
from runtime.signals import StopRequest


@pytest.fixture(scope="module")
def config() -> CurateConfig:
    return replace(CurateConfig(device="cpu", workers=0), source=SourceConfig(paths=("embedded:seeds",), part_size=10))


@pytest.fixture(scope="module")
def decoded(config, tmp_path_factory) -> tuple[Rows, Stage]:
    out = tmp_path_factory.mktemp("out")
    items, decode = Stage(out, "items", {}), Stage(out, "decode", {})
    items.open()
    items_stage(config, items, *list_items(config))
    decode_stage(config, items, decode, None, WHOLE)
    return read_rows(items, decode), decode


def stage_in(folder: Path) -> Stage:
    stage = Stage(folder, "dedup", {})
    stage.open()
    return stage


PAIRS = np.argwhere(np.triu(np.ones((32, 32)), 1))


def test_scores_do_not_depend_on_threads_and_finished_parts_are_read_back(config, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "UNIT", 100)
    one, many = stage_in(tmp_path / "one"), stage_in(tmp_path / "many")
    scores = score_pairs(config, *decoded, PAIRS, one, None)
    assert scores.shape == (len(PAIRS),)
    np.testing.assert_array_equal(score_pairs(replace(config, workers=3), *decoded, PAIRS, many, None), scores)
    assert len(list(one.folder.glob("part-*.parquet"))) == 5
    monkeypatch.setattr(scoring, "score_unit", lambda unit: pytest.fail("was there already"))
    np.testing.assert_array_equal(score_pairs(config, *decoded, PAIRS, one, None), scores)


def test_parts_of_other_pairs_are_done_again(config, decoded, tmp_path):
    stage = stage_in(tmp_path)
    score_pairs(config, *decoded, PAIRS[:40], stage, None)
    expected = score_pairs(config, *decoded, PAIRS[40:80], stage_in(tmp_path / "fresh"), None)
    np.testing.assert_array_equal(score_pairs(config, *decoded, PAIRS[40:80], stage, None), expected)
    assert pq.read_table(stage.part(0))["row_b"].to_pylist() == PAIRS[40:80, 1].tolist()


def test_no_pairs_no_parts(config, decoded, tmp_path):
    stage = stage_in(tmp_path)
    assert score_pairs(config, *decoded, PAIRS[:0], stage, None).shape == (0,)
    assert not list(stage.folder.glob("part-*"))


def test_a_stop_request_keeps_what_is_finished(config, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "UNIT", 100)
    stage, stop = stage_in(tmp_path), StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(Stopped):
        score_pairs(config, *decoded, PAIRS, stage, stop)
    assert 1 <= len(list(stage.folder.glob("part-*.parquet"))) < 5
