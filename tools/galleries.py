"""A curation's decisions as pictures: groups, close calls, leaks, what the seeds brought, rejects.

Read from its manifest and, where they are still there, from the tables of its stages (docs/formats.md). Only the rows
that a page shows are turned into Python objects, so that a manifest of millions costs seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from runtime.files import human_bytes

from .curation_facts import Facts, read_facts
from .thumbnails import Album, Picture

# How much of each gallery a page shows.
GROUPS, GROUP_SIZE, PAIRS, SEED_SETS, SEEDS, NEIGHBOURS, EXAMPLES = 10, 8, 16, 12, 2, 8, 3
CLUSTERS, CLUSTER_END, HEAD = 8, 4, 24  # images of a cluster from each end; bytes shown of a rejected file

# Fates in the order in which they are decided: what a person calls the images left after it, and those that it took.
FATES = {
    "rejected": ("readable", "unreadable"),
    "duplicate": ("unique", "duplicates"),
    "leak": ("not leaked", "leaks"),
    "not_selected": ("selected", "not selected"),
}
Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class PictureSet:
    """Pictures that belong together, in one frame."""

    label: str
    pictures: list[Picture]
    mark: str = ""  # style of the label: drop


@dataclass(frozen=True)
class Gallery:
    anchor: str
    short: str  # name in the list of contents
    title: str
    why: str
    sets: list[PictureSet]
    rest: str  # what is not shown


@dataclass(frozen=True)
class Step:
    """One step of the funnel; widths are percentages of what came in at the top."""

    name: str
    came: int
    left: int
    width: float
    lost: float
    note: str


@dataclass(frozen=True)
class Example:
    """A rejected file: its name, its size and how it begins; sizes are empty where it is not there any more."""

    name: str
    size: str
    head: str


@dataclass(frozen=True)
class Reject:
    reason: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Curation:
    """What a page says of a curation."""

    came: int
    kept: int
    left_out: dict[str, int]  # what a person calls it -> images
    funnel: list[Step]
    galleries: list[Gallery]
    rejects: list[Reject]
    facts: Facts


def read_curation(folder: Path) -> Curation:
    """A curation's decisions, with pictures read from where the images lie."""
    manifest = pq.read_table(folder / "manifest.parquet")
    fates = count(manifest["fate"])
    album = Album()
    stages = folder / "stages"
    places = Places(stages / "items")
    galleries = [
        duplicate_groups(manifest, album),
        *near_misses(stages / "dedup" / "edges.parquet", places, album),
        leaks(manifest, stages / "guard" / "leaks.parquet", places, album),
        *near_leaks(stages / "guard" / "edges.parquet", places, album),
        *neighbours(stages / "retrieve" / "neighbours.parquet", places, album),
        *clusters(stages / "retrieve", places, album),
    ]
    return Curation(
        came=len(manifest),
        kept=fates.get("kept", 0),
        left_out={called: fates.get(fate, 0) for fate, (_, called) in FATES.items()},
        funnel=funnel(manifest),
        galleries=[gallery for gallery in galleries if gallery.sets],
        rejects=rejects(manifest, album),
        facts=read_facts(folder, manifest),
    )


class Places:
    """Source and key of every row of the items stage, which the tables of the other stages number."""

    def __init__(self, items: Path):
        parts = sorted(items.glob("part-*.parquet"))
        tables = [pq.read_table(part, columns=["source", "key"]) for part in parts]
        self.table = pa.concat_tables(tables) if tables else None

    def __bool__(self) -> bool:
        return self.table is not None

    def __getitem__(self, row: int) -> tuple[str, str]:
        assert self.table is not None
        return self.table["source"][row].as_py(), self.table["key"][row].as_py()


def count(column: pa.ChunkedArray) -> dict[Any, int]:
    """How often each value occurs, the commonest first, nulls left out."""
    found = {entry["values"]: entry["counts"] for entry in column.drop_null().value_counts().to_pylist()}
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], str(entry[0]))))


def funnel(manifest: pa.Table) -> list[Step]:
    """How many images were left after each kind of decision, in the order in which they are made."""
    share = 100 / max(len(manifest), 1)
    steps = [Step("images in", len(manifest), len(manifest), 100.0, 0.0, "")]
    for fate, (name, called) in FATES.items():
        gone = manifest.filter(pc.field("fate") == fate)
        came, left = steps[-1].left, steps[-1].left - len(gone)
        reasons = ", ".join(f"{number} {reason}" for reason, number in count(gone["reason"]).items())
        note = f"{len(gone)} {called}{f': {reasons}' if reasons else ''}" if len(gone) else ""
        steps.append(Step(name, came, left, left * share, (came - left) * share, note))
    return steps


def duplicate_groups(manifest: pa.Table, album: Album) -> Gallery:
    """The largest groups: the image that was kept, then the copies it stands for, by falling cosine."""
    copies = manifest.filter(pc.field("fate") == "duplicate")
    sizes = count(copies["group_id"])
    sets = []
    for group in list(sizes)[:GROUPS]:
        rows = sorted(copies.filter(pc.field("group_id") == group).to_pylist(), key=lambda row: -_cosine(row))
        witnesses = sorted({row["witness_id"] for row in rows})
        kept = manifest.filter(pc.field("item_id").isin(witnesses) & (pc.field("fate") != "duplicate"))
        pictures = [
            album.picture(row["source"], row["key"], row["fate"].replace("_", " "), mark=row["fate"])
            for row in kept.to_pylist()
        ]
        pictures += [album.picture(row["source"], row["key"], _how(row), mark="drop") for row in rows[:GROUP_SIZE]]
        more = f", {len(rows) - GROUP_SIZE} of them not shown" if len(rows) > GROUP_SIZE else ""
        sets.append(PictureSet(f"{len(rows)} left out{more}", pictures))
    return Gallery(
        "duplicates",
        "Duplicates",
        "Duplicates",
        f"{len(copies)} images were left out because a copy of them stays. The first image of a group stands for the "
        f"others; under those, their cosine to it, or what gave them away before a model looked.",
        sets,
        f"{len(sizes) - GROUPS} smaller groups are not shown." if len(sizes) > GROUPS else "",
    )


def near_misses(path: Path, places: Places, album: Album) -> list[Gallery]:
    """Pairs just above and just below the line between copy and look-alike."""
    sets = close_calls(path, places, album, names=("copies", "kept apart"), mark="drop", number=PAIRS)
    why = (
        "The least sure decisions: pairs that just counted as copies, then pairs that were just kept apart. Agreement "
        "is that of the two pictures laid on each other, 0 to 1, less what their cosine lacks to dedup.sure_cosine. If "
        "they look wrong, move dedup.verify_threshold (or "
        "dedup.threshold, where pictures are not compared)."
    )
    return [Gallery("threshold", "Threshold", "Close calls", why, sets, "")]


def near_leaks(path: Path, places: Places, album: Album) -> list[Gallery]:
    """The same of the guard: evaluation image left, pool image right."""
    sets = close_calls(path, places, album, names=("leak", "no leak"), mark="leak", number=PAIRS // 2)
    why = (
        "Left an evaluation image, right a pool image: pairs that just counted as copies, then pairs that just did "
        "not. guard.verify_threshold moves the line (guard.threshold, where pictures are not compared)."
    )
    return [Gallery("guard-threshold", "Guard", "Close calls of the guard", why, sets, "")]


def close_calls(
    path: Path, places: Places, album: Album, *, names: tuple[str, str], mark: str, number: int
) -> list[PictureSet]:
    """The weakest accepted pairs and the strongest others of a table of judged pairs; `names` and `mark` label them."""
    if not places or not path.is_file():
        return []
    edges = pq.read_table(path)
    score, cosine = (edges[name].to_numpy(zero_copy_only=False) for name in ("score", "cosine"))  # null becomes NaN
    edges = edges.append_column("worth", pa.array(np.where(np.isnan(score), cosine, score)))
    sets = []
    for accepted, verdict, style, order in ((True, names[0], mark, "ascending"), (False, names[1], "", "descending")):
        chosen = edges.filter(pc.field("accepted") == accepted)
        chosen = chosen.sort_by([("worth", order), ("row_a", "ascending"), ("row_b", "ascending")])
        for edge in chosen.slice(0, number // 2).to_pylist():
            pictures = [album.picture(*places[edge[name]], "") for name in ("row_a", "row_b")]
            agreement = "" if edge["score"] is None else f" · agreement {edge['score']:.3f}"
            sets.append(PictureSet(f"{verdict} · cosine {edge['cosine']:.3f}{agreement}", pictures, style))
    return sets


def leaks(manifest: pa.Table, path: Path, places: Places, album: Album) -> Gallery:
    """Pool images that were taken out because an evaluation set holds them, each beside its witness.

    `path`: the guard stage's own table, which says which image of a tar or parquet file a witness is.
    """
    found = manifest.filter(pc.field("fate") == "leak")
    found = found.sort_by([("cosine", "descending"), ("source", "ascending"), ("key", "ascending")])
    shown = found.take(spread(range(len(found)), PAIRS)).to_pylist() if len(found) else []
    several = any(row["witness_source"].endswith((".tar", ".parquet")) for row in shown)  # images in one file
    members = _witnesses(path, places) if several else {}
    sets = []
    for row in shown:
        source, key = row["source"], row["key"]
        witness = members.get((source, key), (row["witness_source"], row["witness_id"]))
        pictures = [album.picture(source, key, _how(row), mark="leak"), album.picture(*witness, "evaluation")]
        sets.append(PictureSet("", pictures))
    return Gallery(
        "leaks",
        "Leaks",
        "Leaks of the evaluation sets",
        f"{len(found)} pool images were taken out because they are copies of images that the model will be judged on. "
        f"Left the pool image with its cosine, right the evaluation image.",
        sets,
        f"{len(sets)} of them, evenly from the surest to the least sure." if len(found) > PAIRS else "",
    )


def _witnesses(path: Path, places: Places) -> dict[tuple[str, str], tuple[str, str]]:
    """Source and key of a leak -> source and key of its evaluation image."""
    if not places or not path.is_file():
        return {}
    table = pq.read_table(path, columns=["row", "witness"]).to_pydict()
    return {places[row]: places[witness] for row, witness in zip(table["row"], table["witness"], strict=True)}


def neighbours(path: Path, places: Places, album: Album) -> list[Gallery]:
    """What the seeds brought: a few seeds of every set with their nearest pool images."""
    if not places or not path.is_file():
        return []
    table = pq.read_table(path)
    names = sorted(count(table["seed_set"]))
    sets = []
    for name in names[:SEED_SETS]:
        retrieved = table.filter(pc.field("seed_set") == name)
        for seed in spread(sorted(count(retrieved["seed_row"])), SEEDS):
            nearest = retrieved.filter(pc.field("seed_row") == seed).sort_by("rank").slice(0, NEIGHBOURS)
            pictures = [album.picture(*places[seed], "seed", mark="kept")]
            pictures += [
                album.picture(*places[row["row"]], f"{row['rank'] + 1}. {row['cosine']:.3f}")
                for row in nearest.to_pylist()
            ]
            sets.append(PictureSet(name, pictures))
    why = "Framed a seed, beside it the pool images that are nearest to it for the embedder, with place and cosine."
    rest = f"Up to {SEEDS} seeds of a set are shown"
    rest += f", and {SEED_SETS} of {len(names)} sets." if len(names) > SEED_SETS else "."
    return [Gallery("neighbours", "Neighbours", "What the seeds brought", why, sets, rest)]


def clusters(folder: Path, places: Places, album: Album) -> list[Gallery]:
    """Clusters of all sizes: the images nearest to the middle of each, and those farthest from it."""
    path = folder / "clusters.parquet"
    if not places or not path.is_file():
        return []
    table = pq.read_table(path, columns=["row", "cluster_id", "cosine"])
    selected = pq.read_table(folder / "selection.parquet", columns=["row"])["row"]
    table = table.append_column("selected", pa.array(np.isin(table["row"].to_numpy(), selected.to_numpy())))
    sizes = count(table["cluster_id"])
    sets = []
    for name in spread(list(sizes), CLUSTERS):
        members = table.filter(pc.field("cluster_id") == name).sort_by([("cosine", "descending"), ("row", "ascending")])
        ends = members.to_pylist() if len(members) <= 2 * CLUSTER_END else _ends(members)
        pictures = [
            album.picture(*places[row["row"]], f"{row['cosine']:.3f}", mark="kept" if row["selected"] else "")
            for row in ends
        ]
        taken = int(members["selected"].to_numpy().sum())
        sets.append(PictureSet(f"cluster {name}: {len(members)} images, {taken} selected", pictures))
    why = (
        f"Of each cluster the {CLUSTER_END} images nearest to its middle and the {CLUSTER_END} farthest from it, with "
        f"their cosine to it; framed what was selected. Clusters that mix everything speak against the embedder."
    )
    rest = f"{len(sets)} of {len(sizes)} clusters, from the largest to the smallest." if len(sizes) > CLUSTERS else ""
    return [Gallery("clusters", "Clusters", "Clusters of what is left", why, sets, rest)]


def _ends(members: pa.Table) -> list[Row]:
    return members.slice(0, CLUSTER_END).to_pylist() + members.slice(len(members) - CLUSTER_END).to_pylist()


def rejects(manifest: pa.Table, album: Album) -> list[Reject]:
    """Rejected files by reason, the commonest first, with a few of them."""
    gone = manifest.filter(pc.field("fate") == "rejected")
    found = []
    for reason, number in count(gone["reason"]).items():
        rows = gone.filter(pc.field("reason") == reason).slice(0, EXAMPLES).to_pylist()
        found.append(Reject(reason, number, [_example(row, album) for row in rows]))
    return found


def _example(row: Row, album: Album) -> Example:
    data = album.read(row["source"], row["key"])
    if data is None:
        return Example(_name(row), "", "")
    head = data[:HEAD].decode("ascii", errors="replace")
    readable = sum(character.isprintable() and character != "\ufffd" for character in head) > 0.8 * len(head)
    text = "".join(c if c.isprintable() else " " for c in head) if readable else data[: HEAD // 3].hex(" ")
    return Example(_name(row), human_bytes(len(data)), text)


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """At most `number` (2 or more) of the items, evenly over the sequence, first and last among them."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def _name(row: Row) -> str:
    """A short name for a person: the file, or the member with its tar."""
    source = Path(row["source"]).name
    return f"{source}/{row['key']}" if source.endswith((".tar", ".parquet")) else source


def _cosine(row: Row) -> float:
    return row["cosine"] if row["cosine"] is not None else 1.0


def _how(row: Row) -> str:
    """The caption of an image that was left out: what gave it away before a model looked, else its cosine."""
    if row["cosine"] is None:
        return "by its group"
    return row["reason"] if str(row["reason"]).startswith("same ") else f"{row['cosine']:.3f}"
