"""The selection: neighbours against a slow search, whose bytes count as whose, mixtures, and every refusal."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.clusters import kmeans
from curation.config import (
    ClusterConfig,
    CurateConfig,
    HierarchicalConfig,
    MixtureConfig,
    RetrievalConfig,
    SeedsConfig,
    SourceConfig,
)
from curation.embed import Embedded
from curation.manifest import read_manifest
from curation.retrieve import check_retrieval, retrieve_stage
from curation.rows import Rows
from curation.run import curate
from curation.selection import memory_bytes
from curation.shards import verify_shards
from curation.stage import Stage
from curation.unit_vectors import UnitVectors
from runtime.errors import UserError

NUM_POOL, NUM_SEEDS = 400, 30
POOL = np.arange(NUM_POOL)


@pytest.fixture
def world() -> tuple[Rows, Embedded]:
    """A pool of two sources around 8 directions, the first of them crowded; seeds near three of them, in two sets.

    Rows 0..399 are the pool, then come the seeds. The bytes of the first two seeds are those of pool images 7 and 8.
    """
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(8, 16))
    concept = np.concatenate([np.repeat(np.arange(8), [225] + [25] * 7), np.repeat([1, 2, 3], 10)])
    values = directions[concept] + 0.4 * rng.normal(size=(len(concept), 16))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    ids = np.array([f"{number:08x}" for number in rng.permutation(len(concept)) * 997])
    ids[[NUM_POOL, NUM_POOL + 1]] = ids[[7, 8]]
    values[[NUM_POOL, NUM_POOL + 1]] = values[[7, 8]]
    role = np.array(["pool"] * NUM_POOL + ["seed"] * NUM_SEEDS)
    sets = ["pool"] * NUM_POOL + ["birds"] * 10 + ["cars"] * 20
    names = ["web"] * 300 + ["lab"] * 100 + ["mine"] * NUM_SEEDS
    some = np.ones(len(ids), dtype=np.int64)
    table = pa.table({"set": sets, "source_name": names})
    rows = Rows(table, role, some.astype(bool), ids, some, some, np.zeros((len(ids), 2), dtype=np.uint64))
    return rows, Embedded(np.arange(len(ids)), UnitVectors((values,)))


@pytest.fixture
def select(world, tmp_path) -> Callable[..., tuple[Stage, dict]]:
    """Run the stage with some retrieval settings: the finished stage and its counts."""

    def run(leaks: tuple[int, ...] = (), rows: Rows = world[0], name: str = "out", **settings) -> tuple[Stage, dict]:
        sources, seeds = SourceConfig(("web=/web", "lab=/lab")), SeedsConfig(("mine=/seeds",))
        config = CurateConfig(source=sources, seeds=seeds, retrieval=RetrievalConfig(**settings))
        check_retrieval(config)
        stage = Stage(tmp_path / name, "retrieve", {})
        pool = np.setdiff1d(POOL, leaks)
        retrieve_stage(config, rows, world[1], pool, np.array(leaks, dtype=np.int64), stage)
        return stage, stage.report()["counts"]

    return run


def rows_of(stage: Stage) -> list[int]:
    table = stage.table("selection.parquet")
    assert len(set(table["row"].to_pylist())) == len(table)
    return table["row"].to_pylist()


def test_neighbours_are_those_of_an_exhaustive_search(world, select):
    rows, values = world[0], world[1].vectors.take(slice(None))
    stage, counts = select(k=5)
    expected = set()
    for seed in range(NUM_POOL, NUM_POOL + NUM_SEEDS):
        cosine = values[POOL] @ values[seed]
        cosine[rows.ids[POOL] == rows.ids[seed]] = -2  # its own bytes do not use up its neighbours
        expected |= {(seed, int(row), rank) for rank, row in enumerate(np.argsort(-cosine)[:5])}
    table = stage.table("neighbours.parquet")
    assert set(zip(*(table[name].to_pylist() for name in ("seed_row", "row", "rank")), strict=True)) == expected
    assert rows_of(stage) == sorted({row for _, row, _ in expected})
    counts = counts["methods"]["sample"]
    assert counts["retrieved"] == 5 * NUM_SEEDS
    assert counts["unique"] + counts["collisions"] == counts["retrieved"]
    assert [entry["k"] for entry in counts["by_k"]] == [1, 2, 4, 5]
    for entry in counts["by_k"]:
        assert entry["unique"] == len({row for _, row, rank in expected if rank < entry["k"]})
        assert entry["unique"] + entry["collisions"] == entry["retrieved"] == entry["k"] * NUM_SEEDS


def test_an_image_of_several_seeds_is_selected_for_the_closest(select):
    stage, _ = select(k=8)
    best = {}
    for entry in stage.table("neighbours.parquet").to_pylist():
        if entry["row"] not in best or entry["cosine"] > best[entry["row"]]["cosine"]:
            best[entry["row"]] = entry
    for entry in stage.table("selection.parquet").to_pylist():
        assert {name: entry[name] for name in best[entry["row"]]} == best[entry["row"]]


def test_clusters_around_seeds_follow_the_rule(world, select, capsys):
    rows, values = world[0], world[1].vectors.take(slice(None))
    stage, counts = select(methods=("cluster",), cluster=ClusterConfig(min_seeds=3, per_cell=20))
    assert "10 k-means cells instead of 100000" in capsys.readouterr().err
    by_content = POOL[np.argsort(rows.ids[POOL])]
    centroids = kmeans(values[by_content], 10, iterations=20, seed=0, purpose="cells")
    cosine = values @ centroids.T
    cell = cosine.argmax(axis=1)
    found = stage.table("clusters.parquet")
    assert found["row"].to_pylist() == POOL.tolist()
    assert found["cluster_id"].to_pylist() == cell[POOL].tolist()
    expected, taken = set(), 0
    for members in (np.arange(400, 410), np.arange(410, 430)):
        for number in range(10):
            if np.sum(cell[members] == number) > 3:
                inside = sorted((row for row in POOL if cell[row] == number), key=lambda row: -cosine[row, number])
                expected |= set(inside[:20])
                taken += len(inside[:20])
    assert rows_of(stage) == sorted(expected)
    counts = counts["methods"]["cluster"]
    assert [entry["seed_set"] for entry in counts["sets"]] == ["birds", "cars"]
    assert sum(entry["taken"] for entry in counts["sets"]) == taken == counts["unique"] + counts["collisions"]
    assert set(stage.table("not_selected.parquet")["reason"].to_pylist()) == {"not in a cluster around seeds"}


def test_balanced_sampling_cuts_the_crowd_and_needs_no_seeds(world, select):
    stage, counts = select(methods=("hierarchical",), hierarchical=HierarchicalConfig(levels=(60, 8), target=80))
    chosen = rows_of(stage)
    assert len(chosen) == 80
    assert np.mean(np.array(chosen) < 225) < 225 / NUM_POOL
    assert counts["methods"]["hierarchical"]["levels"][1]["clusters"] == 8
    assert stage.table("clusters.parquet").column_names == ["row", "cluster_id", "cosine", "level_1", "level_2"]
    assert len(stage.table("not_selected.parquet")) == NUM_POOL - 80


def test_the_union_of_methods_has_every_image_once(select):
    parts = [select(methods=(name,), hierarchical=HierarchicalConfig(target=80), name=name)[0] for name in METHODS]
    stage, counts = select(methods=tuple(reversed(METHODS)), hierarchical=HierarchicalConfig(target=80))
    union = {row for part in parts for row in rows_of(part)}
    assert rows_of(stage) == sorted(union)
    assert counts["selected_by_several_methods"] == sum(len(rows_of(part)) for part in parts) - len(union)
    method = dict(zip(rows_of(stage), stage.table("selection.parquet")["method"].to_pylist(), strict=True))
    assert all(method[row] == "sample" for row in rows_of(parts[0]))
    assert stage.table("clusters.parquet")["cluster_id"].equals(parts[1].table("clusters.parquet")["cluster_id"])


METHODS = ("sample", "cluster", "hierarchical")


def test_seeds_pass_once_for_each_content_and_never_as_leaks(world, select):
    stage, counts = select(k=2, keep_seeds=True)
    table = stage.table("selection.parquet")
    passing = [entry for entry in table.to_pylist() if entry["method"] == "seeds"]
    assert [entry["row"] for entry in passing] == [7, 8, *range(NUM_POOL + 2, NUM_POOL + NUM_SEEDS)]
    assert [entry["seed_set"] for entry in passing] == ["birds"] * 10 + ["cars"] * 20
    assert counts["methods"]["seeds"]["unique"] == NUM_SEEDS
    ids = world[0].ids[table["row"].to_numpy()]
    assert len(set(ids)) == len(ids)
    # Pool image 7 is a leak, and with it the seed of its bytes; so is seed 405.
    stage, _ = select(k=2, keep_seeds=True, leaks=(7, NUM_POOL + 5), name="guarded")
    assert not {7, NUM_POOL, NUM_POOL + 5} & set(rows_of(stage))


def test_a_seed_that_is_a_lesser_copy_in_the_pool_passes_all_the_same(world, tmp_path):
    """Pool image 8 is not among those left, and has the bytes of a seed."""
    config = CurateConfig(seeds=SeedsConfig(("seeds",)), retrieval=RetrievalConfig(k=1, keep_seeds=True))
    stage = Stage(tmp_path / "out", "retrieve", {})
    retrieve_stage(config, world[0], world[1], np.setdiff1d(POOL, 8), np.empty(0, dtype=np.int64), stage)
    assert {7, 8} <= set(rows_of(stage))
    assert not {NUM_POOL, NUM_POOL + 1} & set(rows_of(stage))


def test_a_mixture_by_source_and_method(select):
    mixture = (MixtureConfig("seeds", 1), MixtureConfig("lab", 1), MixtureConfig("web", 2))
    settings = {"methods": ("sample", "hierarchical"), "hierarchical": HierarchicalConfig(target=200), "k": 4}
    stage, counts = select(**settings, keep_seeds=True, mixture=mixture, size=80)
    chosen = np.array(rows_of(stage))
    assert [share["drawn"] for share in counts["mixture"]] == [20, 20, 40]
    assert np.sum((chosen >= 300) & (chosen < NUM_POOL)) == 20
    assert "not drawn into the mixture" in stage.table("not_selected.parquet")["reason"].to_pylist()
    stage, counts = select(**settings, keep_seeds=True, mixture=mixture, name="largest")
    available = [share["available"] for share in counts["mixture"]]
    assert sum(share["drawn"] for share in counts["mixture"]) == min(
        4 * available[0], 4 * available[1], 2 * available[2]
    )


def test_a_size_alone_is_drawn_from_everything(world, tmp_path):
    config = CurateConfig(retrieval=RetrievalConfig(size=50))
    stage = Stage(tmp_path / "out", "retrieve", {})
    retrieve_stage(config, world[0], world[1], POOL, np.empty(0, dtype=np.int64), stage)
    assert len(rows_of(stage)) == 50


def test_the_order_of_rows_and_the_threads_decide_nothing(world, tmp_path):
    """The same images under other names come in another order of rows."""
    rows, vectors = world
    all_values = vectors.vectors.take(slice(None))
    settings = {
        "methods": METHODS,
        "cluster": ClusterConfig(order="random"),
        "hierarchical": HierarchicalConfig(target=100),
        "mixture": (MixtureConfig("web", 1), MixtureConfig("lab", 1)),
        "keep_seeds": True,
        "size": 60,
    }
    config = CurateConfig(seeds=SeedsConfig(("seeds",)), retrieval=RetrievalConfig(**settings))
    order = np.concatenate([np.random.default_rng(1).permutation(NUM_POOL), np.arange(NUM_POOL, NUM_POOL + NUM_SEEDS)])
    other = Rows(rows.table.take(pa.array(order)), *(getattr(rows, n)[order] for n in ROW_ARRAYS))
    results = []
    for name, of, values in (("a", rows, all_values), ("b", other, all_values[order])):
        stage = Stage(tmp_path / name, "retrieve", {})
        retrieve_stage(
            config, of, Embedded(vectors.rows, UnitVectors((values,))), POOL, np.empty(0, dtype=np.int64), stage
        )
        results.append(sorted(of.ids[rows_of(stage)]))
    assert results[0] == results[1]


ROW_ARRAYS = ("role", "good", "ids", "area", "num_bytes", "phash")


def test_memory_grows_with_the_cells_until_every_image_is_trained_on():
    config = CurateConfig(seeds=SeedsConfig(("seeds",)), retrieval=RetrievalConfig(methods=("cluster",)))
    few = replace(config, retrieval=replace(config.retrieval, cluster=ClusterConfig(cells=10)))
    plain = replace(config, retrieval=RetrievalConfig())
    sizes = [memory_bytes(of, 10_000_000, 384) for of in (plain, few, config)]
    assert sizes == sorted(sizes)
    assert sizes[2] - sizes[0] == 6 * 384 * 10_000_000 + 8 * 384 * 100_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("sample", "sample")}, r"retrieval.methods: sample, sample: one of them is there twice"),
        ({"k": 0}, r"retrieval.k: found 0; expected 1 or more"),
        ({"cluster": ClusterConfig(cells=0)}, r"retrieval.cluster.cells: found 0"),
        ({"methods": ("hierarchical",)}, r"retrieval.hierarchical.target: found 0; expected 1 or more"),
        ({"hierarchical": HierarchicalConfig(levels=(10, 10))}, r"levels: 10 does not lie below 10; .* most first"),
        ({"hierarchical": HierarchicalConfig(levels=(10, 0))}, r"levels\[1\]: found 0"),
        (
            {"methods": ("hierarchical",), "hierarchical": HierarchicalConfig(target=500)},
            r"target: 500 images wanted, 400 are left to choose from\n  give at most 400",
        ),
        (
            {"methods": ("hierarchical",), "hierarchical": HierarchicalConfig(target=5, levels=(401,))},
            r"levels: 401 clusters of 400 images\n  give fewer, or \[\] for \[6\]",
        ),
        (
            {"mixture": (MixtureConfig("weeb", 1),)},
            r"no source or method 'weeb'; did you mean web\?\n  sources: lab, web",
        ),
        (
            {"mixture": (MixtureConfig("cluster", 1),)},
            r"no source or method 'cluster'\n.*methods of this config: sample",
        ),
        ({"mixture": (MixtureConfig("web", 0),)}, r"weight 0 of 'web'; expected a number above 0"),
        ({"mixture": (MixtureConfig("web", 1), MixtureConfig("web", 2))}, r"'web' is there twice"),
        ({"size": 999}, r"retrieval.size: 999 images need 999 of 'the selection', \d+ were selected"),
        ({"size": -1}, r"retrieval.size: found -1; expected 0 or more"),
    ],
)
def test_what_cannot_be_is_named(select, settings, message):
    with pytest.raises(UserError, match=message):
        select(**settings)


def test_a_source_called_like_a_method_is_refused():
    retrieval = RetrievalConfig(mixture=(MixtureConfig("sample", 1),))
    with pytest.raises(UserError, match=r"'sample' is a method and a source; give the source another name"):
        check_retrieval(
            CurateConfig(source=SourceConfig(("/my/sample",)), seeds=SeedsConfig(("s",)), retrieval=retrieval)
        )


def test_seeds_in_the_shards_have_their_rows_in_the_manifest(config, pack, tmp_path):
    """Seeds beside a seed of an evaluation image's bytes, one of a pool image's bytes and one that is no image."""
    seeds = tmp_path / "seeds" / "odd"
    seeds.mkdir(parents=True)
    leaked = next(path for path in sorted((pack / "eval").rglob("*.jpg")))
    pooled = next(path for path in sorted((pack / "pool" / "loose").glob("0*.jpg")))
    (seeds / "leaked.jpg").write_bytes(leaked.read_bytes())
    (seeds / "pooled.jpg").write_bytes(pooled.read_bytes())
    (seeds / "broken.jpg").write_bytes(b"<html>")
    passing = replace(
        config,
        out=str(tmp_path / "out"),
        seeds=SeedsConfig((*config.seeds.paths, f"odd={tmp_path}/seeds")),
        retrieval=RetrievalConfig(k=2, keep_seeds=True),
    )
    out = curate(passing)
    manifest = read_manifest(out).to_pylist()
    fates = {Path(row["source"]).name: row for row in manifest if row["source"].startswith(str(seeds))}
    assert fates["leaked.jpg"]["fate"] == "leak"
    assert fates["leaked.jpg"]["witness_id"] == fates["leaked.jpg"]["item_id"]
    assert fates["broken.jpg"]["fate"] == "rejected"
    others = [row for row in manifest if row["source"].startswith(str(pack / "seeds"))]
    assert all((row["fate"], row["reason"], row["rank"]) == ("kept", "seed", None) for row in others)
    assert all(row["seed_set"] == Path(row["source"]).parent.name and row["shard"] for row in others)
    copy = fates["pooled.jpg"]
    kept = [row for row in manifest if row["fate"] == "kept"]
    assert sum(row["item_id"] == copy["item_id"] for row in kept) == (copy["fate"] != "leak")
    assert copy["fate"] == "kept" or copy["witness_id"] == copy["item_id"]
    assert len({row["item_id"] for row in kept}) == len(kept)
    assert verify_shards(out / "shards") == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["funnel"][-1]["out"] == len(kept)
    assert json.loads((out / "shards" / "manifest.json").read_text())["samples"] == len(kept)


def test_a_folder_of_the_pool_may_be_the_seeds(config, pack, tmp_path):
    heap = replace(
        config,
        out=str(tmp_path / "out"),
        seeds=SeedsConfig((f"{pack}/pool/loose",)),
        retrieval=RetrievalConfig(k=1, keep_seeds=True),
    )
    manifest = read_manifest(curate(heap)).to_pylist()
    places = [(row["source"], row["key"]) for row in manifest]
    assert len(set(places)) == len(places)
    loose = [row for row in manifest if row["source"].startswith(f"{pack}/pool/loose")]
    kept = [row["item_id"] for row in manifest if row["fate"] == "kept"]
    assert len(set(kept)) == len(kept)
    assert {row["fate"] for row in loose if row["item_id"] not in kept} == {"leak", "rejected"}
    assert all(row["reason"] == "seed" and row["shard"] for row in loose if row["fate"] == "kept")
    assert any(row["fate"] == "kept" and row["reason"] is None and row["rank"] == 0 for row in manifest)


def test_balanced_sampling_of_a_pool_without_seeds(config, tmp_path):
    even = HierarchicalConfig(levels=(8, 2), target=20)
    bare = replace(
        config,
        out=str(tmp_path / "out"),
        seeds=SeedsConfig(),
        retrieval=RetrievalConfig(methods=("sample", "hierarchical"), hierarchical=even),
    )
    manifest = read_manifest(curate(bare)).to_pylist()
    kept = [row for row in manifest if row["fate"] == "kept"]
    assert len(kept) == 20
    assert {row["reason"] for row in manifest if row["fate"] == "not_selected"} == {"not drawn from its cluster"}
    with_cluster = [row for row in manifest if row["fate"] in ("kept", "not_selected")]
    assert all(row["cluster_id"] is not None and row["seed_set"] is None for row in with_cluster)
    assert all(row["cluster_id"] is None for row in manifest if row["fate"] in ("rejected", "duplicate", "leak"))
