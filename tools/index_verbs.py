"""`troodon index`: FAISS indexes over folders of vectors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EXIT_DONE

if TYPE_CHECKING:
    from runtime.signals import StopRequest

VECTORS = "folder of .npy parts (stages/embed of a curation) or of .npy matrices, or one matrix"


def add_index(verbs: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """The verb and its kinds. add: `verbs.add`."""
    group = add(
        verbs, "index", None, "train, fill, search and merge FAISS indexes of vectors", "troodon index build -h"
    )
    kinds = group.add_subparsers(dest="kind", metavar="KIND", required=True)

    verb = add(
        kinds,
        "build",
        build,
        "train and fill an index, and measure its recall; goes on where it was stopped",
        "troodon index build runs/mine/curate/stages/embed my-index --vectors copy\n"
        "troodon index build vectors/ big-index --kind ivf --on-disk\n"
        'troodon index build vectors/ my-index --factory "OPQ48_192,IVF4096,PQ48x4fs,RFlat"',
    )
    verb.add_argument("embeddings", metavar="EMBEDDINGS", help=VECTORS)
    verb.add_argument("out", metavar="OUT", help="folder of the index")
    verb.add_argument(
        "--kind", default="ivf", choices=("flat", "ivf", "ivfpq", "rabitq", "hnsw"), help="docs/index.md compares (ivf)"
    )
    verb.add_argument("--factory", metavar="STRING", help="a FAISS factory string, instead of --kind")
    verb.add_argument("--like", metavar="INDEX", help="take over kind and training of this index, to be merged with it")
    verb.add_argument(
        "--on-disk", action="store_true", help="lists in a file that is mapped, for more than memory holds"
    )
    verb.add_argument(
        "--memory", type=float, default=4.0, metavar="GB", help="with --on-disk: of a piece in memory (4)"
    )
    verb.add_argument(
        "--recall-queries", type=int, default=1000, metavar="N", help="vectors searched exactly; 0: not measured (1000)"
    )
    verb.add_argument(
        "--target-recall", type=float, default=0.95, metavar="R", help="at 10, where it can be had (0.95)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the training sample and the recall sample (0)")
    _common(verb, vectors=True)

    verb = add(
        kinds,
        "add",
        add_vectors,
        "write an index with more vectors",
        "troodon index add my-index more-vectors/ larger-index",
    )
    verb.add_argument("index", metavar="INDEX", help="folder of the index; stays as it is")
    verb.add_argument("embeddings", metavar="EMBEDDINGS", help=VECTORS)
    verb.add_argument("out", metavar="OUT", help="folder of the new index")
    _common(verb, vectors=True)

    verb = add(
        kinds,
        "merge",
        merge,
        "put indexes of one training together (build --like)",
        "troodon index merge part-a part-b whole",
    )
    verb.add_argument("indexes", nargs="+", metavar="INDEX", help="folders of the indexes; stay as they are")
    verb.add_argument("out", metavar="OUT", help="folder of the new index")
    _common(verb)

    verb = add(
        kinds,
        "search",
        search,
        "find the nearest vectors of queries",
        "troodon index search my-index queries.npy --k 10 --out neighbours.parquet",
    )
    verb.add_argument("index", metavar="INDEX", help="folder of the index, or a FAISS file")
    verb.add_argument("queries", metavar="QUERIES", help=VECTORS)
    verb.add_argument("--k", type=int, default=10, help="neighbours of each query (10)")
    verb.add_argument("--out", required=True, metavar="FILE", help="parquet table: query, rank, id, cosine")
    _common(verb, vectors=True)

    verb = add(
        kinds, "info", info, "say what an index is and what it finds", "troodon index info my-index --json"
    )  # fmt: skip
    verb.add_argument("index", metavar="INDEX", help="folder of the index, or a FAISS file")
    _common(verb)


def _common(verb: argparse.ArgumentParser, *, vectors: bool = False) -> None:
    if vectors:
        verb.add_argument("--vectors", metavar="NAME", help="of parts of several models (part-00000-NAME.npy), which")
    verb.add_argument("--json", action="store_true", help="one JSON object instead of text")


def build(args: argparse.Namespace, stop: StopRequest) -> int:
    from curation.embeddings import open_embeddings
    from curation.index import Settings, build_index
    from curation.index_kinds import preset

    embeddings = open_embeddings(args.embeddings, args.vectors)
    like = Path(args.like) if args.like else None
    factory = args.factory or preset(args.kind, len(embeddings), embeddings.dim, on_disk=args.on_disk)
    settings = Settings(
        factory=factory,
        on_disk=args.on_disk,
        memory=round(args.memory * 1e9),
        seed=args.seed,
        recall_queries=args.recall_queries,
        target=args.target_recall,
    )
    return show(build_index(embeddings, Path(args.out), settings, like=like, stop=stop), args)


def add_vectors(args: argparse.Namespace, stop: StopRequest) -> int:
    from curation.embeddings import open_embeddings
    from curation.index import add_to_index

    embeddings = open_embeddings(args.embeddings, args.vectors)
    return show(add_to_index(Path(args.index), embeddings, Path(args.out), stop=stop), args)


def merge(args: argparse.Namespace, _: StopRequest) -> int:
    from curation.index import merge_indexes

    return show(merge_indexes([Path(index) for index in args.indexes], Path(args.out)), args)


def search(args: argparse.Namespace, stop: StopRequest) -> int:
    from curation.embeddings import open_embeddings
    from curation.index import search_index

    queries = open_embeddings(args.queries, args.vectors)
    counts = search_index(Path(args.index), queries, args.k, Path(args.out), stop=stop)
    print(json.dumps(counts, indent=1) if args.json else counts["out"])
    return EXIT_DONE


def info(args: argparse.Namespace, _: StopRequest) -> int:
    from curation.index import describe_index

    return show(describe_index(Path(args.index)), args)


def show(found: dict[str, Any], args: argparse.Namespace) -> int:
    """Print the info of an index: all of it as JSON, or what a person looks for."""
    print(json.dumps(found, indent=1) if args.json else "\n".join(summary(found)))
    return EXIT_DONE


def summary(found: dict[str, Any]) -> list[str]:
    """An index in a few lines."""
    from runtime.files import human_bytes

    place = ", lists on disk" if found.get("on_disk") else ""
    lines = [
        f"type     {found['type']}" + (f" ({found['factory']})" if "factory" in found else ""),
        f"vectors  {found['vectors']} of width {found['dim']}",
        f"size     {human_bytes(found['bytes'])}, {found['bytes_per_vector']} bytes per vector{place}",
    ]
    recall = found["recall"]
    if recall is None:
        return [*lines, "recall   not measured"]
    for depth in sorted(int(name.removeprefix("recall_at_")) for name in recall if name.startswith("recall_at_")):
        low, high = recall[f"interval_at_{depth}"]
        lines.append(f"recall   {recall[f'recall_at_{depth}']:.4f} at {depth} (95 % interval {low:.4f} to {high:.4f})")
    setting = ", ".join(f"{name} {recall[name]}" for name in ("nprobe", "efSearch", "k_factor") if name in recall)
    timing = f"{recall['ms_per_query']} ms per query in a batch of {recall['queries']} on {recall['threads']} threads"
    return [*lines, f"search   {setting + ', ' if setting else ''}{timing}"]
