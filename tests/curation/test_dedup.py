from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from curation.config import CurateConfig
from curation.dedup import dedup_stage, read_copies, strength
from curation.exact import SCHEMA
from curation.rows import Rows
from curation.stage import Stage
from runtime.files import write_table

# A chain 0-1-2-3-4 of near-duplicates, the better the smaller; 5 has 2's pixels, 6 looks like 1; 7 is alone.
CHAIN = [(0, 1, 0.95, 0.9), (1, 2, 0.9, 0.8), (2, 3, 0.85, 0.95), (3, 4, 0.7, 0.75), (0, 4, 0.65, 0.2)]


@pytest.fixture
def rows() -> Rows:
    count = 8
    return Rows(
        table=pa.table({}),
        role=np.full(count, "pool"),
        good=np.ones(count, dtype=bool),
        ids=np.array([str(row) for row in range(count)]),
        area=100 - np.arange(count),
        num_bytes=np.full(count, 10),
        phash=np.zeros((count, 2), dtype=np.uint64),
    )


@pytest.fixture
def exact(tmp_path) -> Stage:
    stage = Stage(tmp_path, "exact", {})
    table = pa.table({"row": [5, 6], "of": [2, 1], "reason": ["same pixels", "same look"]}, schema=SCHEMA)
    write_table(stage.file("duplicates.parquet"), table)
    return stage


def proposed(folder, *, scored: bool) -> Stage:
    stage = Stage(folder, "verify" if scored else "join", {})
    row_a, row_b, cosine, score = zip(*CHAIN, strict=True)
    columns = {"row_a": row_a, "row_b": row_b, "cosine": np.float32(cosine)} | (
        {"score": np.float32(score)} if scored else {}
    )
    write_table(stage.file("pool.parquet"), pa.table(columns))
    return stage


def config(groups: str, *, verify: bool) -> CurateConfig:
    dedup = replace(CurateConfig().dedup, groups=groups, verify=verify, threshold=0.6, verify_threshold=0.74)
    return replace(CurateConfig(), dedup=dedup)


def groups_of(stage: Stage) -> dict[int, int]:
    table = stage.table("groups.parquet").to_pydict()
    return dict(zip(table["row"], table["of"], strict=True))


def test_components_keep_one_of_a_chain(tmp_path, rows, exact):
    stage = Stage(tmp_path, "dedup", {})
    dedup_stage(config("components", verify=True), rows, exact, proposed(tmp_path, scored=True), stage)
    assert groups_of(stage) == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0}
    counts = stage.report()["counts"]
    assert (counts["in"], counts["out"], counts["largest_group"]) == (6, 2, 7)
    # 2, 3 and 4 have no edge to 0, nor has 5, which is 2 again; 6 has one to 1 only.
    found = counts["groups"]["components"]
    assert (found["removed"], found["unsupported"]) == (6, 5)


def test_leaders_keep_an_image_for_each_that_goes(tmp_path, rows, exact):
    stage = Stage(tmp_path, "dedup", {})
    dedup_stage(config("leader", verify=True), rows, exact, proposed(tmp_path, scored=True), stage)
    assert groups_of(stage) == {1: 0, 3: 2, 5: 2, 6: 0}
    counts = stage.report()["counts"]
    assert (counts["in"], counts["out"]) == (6, 4)
    assert counts["groups"]["leader"] == {
        "out": 4, "removed": 4, "unsupported": 1, "share": 0.25, "without_edge_to_any_kept": 1,
    }  # fmt: skip
    assert counts["groups"]["components"]["out"] == 2  # both are told, whichever was asked for


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("groups", ["components", "leader"])
def test_the_survivor_curve_meets_the_run(tmp_path, rows, exact, groups, verify):
    stage = Stage(tmp_path, "dedup", {})
    chosen = config(groups, verify=verify)
    dedup_stage(chosen, rows, exact, proposed(tmp_path, scored=verify), stage)
    counts = stage.report()["counts"]
    assert set(counts["survivors"]) == ({"cosine", "score"} if verify else {"cosine"})
    axis, threshold = ("score", 0.75) if verify else ("cosine", 0.6)  # no score lies between 0.74 and 0.75
    assert dict(map(tuple, counts["survivors"][axis][groups]))[threshold] == counts["out"]
    table = stage.table("survivors.parquet")
    steps = [row for row in table.to_pylist() if row["axis"] == "cosine" and row["groups"] == "components"]
    assert [(round(row["threshold"], 2), row["survivors"]) for row in steps] == [
        (0.7, 2),
        (0.85, 3),
        (0.9, 4),
        (0.95, 5),
    ]


def test_strength_is_the_score_where_pictures_were_compared():
    table = pa.table({"cosine": np.float32([0.5, 0.75]), "score": pa.array([0.25, None], pa.float32())})
    assert strength(table).tolist() == [0.25, 0.75]


def test_copies_of_copies_stand_under_the_row_that_remains(tmp_path):
    stage = Stage(tmp_path, "exact", {})
    reasons = ["same bytes", "same look", "same pixels"]
    table = pa.table({"row": [3, 2, 4], "of": [2, 1, 0], "reason": reasons}, schema=SCHEMA)
    write_table(stage.file("duplicates.parquet"), table)
    copies = read_copies(stage, 5)
    assert copies.stands.tolist() == [0, 1, 1, 1, 0]
    assert copies.alike.tolist() == [False, False, True, True, False]
