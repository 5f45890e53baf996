"""FAISS indexes over folders of vectors: train, fill, merge, measure, search.

An index is a folder: `index.faiss`, `trained.faiss` (the same without vectors, to build more that can be merged),
`lists.ivfdata` where the lists lie on disk, `names.parquet` where the vectors have names, `info.json`. Similarity is
the cosine: vectors are brought to unit length and compared by inner product. N vectors of width D.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from runtime.environment import cores, package_versions
from runtime.errors import UserError
from runtime.files import human_bytes, read_json, replacing, require_space, sha256, write_json, write_table
from runtime.progress import Progress, say
from runtime.seeding import generator
from runtime.signals import StopRequest

from .embeddings import Embeddings, open_embeddings
from .index_kinds import core_of, merge, quiet, reason, type_name
from .index_recall import measure

FORMAT = 1  # of the folder
PER_CELL, LEAST_TRAINING = 64, 50_000  # vectors to train on: per cell, and at least (FAISS warns below 39 per cell)
K_FACTOR = 8  # candidates per result that are compared again with the stored vectors, where not measured
QUERIES = 4096  # searched at a time


@dataclass(frozen=True)
class Settings:
    """How an index is built."""

    factory: str  # FAISS index factory string
    on_disk: bool = False  # lists in a file that is mapped, not in memory
    memory: int = 4 * 10**9  # bytes: with on_disk, of the lists that are built before they go to disk
    seed: int = 0  # of the training sample and of the recall sample
    recall_queries: int = 1000  # vectors searched exactly to measure recall; 0: not measured
    target: float = 0.95  # recall at 10 from which no more cells (or neighbours) are looked at


def build_index(
    embeddings: Embeddings, out: Path, settings: Settings, *, like: Path | None = None, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Train an index and fill it; returns `info.json`. Raises UserError, Stopped.

    like: an index whose factory and training are taken over, so that both can be merged. A build that was stopped keeps
    its training and its finished pieces on disk, and the same call goes on from them.
    """
    if like:
        settings = replace(settings, factory=read_info(like)["factory"])
    key = _key("build", embeddings.identity(), vars(settings), read_info(like)["trained_sha256"] if like else None)
    if (done := _finished(out, key)) is not None:
        return done
    num, dim = len(embeddings), embeddings.dim
    with _workshop(out, key) as work:
        require_space(work, 2 * num * dim, what="the index")
        trained = work / "trained.faiss"
        if not trained.is_file():
            index = _take_over(like, dim) if like else _train(embeddings, settings)
            _write(index, trained)
        index = faiss.read_index(str(trained))
        if isinstance(core_of(index), faiss.IndexHNSW):
            core_of(index).hnsw.efConstruction = 64
        add = _add_on_disk if settings.on_disk else _add
        index = add(index, embeddings, settings, work, stop)
        return _complete(work, out, index, [embeddings], settings, key, embeddings.names())


def add_to_index(source: Path, embeddings: Embeddings, out: Path, *, stop: StopRequest | None = None) -> dict[str, Any]:
    """A copy of the index `source` with more vectors, at `out`; returns its `info.json`. Raises UserError, Stopped."""
    info = read_info(source)
    settings = Settings(**info["settings"])
    key = _key("add", info["key"], embeddings.identity())
    if (done := _finished(out, key)) is not None:
        return done
    if info["on_disk"]:
        raise UserError(
            f"{source}: its lists lie on disk and are not added to\n"
            f"  build the new vectors with --like {source} --on-disk, then troodon index merge"
        )
    _require_width(source, info["dim"], embeddings)
    names = _join_names([(str(source), read_names(source)), (embeddings.source, embeddings.names())])
    with _workshop(out, key) as work:
        shutil.copyfile(source / "trained.faiss", work / "trained.faiss")
        index = _add(load_index(source), embeddings, settings, work, stop)
        return _complete(work, out, index, [*_sources(info), embeddings], settings, key, names)


def merge_indexes(sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Several indexes of one training as one at `out`, in the order given; returns its `info.json`. Raises UserError.

    Where one of them lies on disk the result does; else it is put together in memory.
    """
    infos = [read_info(source) for source in sources]
    for source, info in zip(sources, infos, strict=True):
        if (info["trained_sha256"], info["dim"]) != (infos[0]["trained_sha256"], infos[0]["dim"]):
            raise UserError(
                f"{source}: trained apart from {sources[0]}, so their cells are not the same\n"
                f"  build it with --like {sources[0]}"
            )
    settings = Settings(**infos[0]["settings"] | {"on_disk": any(info["on_disk"] for info in infos)})
    key = _key("merge", [info["key"] for info in infos])
    if (done := _finished(out, key)) is not None:
        return done
    names = _join_names([(str(source), read_names(source)) for source in sources])
    with _workshop(out, key) as work:
        shutil.copyfile(sources[0] / "trained.faiss", work / "trained.faiss")
        if settings.on_disk:
            trained = faiss.read_index(str(work / "trained.faiss"))
            index = _join_on_disk(trained, [load_index(source) for source in sources], work)
        else:
            index = load_index(sources[0])
            for source in sources[1:]:
                merge(index, load_index(source), str(source))
        return _complete(work, out, index, [e for info in infos for e in _sources(info)], settings, key, names)


def search_index(
    source: Path, queries: Embeddings, k: int, out: Path, *, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Write a parquet table of query, rank (0 nearest), id, cosine; returns counts. Raises UserError, Stopped.

    Queries and ids go by their names where they have any, else by position. A query has fewer than k rows where the
    cells that were looked at hold fewer vectors. Cosines are as near to the truth as the index stores vectors.
    """
    index = load_index(source)
    if not index.is_trained:
        raise UserError(f"{source}: the index is not trained; build it with troodon index build")
    _require_width(source, index.d, queries)
    if not 1 <= k <= index.ntotal:
        raise UserError(f"--k {k}: the index holds {index.ntotal} vectors; give 1 to {index.ntotal}")
    names, asked = read_names(source), queries.names()
    found, start = 0, time.perf_counter()
    schema = pa.schema([
        ("query", pa.int64() if asked is None else asked.type), ("rank", pa.int32()),
        ("id", pa.int64() if names is None else names.type), ("cosine", pa.float32()),
    ])  # fmt: skip
    with (
        replacing(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        Progress("search", total=len(queries), unit="queries") as progress,
    ):
        for begin in range(0, len(queries), QUERIES):
            block = queries.read(slice(begin, min(begin + QUERIES, len(queries))))
            cosine, near = index.search(block, k)
            query, rank = np.nonzero(near >= 0)
            columns = [
                _named(asked, query + begin), rank.astype(np.int32),
                _named(names, near[query, rank]), cosine[query, rank].astype(np.float32),
            ]  # fmt: skip
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))
            found += len(query)
            progress.advance(len(block))
            if stop is not None:
                stop.check()
    seconds = time.perf_counter() - start
    return {
        "queries": len(queries),
        "k": k,
        "rows": found,
        "ms_per_query": round(1e3 * seconds / len(queries), 4),
        "out": str(out),
    }


def read_info(source: Path) -> dict[str, Any]:
    """`info.json` of an index folder. Raises UserError."""
    if not (source / "info.json").is_file():
        what = "no such folder" if not source.exists() else "no index of ours (a folder with index.faiss and info.json)"
        raise UserError(f"{source}: {what}; troodon index build writes one")
    info = read_json(source / "info.json")
    if info["format"] != FORMAT:
        raise UserError(f"{source}: an index of format {info['format']}, this version reads {FORMAT}; build it again")
    return info


def describe_index(source: Path) -> dict[str, Any]:
    """`info.json` of an index folder, or what can be said of anyone's FAISS file. Raises UserError."""
    if source.is_dir() or not source.exists():
        return read_info(source)
    index = load_index(source)
    return {
        "type": type_name(index),
        "metric": "cosine or inner product" if index.metric_type == faiss.METRIC_INNER_PRODUCT else "L2 or other",
        "dim": index.d,
        "vectors": index.ntotal,
        "trained": bool(index.is_trained),
        "bytes": source.stat().st_size,
        "bytes_per_vector": round(source.stat().st_size / max(index.ntotal, 1), 1),
        "recall": None,
    }


def load_index(source: Path) -> Any:
    """The FAISS index of a folder, or of a file; lists on disk are mapped read-only. Raises UserError."""
    file = source / "index.faiss" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{source}: no index (a folder with index.faiss, or a FAISS file)")
    try:
        with quiet():
            return faiss.read_index(str(file), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise UserError(f"{file}: FAISS cannot read it: {reason(error)}") from None


def read_names(source: Path) -> pa.Array | None:
    """Names of an index's vectors, by position; None where they have none."""
    file = source / "names.parquet"
    return pq.read_table(file)["id"].combine_chunks() if source.is_dir() and file.is_file() else None


def _train(embeddings: Embeddings, settings: Settings) -> Any:
    """An empty index, trained on a sample. Raises UserError."""
    num, dim = len(embeddings), embeddings.dim
    try:
        index = faiss.index_factory(dim, settings.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"--factory {settings.factory}: FAISS makes no index of it for width {dim}: {reason(error)}"
        ) from None
    _require_lists(index, settings)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = K_FACTOR
    if not index.is_trained:
        nlist = core_of(index).nlist if isinstance(core_of(index), faiss.IndexIVF) else 1
        if nlist > num:
            raise UserError(f"--factory {settings.factory}: {nlist} cells, but only {num} vectors to train on")
        count = min(num, max(PER_CELL * nlist, LEAST_TRAINING))
        sample = np.sort(generator(settings.seed, "index training").permutation(num)[:count])
        say(f"index: training {settings.factory} on {count} of {num} vectors ({human_bytes(4 * count * dim)})")
        try:
            index.train(embeddings.read(sample))
        except RuntimeError as error:
            raise UserError(f"--factory {settings.factory}: FAISS cannot train it: {reason(error)}") from None
    return index


def _take_over(like: Path, dim: int) -> Any:
    index = load_index(like / "trained.faiss")
    if index.d != dim:
        raise UserError(f"--like {like}: of width {index.d}, the vectors have {dim}")
    return index


def _require_lists(index: Any, settings: Settings) -> None:
    """Raise UserError where lists shall lie on disk and this index has none that can."""
    if settings.on_disk and (
        isinstance(index, faiss.IndexRefine)
        or not isinstance(core_of(index), faiss.IndexIVF)
        or isinstance(core_of(index), faiss.IndexIVFFastScan)
    ):
        raise UserError(
            f"--on-disk: {settings.factory} cannot lie on disk; an IVF index without refinement and fast scan can, "
            "like IVF4096,SQfp16"
        )


def _add(index: Any, embeddings: Embeddings, _: Settings, work: Path, stop: StopRequest | None) -> Any:
    """Add all vectors, in memory."""
    with Progress("index", total=len(embeddings), unit="vectors") as progress:
        for chunk in embeddings.chunks():
            index.add(chunk)
            progress.advance(len(chunk))
            if stop is not None:
                stop.check()
    return index


def _add_on_disk(index: Any, embeddings: Embeddings, settings: Settings, work: Path, stop: StopRequest | None) -> Any:
    """Add the vectors in pieces that fit into memory, each a file of its own, then join their lists in one file."""
    _require_lists(index, settings)
    size = max(1, settings.memory // (core_of(index).code_size + 8))
    starts = range(0, len(embeddings), size)
    pieces = [work / f"piece-{number:05d}.faiss" for number in range(len(starts))]
    done = sum(min(size, len(embeddings) - s) for s, piece in zip(starts, pieces, strict=True) if piece.is_file())
    with Progress("index", total=len(embeddings), unit="vectors", done=done) as progress:
        for start, piece in zip(starts, pieces, strict=True):
            if piece.is_file():
                continue
            for chunk in embeddings.chunks(start, start + size):
                index.add(chunk)
                progress.advance(len(chunk))
                if stop is not None:
                    stop.check()
            _write(index, piece)
            index.reset()
    parts = [faiss.read_index(str(piece), faiss.IO_FLAG_MMAP) for piece in pieces]
    return _join_on_disk(index, parts, work)


def _join_on_disk(trained: Any, parts: Sequence[Any], work: Path) -> Any:
    """The lists of several indexes of one training behind each other in `lists.ivfdata`; ids count on."""
    core = core_of(trained)
    file = work / "lists.ivfdata"
    file.unlink(missing_ok=True)
    lists = faiss.OnDiskInvertedLists(core.nlist, core.code_size, str(file))
    pointers = faiss.InvertedListsPtrVector()  # pyright: ignore[reportAttributeAccessIssue]
    for part in parts:
        pointers.push_back(core_of(part).invlists)
    with quiet():
        trained.ntotal = core.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    # Not by merge_from_multiple's own shift_ids: in FAISS 1.15.1 it gives some ids twice where parts differ in size.
    offsets = np.cumsum([0] + [part.ntotal for part in parts])
    for cell in range(core.nlist):
        ids = faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))
        ids += np.repeat(offsets[:-1], [core_of(part).invlists.list_size(cell) for part in parts])
    lists.filename = file.name  # found beside the index wherever that lies
    core.replace_invlists(lists, True)
    lists.this.disown()  # pyright: ignore[reportAttributeAccessIssue]  `core` owns them now
    return trained


def _complete(
    work: Path,
    out: Path,
    index: Any,
    sources: Sequence[Embeddings],
    settings: Settings,
    key: str,
    names: pa.Array | None,
) -> dict[str, Any]:
    """Measure, write everything into `work` and rename it to `out`; returns the info."""
    known = sum(len(source) for source in sources) == index.ntotal
    if not known:
        say("index: recall is not measured, the vectors of the indexes are not where they were")
    recall = (
        measure(index, sources, queries=settings.recall_queries, target=settings.target, seed=settings.seed)
        if known
        else None
    )
    _write(index, work / "index.faiss")
    if names is not None:
        write_table(work / "names.parquet", pa.table({"id": names}))
    for piece in work.glob("piece-*.faiss"):
        piece.unlink()
    size = sum(file.stat().st_size for file in (work / "index.faiss", work / "lists.ivfdata") if file.is_file())
    info = {
        "format": FORMAT,
        "type": type_name(index),
        "factory": settings.factory,
        "metric": "cosine",
        "dim": index.d,
        "vectors": index.ntotal,
        "named": names is not None,
        "on_disk": settings.on_disk,
        "bytes": size,
        "bytes_per_vector": round(size / max(index.ntotal, 1), 1),
        "recall": recall,
        "sources": [{"path": source.source, "name": source.name} for source in sources],
        "settings": vars(settings),
        "trained_sha256": sha256(work / "trained.faiss"),
        "key": key,
        "versions": package_versions(),
        "cores": cores(),
    }
    write_json(work / "info.json", info)
    (work / "build.json").unlink()
    os.replace(work, out)
    return info


@contextmanager
def _workshop(out: Path, key: str) -> Iterator[Path]:
    """A folder beside `out` for unfinished work of this very kind; what another kind left there is removed.

    A stopped build leaves it for the next; after an error that the user must mend nothing stays.
    """
    work = out.with_name(f".{out.name}.building")
    claim = work / "build.json"
    if not claim.is_file() or read_json(claim) != key:
        shutil.rmtree(work, ignore_errors=True)
        write_json(claim, key)
    try:
        yield work
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The info of an index that is there already and of these inputs; raises UserError where something else is."""
    if not out.exists():
        return None
    if (out / "info.json").is_file() and (info := read_json(out / "info.json"))["key"] == key:
        say(f"index: finished already, see {out / 'info.json'}")
        return info
    raise UserError(f"{out}: exists already and is something else; give another name or remove it")


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:32]


def _sources(info: dict[str, Any]) -> list[Embeddings]:
    """The vectors that an index was built of, as far as they are still there."""
    found = []
    for source in info["sources"]:
        try:
            found.append(open_embeddings(source["path"], source["name"]))
        except UserError as error:
            say(f"index: {error}")
    return found


def _require_width(source: Path, dim: int, vectors: Embeddings) -> None:
    if dim != vectors.dim:
        raise UserError(f"{vectors.source}: vectors of {vectors.dim} numbers; the index {source} holds {dim}")


def _join_names(named: Sequence[tuple[str, pa.Array | None]]) -> pa.Array | None:
    """Names of several sets behind each other; raises UserError where some have names and others not."""
    arrays = [names for _, names in named if names is not None]
    if not arrays:
        return None
    for source, names in named:
        if names is None or names.type != arrays[0].type:
            kind = "none" if names is None else names.type
            raise UserError(
                f"{source}: names of type {kind} beside {arrays[0].type}; the tables beside the parts differ"
            )
    return pa.concat_arrays(arrays)


def _named(names: pa.Array | None, positions: np.ndarray) -> Any:
    return positions if names is None else names.take(pa.array(positions))


def _write(index: Any, path: Path) -> None:
    with replacing(path) as temporary:
        faiss.write_index(index, str(temporary))
