import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.config import CurateConfig, DedupConfig, GuardConfig
from curation.propose import index_stage, join_stage
from curation.rows import Rows
from curation.stage import WHOLE, Share, Stage
from curation.threshold import Blocks
from runtime.files import write_array, write_table

NUM_POOL, NUM_GUARD, DIM = 400, 30, 32
ROWS = NUM_POOL + NUM_GUARD
METHODS = ("exact", "knn", "ivf", "ivf_pq")


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """float16 vectors: 300 others, 100 near some of them; then evaluation images, half of them near the pool's."""
    draw = np.random.default_rng(0)
    values = draw.standard_normal((ROWS, DIM))
    values[300:400] = values[draw.integers(0, 300, 100)] + 0.5 * draw.standard_normal((100, DIM))
    values[400:415] = values[draw.integers(0, 300, 15)] + 0.7 * draw.standard_normal((15, DIM))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def embed(values, tmp_path, monkeypatch) -> Stage:
    """A finished stage of three parts; and blocks so small that there are many units."""
    monkeypatch.setattr("curation.threshold.CPU_BLOCKS", Blocks(left=64, right=50, tile=16))
    monkeypatch.setattr("curation.planner.UNIT_SECONDS", 1e-6)
    monkeypatch.setattr("curation.planner.IMBALANCE", 1e4)  # and many cells
    monkeypatch.setattr("curation.planner.EXPECTED_PROBES", 1)
    stage = Stage(tmp_path, "embed", {})
    stage.open()
    for part, rows in enumerate(np.split(np.arange(ROWS), [100, 250])):
        write_array(stage.folder / f"part-{part:05d}-copy.npy", values[rows])
        write_table(stage.part(part), pa.table({"row": rows}))
    stage.finish()
    return stage


@pytest.fixture
def rows() -> Rows:
    return Rows(
        table=pa.table({}),
        role=np.repeat(["pool", "guard"], [NUM_POOL, NUM_GUARD]),
        good=np.ones(ROWS, dtype=bool),
        ids=np.array([f"{row:04x}" for row in range(ROWS)]),
        area=np.ones(ROWS, dtype=np.int64),
        num_bytes=np.ones(ROWS, dtype=np.int64),
        phash=np.zeros((ROWS, 2), dtype=np.uint64),
    )


def settings(**dedup) -> CurateConfig:
    base = CurateConfig(device="cpu", workers=2, guard=GuardConfig(threshold=0.6, k=8))
    return replace(base, dedup=replace(DedupConfig(threshold=0.7, k=8, verify=False), **dedup))


def join(config: CurateConfig, rows: Rows, embed: Stage, out: Path, shares: tuple[Share, ...] = ()) -> Stage:
    index, stage, chosen = Stage(out, "index", {}), Stage(out, "join", {}), np.arange(NUM_POOL)
    index_stage(config, rows, embed, chosen, index)
    stage.open()
    for share in (*shares, WHOLE):
        join_stage(config, rows, embed, index, chosen, stage, None, share)
    return stage


def pairs_of(stage: Stage, name: str) -> list[tuple[int, int]]:
    table = stage.table(f"{name}.parquet")
    return list(zip(table["row_a"].to_pylist(), table["row_b"].to_pylist(), strict=True))


def brute_force(values: np.ndarray, threshold: float) -> np.ndarray:
    values = values.astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values @ values.T >= threshold


@pytest.mark.parametrize("method", METHODS)
def test_every_method_proposes_the_pairs_and_says_what_it_missed(method, values, rows, embed, tmp_path):
    stage = join(settings(join=method), rows, embed, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "stages" / "index" / "plan.json").read_text())
    assert plan["pool"]["method"] == method
    assert f"dedup.join asks for {method}" in plan["pool"]["reasons"][-1]
    there = np.argwhere(np.triu(brute_force(values[:NUM_POOL], 0.7), 1))
    found = pairs_of(stage, "pool")
    assert set(found) <= set(map(tuple, there.tolist()))
    assert found == sorted(set(found))
    recall = stage.report()["counts"]["pair_recall"]
    assert (recall["pairs"], recall["found"]) == (len(there), len(found))  # all rows are in the sample
    assert recall["recall"] == 1 if method in ("exact", "knn") else recall["recall"] >= 0.95
    leaks = np.argwhere(brute_force(values, 0.6)[NUM_POOL:, :NUM_POOL]) + [NUM_POOL, 0]
    assert len(leaks) >= 10
    assert pairs_of(stage, "guard") == list(map(tuple, leaks.tolist()))


@pytest.mark.parametrize("method", METHODS)
def test_shares_give_the_same_bytes(method, rows, embed, tmp_path):
    config = settings(join=method)
    whole = join(config, rows, embed, tmp_path / "a")
    assert len(list(whole.folder.glob("part-*"))) >= 4
    shared = join(replace(config, workers=0), rows, embed, tmp_path / "b", (Share(1, 3), Share(0, 3), Share(2, 3)))
    for name in ("pool", "guard"):
        assert shared.file(f"{name}.parquet").read_bytes() == whole.file(f"{name}.parquet").read_bytes()


def test_more_pairs_than_neighbours_means_a_graph_of_neighbours(rows, embed, tmp_path, capsys):
    config = settings(threshold=-1.0, k=2)
    config = replace(config, guard=replace(config.guard, threshold=-1.0, k=2))
    stage = join(config, rows, embed, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "stages" / "index" / "plan.json").read_text())
    assert (plan["pool"]["method"], plan["guard"]) == ("knn", "knn")
    assert plan["expected_pairs"] == pytest.approx(NUM_POOL * (NUM_POOL - 1) / 2, rel=0.01)
    assert NUM_POOL <= len(pairs_of(stage, "pool")) <= 2 * NUM_POOL
    assert NUM_POOL <= len(pairs_of(stage, "guard")) <= 2 * ROWS
    said = capsys.readouterr().err
    assert "so nearest neighbours only" in said
    assert "so the 2 nearest are taken" in said
