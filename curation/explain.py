"""The story of one image of a finished run: where it lies, what was found, who stays in its stead and why."""

import difflib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from runtime.errors import UserError
from runtime.files import EMBEDDED, read_json

from .rows import Rows, read_rows
from .stage import Stage

ID = re.compile(r"[0-9a-f]{6,32}")  # a content id or its beginning
SHOWN = 8  # pairs, members and neighbours of each kind
SEARCHED = 200_000  # names that are compared when a name is unknown


def explain(out: Path, name: str) -> dict[str, Any]:
    """The story of the image that `name` means in the run in `out`, or in its folder `curate`.

    name: a path (absolute, relative, or its end), a key, `TAR/KEY`, `FILE.parquet/ROW`, or a content id or its
    beginning. Raises UserError when the run is not finished, and when no image or more than one is meant.
    """
    run = _Finished(_curation(out))
    return run.story(_find(run, name))


def as_text(story: dict[str, Any]) -> str:
    """A story in lines for a terminal."""
    lines: list[str] = []
    for part, value in story.items():
        if isinstance(value, dict):
            lines += [f"{part}:", *(f"  {key}: {_word(item)}" for key, item in value.items() if item is not None)]
        elif isinstance(value, list):
            lines += [f"{part}:", *(f"  {_line(item)}" for item in value)] if value else []
        elif value is not None:
            lines.append(f"{part}: {_word(value)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Finished:
    """The files of a finished curation."""

    out: Path

    @cached_property
    def rows(self) -> Rows:
        return read_rows(Stage(self.out, "items", {}), Stage(self.out, "decode", {}))

    @cached_property
    def summary(self) -> dict[str, Any]:
        return read_json(self.out / "summary.json")

    @cached_property
    def places(self) -> list[str]:
        """For each row its full path; of a member or a parquet row the container's path, a slash and the key."""
        columns = (self.rows.table[name].to_pylist() for name in ("source", "key"))
        return [
            _full(source) + (f"/{key}" if _holds_many(source) else "") for source, key in zip(*columns, strict=True)
        ]

    def table(self, stage: str, name: str, column: str, row: int) -> list[dict[str, Any]]:
        """Rows of a stage's table where a column is `row`; none where the stage did not run."""
        path = self.out / "stages" / stage / name
        return pq.read_table(path, filters=[(column, "==", row)]).to_pylist() if path.is_file() else []

    def story(self, row: int) -> dict[str, Any]:
        item = self.rows.table.slice(row, 1).to_pylist()[0]
        fate = self._fate(item)
        story: dict[str, Any] = {"image": self.places[row], **self._where(row, item), "decoded": _decoded(item), **fate}
        stands, copies = self._exact(row)
        if copies:
            story["copy_of"] = copies
        story |= self._group(row)
        story["candidate_pairs"] = self._pairs(stands)
        story["evaluation"] = self._leak(row, stands)
        story["retrieved"] = self._retrieved(row)
        return {key: value for key, value in story.items() if value not in (None, [], {})}

    def _where(self, row: int, item: dict[str, Any]) -> dict[str, Any]:
        same = np.flatnonzero(self.rows.ids == self.rows.ids[row]) if item["item_id"] else np.array([row])
        return {
            "item_id": item["item_id"],
            "role": item["role"],
            "source_name": item["source_name"],
            "lies": {"source": item["source"], "key": item["key"], "offset": item["offset"], "bytes": item["length"],
                     "sidecars": ", ".join(side["extension"] for side in item["sidecars"]) or None},
            "same_bytes_at": [self.places[other] for other in same if other != row][:SHOWN],
        }  # fmt: skip

    def _fate(self, item: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says, and the shard's offset; nothing for images that are only seeds or evaluation."""
        path = self.out / "manifest.parquet"
        found = pq.read_table(path, filters=[("source", "==", item["source"]), ("key", "==", item["key"])]).to_pylist()
        if not found:
            return {}
        row = found[0]
        told = {"fate": row["fate"], "reason": row["reason"]}
        if row["witness_id"]:
            told["witness"] = {"item_id": row["witness_id"], "source": row["witness_source"], "cosine": row["cosine"]}
        if row["shard"]:
            index = (self.out / "shards" / row["shard"]).with_suffix(".idx")
            members = pq.read_table(index, filters=[("key", "==", row["item_id"])]).to_pylist()
            told["shard"] = {"name": row["shard"]} | {f"{m['extension']} at": m["offset"] for m in members}
        return told

    def _exact(self, row: int) -> tuple[int, list[dict[str, Any]]]:
        """The row that was searched in this row's stead, and the chain of exact copies that leads there."""
        chain = []
        while found := self.table("exact", "duplicates.parquet", "row", row):
            row = found[0]["of"]
            chain.append({"reason": found[0]["reason"], "image": self.places[row]})
        return row, chain

    def _group(self, row: int) -> dict[str, Any]:
        """Who stays for the group, by which rule, and its members."""
        gone = self.table("dedup", "groups.parquet", "row", row)
        stays = gone[0]["of"] if gone else row
        others = [entry["row"] for entry in self.table("dedup", "groups.parquet", "of", stays)]
        if not others:
            return {}
        best = [("stays: " if member == stays else "") + self._rank(member) for member in [stays, *others][:SHOWN]]
        rival = row if row != stays else others[0]
        told = {"size": len(others) + 1, "stays": self.places[stays], "because": self._because(stays, rival)}
        return {"group": told, "group_members": best}

    def _rank(self, row: int) -> str:
        area, density = int(self.rows.area[row]), self._density(row)
        return f"{self.places[row]} ({area} pixels, {density:.3f} bytes per pixel, {self.rows.ids[row][:8]})"

    def _density(self, row: int) -> float:
        return float(self.rows.num_bytes[row] / max(int(self.rows.area[row]), 1))

    def _because(self, stays: int, rival: int) -> str:
        """The first key of `groups.precedence` in which the two differ."""
        ours, theirs = int(self.rows.area[stays]), int(self.rows.area[rival])
        if ours != theirs:
            return f"{'larger' if ours > theirs else 'smaller'}: {ours} against {theirs} pixels"
        if self._density(stays) != self._density(rival):
            densities = f"{self._density(stays):.3f} against {self._density(rival):.3f}"
            return f"as large, less compressed: {densities} bytes per pixel"
        if self.rows.ids[stays] != self.rows.ids[rival]:
            return "as large and as compressed; the smaller content id stays"
        return "the same bytes; the first place stays"

    def _pairs(self, row: int) -> list[dict[str, Any]]:
        """Pairs that the join proposed, the closest to the threshold first."""
        found = self.table("dedup", "edges.parquet", "row_a", row) + self.table("dedup", "edges.parquet", "row_b", row)
        threshold = self.summary["thresholds"]["dedup"]
        limit = {True: threshold["threshold"], False: threshold["verify_threshold"]}
        scores = [(pair, pair["cosine"] if pair["score"] is None else pair["score"]) for pair in found]
        scores.sort(key=lambda scored: (abs(scored[1] - limit[scored[0]["score"] is None]), scored[0]["row_a"]))
        return [
            {
                "image": self.places[pair["row_b"] if pair["row_a"] == row else pair["row_a"]],
                "cosine": round(pair["cosine"], 4),
                "score": None if pair["score"] is None else round(pair["score"], 4),
                "threshold": limit[pair["score"] is None],
                "near_duplicate": pair["accepted"],
            }
            for pair, _ in scores[:SHOWN]
        ]

    def _leak(self, row: int, stands: int) -> list[dict[str, Any]]:
        """The evaluation image that takes it out of the pool, and the evaluation images it was compared with."""
        told = [
            {"leak": "copy" if leak["direct"] else "in a group with a copy", "image": self.places[leak["witness"]],
             "cosine": leak["cosine"]}
            for leak in self.table("guard", "leaks.parquet", "row", row)
        ]  # fmt: skip
        pairs = self.table("guard", "edges.parquet", "row_b", stands) + self.table(
            "guard", "edges.parquet", "row_a", row
        )
        pairs.sort(key=lambda pair: -(pair["cosine"] if pair["score"] is None else pair["score"]))
        return told + [
            {
                "compared_with": self.places[pair["row_a"] if pair["row_b"] == stands else pair["row_b"]],
                "cosine": round(pair["cosine"], 4),
                "score": None if pair["score"] is None else round(pair["score"], 4),
                "accepted": pair["accepted"],
            }
            for pair in pairs[:SHOWN]
        ]

    def _retrieved(self, row: int) -> list[dict[str, Any]]:
        """How the selection came by it: what selected it, its cells, and the seeds that it is near to."""
        told = self.table("retrieve", "selection.parquet", "row", row)
        told += self.table("retrieve", "clusters.parquet", "row", row)
        seeds = sorted(self.table("retrieve", "neighbours.parquet", "row", row), key=lambda found: -found["cosine"])
        told += seeds[:SHOWN]
        for entry in told:
            entry.pop("row")
            if entry.get("seed_row") is not None:
                entry["seed"] = self.places[entry.pop("seed_row")]
        return told


def _decoded(item: dict[str, Any]) -> dict[str, Any]:
    hashes = {name: None if item[name] is None else f"{item[name]:016x}" for name in ("phash", "phash_mirrored")}
    size = {name: item[name] for name in ("width", "height", "format", "orientation", "frames")}
    verdict = {"verdict": item["reason"] or "good", "detail": item["detail"]}
    return verdict | size | {"pixel_hash": item["pixel_hash"]} | hashes


def _curation(out: Path) -> Path:
    """The folder of the curation. Raises UserError when it is not finished."""
    for folder in (out, out / "curate"):
        if (folder / "manifest.parquet").is_file() and (folder / "summary.json").is_file():
            return folder
    if not out.is_dir():
        raise UserError(f"explain: no folder {out}; expected the out=... of a finished `troodon curate`")
    raise UserError(
        f"explain: no finished curation in {out}: it has no manifest.parquet\n  finish `troodon curate` first"
    )


def _find(run: _Finished, name: str) -> int:
    """The row that a name means. Raises UserError."""
    wanted, full = name.rstrip("/"), _full(name.rstrip("/"))
    extensions = run.rows.table["extension"].to_pylist()
    sources, keys = (run.rows.table[column].to_pylist() for column in ("source", "key"))
    names = [
        (place, f"{place}.{extension}") if _holds_many(source) else (place,)
        for place, source, extension in zip(run.places, sources, extensions, strict=True)
    ]
    if wanted.rpartition("/")[2].isdecimal():  # rows of parquet files are numbered with eight digits
        head, slash, row = wanted.rpartition("/")
        numbered = f"{head}{slash}{int(row):08d}"
    else:
        numbered = wanted
    tail = "/" + re.sub(r"^(\.{1,2}/)+", "", numbered)
    steps = (
        lambda row: full in names[row] or _full(numbered) in names[row],
        lambda row: keys[row] in (wanted, numbered),
        lambda row: any(known.endswith(tail) for known in names[row]),
        lambda row: any(known.rpartition(".")[0].endswith(tail) for known in names[row]),
    )
    if ID.fullmatch(wanted):
        found = np.flatnonzero(np.char.startswith(run.rows.ids, wanted))
        if len(set(run.rows.ids[found])) == 1:
            return _first_of_bytes(run, found)
        if len(found):
            raise _ambiguous(run, name, found)
    for means in steps:
        found = np.array([row for row in range(len(names)) if means(row)], dtype=np.int64)
        if len(found) == 1:
            return int(found[0])
        if len(found):
            raise _ambiguous(run, name, found)
    raise UserError(f"explain: no image {name} in {run.out}{_nearest(run, wanted)}")


def _first_of_bytes(run: _Finished, found: np.ndarray) -> int:
    """Of several places of the same bytes the one that was searched in the stead of the others."""
    path = run.out / "stages" / "exact" / "duplicates.parquet"
    copies = set(pq.read_table(path, columns=["row"])["row"].to_pylist()) if path.is_file() else set()
    return int(next((row for row in found if int(row) not in copies), found[0]))


def _ambiguous(run: _Finished, name: str, found: np.ndarray) -> UserError:
    shown = "\n".join(f"  {run.rows.ids[row] or '(unreadable)'} {run.places[row]}" for row in found[:5])
    more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
    return UserError(f"explain: {name} means {len(found)} images; give one of their paths\n{shown}{more}")


def _nearest(run: _Finished, name: str) -> str:
    """Names that are spelled alike."""
    last = {place.rpartition("/")[2]: place for place in run.places[:SEARCHED]}
    close = difflib.get_close_matches(name.rpartition("/")[2], last, n=3, cutoff=0.6)
    return (
        "; nearest: " + ", ".join(last[word] for word in close) if close else "\n  give a path, a key or a content id"
    )


def _full(source: str) -> str:
    return source if source.startswith(EMBEDDED) else os.path.abspath(os.path.expanduser(source))


def _holds_many(source: str) -> bool:
    return source.endswith((".tar", ".parquet"))


def _line(item: Any) -> str:
    if not isinstance(item, dict):
        return _word(item)
    return ", ".join(f"{key} {_word(value)}" for key, value in item.items() if value is not None)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
