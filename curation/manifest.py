"""What became of every input image: one row each, with the reason and the witness. And the funnel."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from runtime.config import to_dict
from runtime.environment import package_versions
from runtime.files import sha256, write_json, write_table

from .config import CurateConfig, result_hash
from .embed import Embedded
from .rows import Rows
from .stage import Stage

FATES = ("kept", "rejected", "duplicate", "leak", "not_selected")

# Contract with everyone who reads our results (docs/formats.md); a change needs a version number.
SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),  # content hash, hex; null where the file could not be read
        ("source", pa.string()),
        ("key", pa.string()),
        ("fate", pa.string()),  # one of FATES
        ("reason", pa.string()),
        ("witness_id", pa.string()),  # the image kept in its stead, or the evaluation image
        ("witness_source", pa.string()),
        ("cosine", pa.float32()),  # to the witness
        ("group_id", pa.string()),  # item_id of the image that stays for the group; null outside groups
        ("seed_set", pa.string()),  # of the seed that retrieved it from nearest
        ("rank", pa.int32()),  # among that seed's neighbours; 0 is the nearest
        ("cluster_id", pa.int64()),
        ("shard", pa.string()),
        ("width", pa.int32()),  # upright pixels
        ("height", pa.int32()),
        ("source_name", pa.string()),  # NAME of the entry NAME=PATH in source.paths, or the last part of its path
    ]
)


@dataclass
class Fates:
    """What happens to each of N rows, filled stage by stage; the first verdict stands."""

    fate: np.ndarray  # object [N]; None: still in
    reason: np.ndarray  # object [N]
    witness: np.ndarray  # int64 [N]; -1: none
    cosine: np.ndarray  # float32 [N]; nan: none

    def remove(self, rows: np.ndarray, fate: str, reason: Any, witness: Any = -1, cosine: Any = np.nan) -> None:
        """Give a fate to those of the rows that have none yet. Arrays are aligned with `rows`."""
        reason, witness, cosine = (np.broadcast_to(np.asarray(x), len(rows)) for x in (reason, witness, cosine))
        still = np.array([self.fate[row] is None for row in rows], dtype=bool)
        at = rows[still]
        self.fate[at], self.reason[at] = fate, reason[still]
        self.witness[at], self.cosine[at] = witness[still], cosine[still]


def write_manifest(
    config: CurateConfig, rows: Rows, stages: dict[str, Stage], vectors: Embedded, shard_of: dict[int, str]
) -> pa.Table:
    """Write `manifest.parquet`, rows ordered by (source, key). `stages`: those that ran, by name."""
    num_rows = len(rows.ids)
    fates = Fates(
        fate=np.full(num_rows, None, dtype=object),
        reason=np.full(num_rows, None, dtype=object),
        witness=np.full(num_rows, -1),
        cosine=np.full(num_rows, np.nan, dtype=np.float32),
    )
    bad = np.flatnonzero(~rows.good)
    fates.remove(bad, "rejected", np.array(rows.table["reason"].to_pylist(), dtype=object)[bad])
    if "retrieve" in stages:  # a seed stays even where a larger image stays for its group
        selection = stages["retrieve"].table("selection.parquet")
        fates.remove(selection.filter(pc.field("method") == "seeds")["row"].to_numpy(), "kept", "seed")
    group = np.full(num_rows, -1)
    _fill_leaks(fates, stages)
    _fill_duplicates(fates, group, rows, stages, vectors)
    seed_set = np.full(num_rows, None, dtype=object)
    rank = np.full(num_rows, -1)
    cluster = np.full(num_rows, -1)
    if "retrieve" in stages:
        selection = stages["retrieve"].table("selection.parquet")
        selected = selection["row"].to_numpy()
        seed_set[selected] = selection["seed_set"].to_pylist()
        rank[selected] = selection["rank"].fill_null(-1).to_numpy()
        if stages["retrieve"].file("clusters.parquet").is_file():
            clusters = stages["retrieve"].table("clusters.parquet")
            cluster[clusters["row"].to_numpy()] = clusters["cluster_id"].to_numpy()
        others = stages["retrieve"].table("not_selected.parquet")
        reason = np.array(others["reason"].to_pylist(), dtype=object)
        if config.retrieval.keep_seeds:
            _fill_seed_copies(fates, group, rows, np.concatenate([selected, others["row"].to_numpy()]))
        fates.remove(others["row"].to_numpy(), "not_selected", reason)
    fates.remove(np.arange(num_rows), "kept", None)
    table = _table(rows, fates, group, seed_set, rank, cluster, shard_of, _inputs(config, rows))
    write_table(Path(config.out) / "manifest.parquet", table)
    return table


def read_manifest(out: Path) -> pa.Table:
    """The manifest of a finished run."""
    return pq.read_table(out / "manifest.parquet")


def write_summary(config: CurateConfig, stages: dict[str, Stage], skipped: dict[str, str], manifest: pa.Table) -> None:
    """Write `summary.json`: the funnel, thresholds, measured recall, times, versions, hashes."""
    fates = manifest["fate"].to_pylist()
    reports = {name: stage.report() for name, stage in stages.items()}
    remaining = len(fates)
    funnel = [{"stage": "items", "in": remaining, "out": remaining, "removed": {}}]
    for name, fate in (("decode", "rejected"), ("dedup", "duplicate"), ("guard", "leak"), ("retrieve", "not_selected")):
        reasons = [r for f, r in zip(fates, manifest["reason"].to_pylist(), strict=True) if f == fate]
        removed = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        funnel.append({"stage": name, "in": remaining, "out": remaining - len(reasons), "removed": removed})
        remaining -= len(reasons)
    out = Path(config.out)
    summary = {
        "images": len(fates),
        "fates": {fate: fates.count(fate) for fate in FATES},
        "funnel": funnel,
        "skipped": skipped,
        "thresholds": {
            "dedup": to_dict(config)["dedup"],
            "guard": {name: value for name, value in to_dict(config)["guard"].items() if name != "paths"},
            "retrieval": to_dict(config)["retrieval"],
        },
        "pair_recall": reports["join"]["counts"]["pair_recall"],
        "stages": {name: report["counts"] for name, report in reports.items()},
        "seconds": {name: report["seconds"] for name, report in reports.items()},
        "versions": package_versions(),
        "config_hash": result_hash(config),
        "manifest_sha256": sha256(out / "manifest.parquet"),
    }
    write_json(out / "summary.json", summary)


def _fill_leaks(fates: Fates, stages: dict[str, Stage]) -> None:
    if "guard" not in stages:
        return
    leaks = stages["guard"].table("leaks.parquet")
    direct = leaks["direct"].to_numpy(zero_copy_only=False)
    reason = np.where(direct, "copy of an evaluation image", "in a group with a copy of an evaluation image")
    cosine = leaks["cosine"].fill_null(np.nan).to_numpy()
    fates.remove(leaks["row"].to_numpy(), "leak", reason.astype(object), leaks["witness"].to_numpy(), cosine)


def _fill_duplicates(fates: Fates, group: np.ndarray, rows: Rows, stages: dict[str, Stage], vectors: Embedded) -> None:
    """Copies and near-duplicates with the image that stays; `group` becomes the row that stays, -1 outside groups."""
    groups = stages["dedup"].table("groups.parquet")
    gone, stays = groups["row"].to_numpy(), groups["of"].to_numpy()
    group[gone], group[stays] = stays, stays
    copies = stages["exact"].table("duplicates.parquet")
    reason = np.full(len(group), "near-duplicate", dtype=object)
    reason[copies["row"].to_numpy()] = copies["reason"].to_pylist()
    embedded = np.arange(len(group))  # an exact copy has the vector of the copy that was embedded
    for row, of in zip(*(copies[name].to_pylist()[::-1] for name in ("row", "of")), strict=True):
        embedded[row] = embedded[of]
    pairs = np.stack([embedded[gone], embedded[stays]], axis=1)
    fates.remove(gone, "duplicate", reason[gone], stays, vectors.cosines(pairs))


def _inputs(config: CurateConfig, rows: Rows) -> np.ndarray:
    """Rows of the manifest: the pool, and the seeds where they pass, but no file twice; sorted int64."""
    pool = np.flatnonzero(rows.role == "pool")
    if not config.retrieval.keep_seeds:
        return pool
    places = list(zip(rows.table["source"].to_pylist(), rows.table["offset"].to_pylist(), strict=True))
    known = {places[row] for row in pool}
    seeds = [row for row in np.flatnonzero(rows.role == "seed") if places[row] not in known]
    return np.union1d(pool, np.array(seeds, dtype=np.int64))


def _fill_seed_copies(fates: Fates, group: np.ndarray, rows: Rows, considered: np.ndarray) -> None:
    """Seeds of the bytes of another row share its fate: leaks of a leak, duplicates of what could be selected."""
    seeds = np.setdiff1d(rows.of("seed"), considered)
    seeds = seeds[[fate is None for fate in fates.fate[seeds]]]
    leak = {rows.ids[row]: row for row in np.flatnonzero(fates.fate == "leak")}
    there = {rows.ids[row]: row for row in considered}
    for seed in seeds:
        if (row := leak.get(rows.ids[seed])) is not None:
            fates.remove(np.array([seed]), "leak", fates.reason[row], fates.witness[row], fates.cosine[row])
        elif (row := there.get(rows.ids[seed])) is not None:
            group[[seed, row]] = row
            fates.remove(np.array([seed]), "duplicate", "same bytes", row, 1.0)


def _table(
    rows: Rows,
    fates: Fates,
    group: np.ndarray,
    seed_set: np.ndarray,
    rank: np.ndarray,
    cluster: np.ndarray,
    shard_of: dict[int, str],
    pool: np.ndarray,
) -> pa.Table:
    ids = rows.table["item_id"].to_pylist()
    sources = rows.table["source"].to_pylist()
    columns = {
        "item_id": [ids[row] for row in pool],
        "source": [sources[row] for row in pool],
        "key": rows.table["key"].take(pa.array(pool)).to_pylist(),
        "fate": fates.fate[pool].tolist(),
        "reason": fates.reason[pool].tolist(),
        "witness_id": [ids[w] if w >= 0 else None for w in fates.witness[pool]],
        "witness_source": [sources[w] if w >= 0 else None for w in fates.witness[pool]],
        "cosine": pa.array(fates.cosine[pool], mask=np.isnan(fates.cosine[pool])),
        "group_id": [ids[g] if g >= 0 else None for g in group[pool]],
        "seed_set": seed_set[pool].tolist(),
        "rank": [int(r) if r >= 0 else None for r in rank[pool]],
        "cluster_id": pa.array(cluster[pool], mask=cluster[pool] < 0),
        "shard": [shard_of.get(int(row)) for row in pool],
        "width": rows.table["width"].take(pa.array(pool)),
        "height": rows.table["height"].take(pa.array(pool)),
        "source_name": rows.table["source_name"].take(pa.array(pool)),
    }
    return pa.table({name: pa.chunked_array([c]) if not isinstance(c, list | pa.Array | pa.ChunkedArray) else c
                     for name, c in columns.items()}, schema=SCHEMA)  # fmt: skip
