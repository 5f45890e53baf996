import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import index as module
from curation.embeddings import open_embeddings
from curation.index import Settings, add_to_index, build_index, describe_index, load_index, merge_indexes, search_index
from curation.index_kinds import preset
from curation.index_recall import Knob, tune
from runtime.errors import Stopped, UserError
from runtime.files import read_json, write_array, write_table
from runtime.signals import StopRequest

NUM, DIM, PLANTED = 2000, 32, 50


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Clustered unit vectors; the last PLANTED are near copies of the first."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, DIM))
    values = centres[generator.integers(0, 30, NUM)] + generator.normal(size=(NUM, DIM))
    values[-PLANTED:] = values[:PLANTED] + 0.02 * generator.normal(size=(PLANTED, DIM))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def folder(values, tmp_path_factory):
    """All vectors in three parts with item ids; `half/0`, `half/1` hold one half each."""
    folder = tmp_path_factory.mktemp("vectors")
    ids = [f"id{i}" for i in range(NUM)]
    for part, rows in enumerate(np.array_split(np.arange(NUM), 3)):
        write_array(folder / f"part-{part:05d}-copy.npy", values[rows])
        write_table(folder / f"part-{part:05d}.parquet", pa.table({"item_id": [ids[row] for row in rows]}))
    for half, rows in enumerate(np.array_split(np.arange(NUM), 2)):
        write_array(folder / "half" / str(half) / "part-00000.npy", values[rows])
        write_table(folder / "half" / str(half) / "part-00000.parquet", pa.table({"item_id": [ids[r] for r in rows]}))
    return folder


def build(folder, out, factory: str, **settings):
    given = Settings(factory, **{"recall_queries": 200} | settings)
    return build_index(open_embeddings(str(folder)), out, given)


def neighbours(index, folder, tmp_path, k: int = 5) -> dict[str, list]:
    """id -> its neighbours in order, by searching the vectors of `folder`."""
    search_index(index, open_embeddings(str(folder)), k, tmp_path / "found.parquet")
    found: dict[str, list] = {}
    for row in pq.read_table(tmp_path / "found.parquet").to_pylist():
        assert row["rank"] == len(found.setdefault(row["query"], []))
        found[row["query"]].append(row["id"])
    return found


def exact(values: np.ndarray, k: int) -> np.ndarray:
    unit = values.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return np.argsort(-(unit @ unit.T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq", "rabitq", "hnsw", "ivf on disk"])
def test_every_kind_finds_planted_neighbours_and_says_how_many(kind, folder, values, tmp_path):
    kind, on_disk = kind.split()[0], "disk" in kind
    factory = preset(kind, NUM, DIM, on_disk=on_disk)
    info = build(folder, tmp_path / "index", factory, on_disk=on_disk, memory=50_000)
    assert (info["vectors"], info["dim"], info["named"], info["on_disk"]) == (NUM, DIM, True, on_disk)
    found = neighbours(tmp_path / "index", folder, tmp_path, k=11)
    truth = exact(values, 11)
    near = [f"id{i}" in found[f"id{NUM - PLANTED + i}"][:2] for i in range(PLANTED)]
    assert sum(near) >= (PLANTED if kind == "flat" else PLANTED - 3)
    # Measured recall is a sample of this one, over all vectors.
    share = np.mean([
        len({f"id{t}" for t in truth[i] if t != i} & (set(found[f"id{i}"]) - {f"id{i}"})) / 10 for i in range(NUM)
    ])  # fmt: skip
    recall = info["recall"]
    assert recall["recall_at_10"] >= 0.95
    assert abs(recall["recall_at_10"] - share) < 0.02
    low, high = recall["interval_at_10"]
    assert low <= recall["recall_at_10"] <= high + 1e-4
    assert read_json(tmp_path / "index" / "info.json") == info
    assert (tmp_path / "index" / "lists.ivfdata").is_file() == on_disk
    assert {file.name for file in (tmp_path / "index").iterdir()} - {"lists.ivfdata"} == {
        "index.faiss", "trained.faiss", "names.parquet", "info.json",
    }  # fmt: skip


def test_measured_recall_is_that_of_brute_force_where_cells_are_missed(folder, values, tmp_path):
    """One cell only: recall is well below one, and every sampled vector was searched."""
    info = build(folder, tmp_path / "index", "IVF64,Flat", target=0.0, recall_queries=NUM)
    found, truth = neighbours(tmp_path / "index", folder, tmp_path, k=11), exact(values, 11)
    first = [
        next(n for n in [*found[f"id{i}"], None] if n != f"id{i}") == f"id{next(t for t in truth[i] if t != i)}"
        for i in range(NUM)
    ]
    assert info["recall"]["nprobe"] == 1
    assert info["recall"]["recall_at_1"] == pytest.approx(np.mean(first), abs=2e-3)
    assert info["recall"]["recall_at_1"] < 0.99


def test_flat_is_exact(folder, values, tmp_path):
    build(folder, tmp_path / "index", "Flat")
    found = neighbours(tmp_path / "index", folder, tmp_path, k=4)
    assert [found[f"id{i}"] for i in range(NUM)] == [[f"id{t}" for t in row] for row in exact(values, 4)]


@pytest.mark.parametrize(
    ("factory", "on_disk"),
    [("Flat", False), ("IVF20,SQfp16", False), ("IVF20,SQfp16", True), ("IVF20,PQ8x4fs,Refine(SQfp16)", False)],
)
def test_merged_halves_are_the_whole(factory, on_disk, folder, tmp_path):
    half, settings = folder / "half", Settings(factory, on_disk=on_disk, memory=50_000, recall_queries=100)
    whole = build_index(open_embeddings(str(folder)), tmp_path / "whole", settings)
    for part in ("0", "1"):
        build_index(open_embeddings(str(half / part)), tmp_path / part, settings, like=tmp_path / "whole")
    merged = merge_indexes([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert (merged["vectors"], merged["trained_sha256"]) == (NUM, whole["trained_sha256"])
    assert merged["recall"]["recall_at_10"] == whole["recall"]["recall_at_10"]
    assert neighbours(tmp_path / "merged", half / "1", tmp_path) == neighbours(tmp_path / "whole", half / "1", tmp_path)
    assert neighbours(tmp_path / "merged", half / "0", tmp_path) == neighbours(tmp_path / "whole", half / "0", tmp_path)


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "HNSW8"])
def test_an_index_with_more_vectors(factory, folder, tmp_path):
    build(folder / "half" / "0", tmp_path / "first", factory)
    more = open_embeddings(str(folder / "half" / "1"))
    info = add_to_index(tmp_path / "first", more, tmp_path / "both")
    assert info["vectors"] == NUM
    assert info["recall"]["recall_at_10"] > 0.9
    found = neighbours(tmp_path / "both", folder, tmp_path, k=3)
    assert np.mean([query in near for query, near in found.items()]) > 0.95
    assert describe_index(tmp_path / "first")["vectors"] == NUM // 2


def test_a_stopped_build_goes_on_and_gives_the_same(folder, tmp_path, monkeypatch):
    settings = Settings("IVF16,SQfp16", on_disk=True, memory=50_000, recall_queries=0)
    build_index(open_embeddings(str(folder)), tmp_path / "at-once", settings)
    calls = []

    class StopLater(StopRequest):
        def check(self):
            calls.append(1)
            if len(calls) == 3:
                raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        build_index(open_embeddings(str(folder)), tmp_path / "index", settings, stop=StopLater())
    assert not (tmp_path / "index").exists()
    assert len(list((tmp_path / ".index.building").glob("piece-*"))) == 2
    seen = []
    write = module._write

    def spy(index, path):
        seen.append(path.name)
        write(index, path)

    monkeypatch.setattr(module, "_write", spy)
    build_index(open_embeddings(str(folder)), tmp_path / "index", settings)
    assert seen == ["piece-00002.faiss", "index.faiss"]
    for name in ("index.faiss", "lists.ivfdata", "names.parquet"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    seen.clear()
    build_index(open_embeddings(str(folder)), tmp_path / "index", settings)  # finished: nothing is done
    assert seen == []
    assert not (tmp_path / ".index.building").exists()


def test_an_index_on_disk_may_be_moved(folder, tmp_path):
    build(folder, tmp_path / "index", "IVF16,SQfp16", on_disk=True, recall_queries=0)
    before = neighbours(tmp_path / "index", folder / "half" / "0", tmp_path)
    (tmp_path / "index").rename(tmp_path / "moved")
    assert neighbours(tmp_path / "moved", folder / "half" / "0", tmp_path) == before


def test_anyones_faiss_file_is_described_and_searched(folder, values, tmp_path):
    index = faiss.IndexFlatIP(DIM)
    index.add(values.astype(np.float32))
    faiss.write_index(index, str(tmp_path / "their.index"))
    info = describe_index(tmp_path / "their.index")
    assert (info["type"], info["vectors"], info["recall"]) == ("IndexFlatIP", NUM, None)
    found = neighbours(tmp_path / "their.index", folder / "half" / "0", tmp_path, k=1)
    assert found["id7"] == [7]


@pytest.mark.parametrize("num", [1, 50, 10_000, 10**6, 10**9])
@pytest.mark.parametrize("dim", [7, 32, 384, 1024])
def test_presets_are_indexes_of_faiss(num, dim):
    for kind in ("flat", "ivf", "ivfpq", "rabitq", "hnsw"):
        assert faiss.index_factory(dim, preset(kind, num, dim), faiss.METRIC_INNER_PRODUCT).d == dim
    for kind in ("ivf", "ivfpq"):
        assert faiss.index_factory(dim, preset(kind, num, dim, on_disk=True), faiss.METRIC_INNER_PRODUCT).d == dim


def test_what_is_wrong_is_said(folder, values, tmp_path):
    write_array(tmp_path / "wide.npy", np.ones((4, DIM + 1), dtype=np.float32))
    wide = open_embeddings(str(tmp_path / "wide.npy"))
    good = open_embeddings(str(folder))
    build(folder, tmp_path / "index", "IVF16,Flat", recall_queries=0)
    build(folder / "half" / "0", tmp_path / "apart", "IVF16,Flat", recall_queries=0)
    untrained = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, 4)
    faiss.write_index(untrained, str(tmp_path / "untrained"))
    cases = [
        (lambda: search_index(tmp_path / "index", wide, 3, tmp_path / "o"), f"vectors of {DIM + 1} numbers"),
        (lambda: search_index(tmp_path / "index", good, NUM + 1, tmp_path / "o"), f"holds {NUM} vectors; give 1 to"),
        (lambda: search_index(tmp_path / "untrained", good, 3, tmp_path / "o"), "not trained"),
        (lambda: search_index(tmp_path / "none", good, 3, tmp_path / "o"), "no index"),
        (lambda: load_index(folder / "part-00000.parquet"), "FAISS cannot read it"),
        (lambda: describe_index(tmp_path / "none"), "no such folder"),
        (lambda: describe_index(folder), "no index of ours"),
        (lambda: add_to_index(tmp_path / "index", wide, tmp_path / "o"), f"holds {DIM}"),
        (lambda: merge_indexes([tmp_path / "index", tmp_path / "apart"], tmp_path / "o"), "trained apart"),
        (lambda: build(folder, tmp_path / "o", "IVFx,Flat"), "FAISS makes no index of it"),
        (lambda: build(folder, tmp_path / "o", "IVF4000,Flat"), "4000 cells, but only 2000 vectors"),
        (lambda: build(folder, tmp_path / "o", "HNSW8", on_disk=True), "cannot lie on disk"),
        (lambda: build(folder, tmp_path / "index", "Flat"), "exists already"),
        (lambda: preset("hnsw", NUM, DIM, on_disk=True), "lies in memory"),
        (lambda: preset("tree", NUM, DIM), "no kind 'tree'"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*"))  # nothing is left lying about


def test_graphs_do_not_merge(folder, tmp_path):
    build(folder / "half" / "0", tmp_path / "a", "HNSW8", recall_queries=0)
    with pytest.raises(UserError, match="FAISS does not merge IndexHNSWFlat"):
        merge_indexes([tmp_path / "a", tmp_path / "a"], tmp_path / "o")


def test_the_knob_that_helps_is_turned():
    """Recall grows with cells up to 8, then only with candidates; turning cells further is undone."""
    cells = Knob("cells", lambda value: None, [1, 2, 4, 8, 16, 32])
    candidates = Knob("candidates", lambda value: None, [1, 2, 4])

    def look() -> dict[str, float]:
        return {"recall": 0.1 * (min(cells.position, 3) + 2 * candidates.position)}

    best, curve = tune([cells, candidates], look, "recall", 0.69)
    assert (best["cells"], best["candidates"], best["recall"]) == (8, 4, pytest.approx(0.7))
    assert [row["cells"] for row in curve] == [1, 2, 4, 8, 16, 8, 8]
    assert (cells.position, candidates.position) == (3, 2)
    cells.position = candidates.position = 0
    best, _ = tune([cells, candidates], look, "recall", 0.95)  # not to be had
    assert (best["cells"], best["candidates"]) == (8, 4)
    assert tune([], look, "recall", 0.95)[0]["recall"] == pytest.approx(0.7)


def test_coarse_codes_get_more_candidates(folder, tmp_path):
    recall = build(folder, tmp_path / "index", "IVF8,PQ4x4fs,Refine(SQfp16)", target=0.97)["recall"]
    assert recall["recall_at_10"] >= 0.97
    assert recall["k_factor"] > 4
    index = load_index(tmp_path / "index")
    assert (index.k_factor, module.core_of(index).nprobe) == (recall["k_factor"], recall["nprobe"])
