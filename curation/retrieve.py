"""What is kept of the images that are left: around curated seeds, evenly over the pool, or a mixture of both.

The selection is the union of what `retrieval.methods` select (curation/selection.py) and, where asked, of the seeds
themselves, cut to `retrieval.mixture` (DINOv3 sec. 3.1).
"""

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from runtime.errors import UserError
from runtime.files import write_table
from runtime.progress import say

from .config import CurateConfig, HierarchicalConfig, active_methods
from .embed import Embedded
from .mixture import draw_mixture
from .rows import Rows
from .selection import Found, by_clusters, by_hierarchy, by_samples, seed_sets, selection_table
from .sources import parse_source
from .stage import Stage

METHODS = {"sample": by_samples, "cluster": by_clusters, "hierarchical": by_hierarchy}
SEEDS = "seeds"  # what a mixture calls the seeds that pass
EVERYTHING = "all"  # the selection where no method has work
LEFT_OUT: dict[tuple[str, ...], str] = {  # why an image is not selected, by the methods that were at work
    ("sample",): "not retrieved by any seed",
    ("cluster",): "not in a cluster around seeds",
    ("hierarchical",): "not drawn from its cluster",
}


def check_retrieval(config: CurateConfig) -> None:
    """Raise UserError for values that no schema can refuse and that need no images to be seen wrong."""
    retrieval = config.retrieval
    cluster, hierarchical = retrieval.cluster, retrieval.hierarchical
    if len(set(retrieval.methods)) != len(retrieval.methods):
        raise UserError(f"retrieval.methods: {', '.join(retrieval.methods)}: one of them is there twice")
    for name, value, least in (
        ("k", retrieval.k, 1),
        ("size", retrieval.size, 0),
        ("cluster.cells", cluster.cells, 1),
        ("cluster.min_seeds", cluster.min_seeds, 0),
        ("cluster.per_cell", cluster.per_cell, 1),
        ("cluster.per_set", cluster.per_set, 1),
        ("cluster.iterations", cluster.iterations, 1),
        ("hierarchical.iterations", hierarchical.iterations, 1),
        ("hierarchical.resampling", hierarchical.resampling, 0),
        ("hierarchical.target", hierarchical.target, int("hierarchical" in retrieval.methods)),
        *((f"hierarchical.levels[{i}]", level, 1) for i, level in enumerate(hierarchical.levels)),
    ):
        if value < least:
            raise UserError(f"retrieval.{name}: found {value}; expected {least} or more")
    for above, below in itertools.pairwise(hierarchical.levels):
        if below >= above:
            raise UserError(
                f"retrieval.hierarchical.levels: {below} does not lie below {above}; expected the clusters of each "
                f"level, most first, for example [20000, 2000, 200]"
            )
    names = [entry.source for entry in retrieval.mixture]
    for entry in retrieval.mixture:
        if not 0 < entry.weight < float("inf"):
            raise UserError(f"retrieval.mixture: weight {entry.weight} of {entry.source!r}; expected a number above 0")
        if names.count(entry.source) > 1:
            raise UserError(f"retrieval.mixture: {entry.source!r} is there twice; give it one weight")
    _check_mixture_names(config)


def check_counts(config: CurateConfig, roles: Sequence[str]) -> None:
    """Raise UserError where more is wanted than the sources hold. roles: of all items."""
    retrieval, num_pool = config.retrieval, roles.count("pool")
    num_inputs = num_pool + (roles.count("seed") if retrieval.keep_seeds else 0)
    # A method that is not used wants nothing, whatever its settings say.
    hierarchical = retrieval.hierarchical if "hierarchical" in retrieval.methods else HierarchicalConfig()
    for name, what, wanted, there in (
        ("hierarchical.target", "images", hierarchical.target, num_pool),
        ("hierarchical.levels", "clusters", max(hierarchical.levels, default=0), num_pool),
        ("size", "images", retrieval.size, num_inputs),
    ):
        if wanted > there:
            raise UserError(
                f"retrieval.{name}: {wanted} {what} wanted, the sources hold {there} images\n"
                f"  give at most {there}, less for the copies and leaks among them"
            )


def _check_mixture_names(config: CurateConfig) -> None:
    """Raise UserError when the mixture names what there is not."""
    keep = config.retrieval.keep_seeds
    methods = [*active_methods(config), *([SEEDS] if keep else [])]
    paths = [*config.source.paths, *(config.seeds.paths if keep else ())]
    sources = sorted({parse_source(path).name for path in paths})
    for entry in config.retrieval.mixture:
        if entry.source in methods and entry.source in sources:
            raise UserError(
                f"retrieval.mixture: {entry.source!r} is a method and a source; give the source another name, as in "
                f"source.paths=[mine=/my/images]"
            )
        if entry.source not in methods + sources:
            close = difflib.get_close_matches(entry.source, methods + sources, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"retrieval.mixture: no source or method {entry.source!r}{hint}\n"
                f"  sources: {', '.join(sources) or 'none'}; methods of this config: {', '.join(methods) or 'none'}"
            )


def selects(config: CurateConfig) -> bool:
    """Whether there is anything to select by; otherwise all that is left is kept."""
    options = config.retrieval
    passing = options.keep_seeds and bool(config.seeds.paths)
    return bool(active_methods(config) or passing or options.mixture or options.size)


def retrieve_stage(
    config: CurateConfig, rows: Rows, vectors: Embedded, pool: np.ndarray, leaks: np.ndarray, stage: Stage
) -> None:
    """Write `selection.parquet` (SELECTION): every image of the shards, once.

    pool: rows to choose from, sorted int64; leaks: rows of any role that an evaluation set forbids. Beside the
    selection: `not_selected.parquet` (`row`, `reason`), `neighbours.parquet` (every sample-based retrieval) and
    `clusters.parquet` (`row`, `cluster_id`, `cosine` to its centroid, and `level_1`, `level_2`, ... where there are
    several). Raises UserError for sizes that do not fit what is there.
    """
    stage.open()
    names = np.array(rows.table["source_name"].to_pylist(), dtype=object)
    pool = pool[np.argsort(rows.ids[pool], kind="stable")]
    passing = passing_seeds(config, rows, pool, leaks)
    methods = active_methods(config)
    found = {SEEDS: Found(selection_table(passing, SEEDS, seed_set=_own_sets(rows, passing)), {"unique": len(passing)})}
    found |= {name: METHODS[name](config, rows, vectors, pool) for name in METHODS if name in methods}
    if not methods:
        found[EVERYTHING] = Found(selection_table(pool, EVERYTHING), {"unique": len(pool)})
    union = pa.concat_tables(part.table for part in found.values())
    _, first = np.unique(union["row"].to_numpy(), return_index=True)
    candidates = union.take(pa.array(first))
    drawn, shares = _draw(config, rows, candidates["row"].to_numpy(), found, names)
    chosen = candidates.filter(pa.array(np.isin(candidates["row"].to_numpy(), drawn)))
    write_table(stage.file("selection.parquet"), chosen)
    write_table(stage.file("not_selected.parquet"), _not_selected(methods, pool, candidates, drawn))
    _write_evidence(stage, pool, found)
    available = len(np.union1d(pool, passing))
    say(f"retrieve: {len(drawn)} of {available} images selected")
    stage.finish(
        **{"in": available, "out": len(drawn)},
        seeds=len(rows.of("seed")),
        methods={name: part.counts for name, part in found.items()},
        selected_by_several_methods=len(union) - len(candidates),
        mixture=shares,
    )


def passing_seeds(config: CurateConfig, rows: Rows, pool: np.ndarray, leaks: np.ndarray) -> np.ndarray:
    """Rows of the seed images that go into the shards as they are, one for each content; sorted int64.

    The row is that of a pool image of the same bytes where there is one, one of `pool` before others, and else that of
    the seed. No seed passes whose bytes are those of a leak.
    """
    if not config.retrieval.keep_seeds:
        return np.empty(0, dtype=np.int64)
    seeds = rows.of("seed")
    seeds = seeds[~np.isin(rows.ids[seeds], rows.ids[leaks])]
    equal = [images[np.isin(rows.ids[images], rows.ids[seeds])] for images in (pool, rows.of("pool"), seeds)]
    of_these_bytes = np.concatenate(equal)
    _, first = np.unique(rows.ids[of_these_bytes], return_index=True)  # the first of each content
    return np.sort(of_these_bytes[first])


def _own_sets(rows: Rows, passing: np.ndarray) -> list[str]:
    """The seed set of each passing row: that of the first seed of its bytes."""
    seeds = rows.of("seed")
    ids, first = np.unique(rows.ids[seeds], return_index=True)
    return seed_sets(rows, seeds[first[np.searchsorted(ids, rows.ids[passing])]])


def _draw(
    config: CurateConfig, rows: Rows, candidates: np.ndarray, found: dict[str, Found], names: np.ndarray
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The rows that stay (sorted int64) and the share of each entry; an image counts for the first that names it."""
    mixture, size = config.retrieval.mixture, config.retrieval.size
    if not mixture and not size:
        return candidates, []
    left = candidates[np.argsort(rows.ids[candidates], kind="stable")]
    entries = [(entry.source, entry.weight) for entry in mixture] or [("the selection", 1.0)]
    members = []
    for source, _ in entries:
        if not mixture:
            named = np.ones(len(left), dtype=bool)
        elif source in found:
            named = np.isin(left, found[source].table["row"].to_numpy())
        else:
            named = names[left] == source
        members.append(left[named])
        left = left[~named]
    drawn = draw_mixture(
        members, [name for name, _ in entries], [weight for _, weight in entries], size=size, seed=config.seed
    )
    shares = [
        {"source": name, "weight": weight, "available": len(there), "drawn": len(taken)}
        for (name, weight), there, taken in zip(entries, members, drawn, strict=True)
    ]
    text = ", ".join(f"{share['drawn']} of {share['available']} {share['source']}" for share in shares)
    say(f"retrieve: mixture of {text}" + (f"; {len(left)} images are of none of these" if len(left) else ""))
    return np.sort(np.concatenate(drawn)), shares


def _not_selected(methods: tuple[str, ...], pool: np.ndarray, candidates: pa.Table, drawn: np.ndarray) -> pa.Table:
    """Every row that could have been selected and was not, with the reason; sorted."""
    selected = candidates["row"].to_numpy()
    never, cut = np.setdiff1d(pool, selected), np.setdiff1d(selected, drawn)
    reason = LEFT_OUT.get(methods, "not selected by any method")
    reasons = [reason] * len(never) + ["not drawn into the mixture"] * len(cut)
    return pa.table({"row": np.concatenate([never, cut]), "reason": pa.array(reasons, pa.string())}).sort_by("row")


def _write_evidence(stage: Stage, pool: np.ndarray, found: dict[str, Found]) -> None:
    """What the selection comes from, for the report and for anyone who wants to know."""
    columns: dict[str, np.ndarray] = {}
    for part in reversed(found.values()):  # the cells of cluster-based retrieval before those of level 1
        columns |= part.clusters
        if part.neighbours is not None:
            kept = ["seed_row", "rank", "row", "cosine", "seed_set"]
            write_table(stage.file("neighbours.parquet"), part.neighbours.select(kept))
    if columns:
        write_table(stage.file("clusters.parquet"), pa.table({"row": pool} | columns).sort_by("row"))
