"""A curation's decisions as pictures: groups, near misses, leaks, what seeds brought, rejects; from its manifest."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .thumbnails import Album, Picture

GROUPS, GROUP_SIZE, PAIRS, SEEDS, NEIGHBOURS, EXAMPLES = 10, 8, 16, 3, 9, 3  # how much of each a page shows
Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class PictureSet:
    """Pictures that belong together, in one frame."""

    label: str
    pictures: list[Picture]


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
class Reject:
    reason: str
    count: int
    examples: str


@dataclass(frozen=True)
class Curation:
    """What a page says of a curation."""

    came: int
    kept: int
    left_out: dict[str, int]  # what a person calls it -> images
    funnel: list[Step]
    galleries: list[Gallery]
    rejects: list[Reject]


def read_curation(folder: Path) -> Curation:
    """A curation's decisions from its `manifest.parquet`, with pictures read from where the images lie."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "manifest.parquet").to_pylist()
    fates = Counter(row["fate"] for row in rows)
    album = Album()
    galleries = [duplicate_groups(rows, album), leaks(rows, album)]
    return Curation(
        came=len(rows),
        kept=fates["kept"],
        left_out={
            "duplicates": fates["duplicate"],
            "leaks": fates["leak"],
            "not selected": fates["not_selected"],
            "rejected": fates["rejected"],
        },
        funnel=funnel(rows),
        galleries=[gallery for gallery in galleries if gallery.sets],
        rejects=rejects(rows),
    )


def funnel(rows: Sequence[Row]) -> list[Step]:
    """How many images were left after each kind of decision, in the order in which they are made."""
    fates = Counter(row["fate"] for row in rows)
    reasons = Counter((row["fate"], row["reason"]) for row in rows if row["reason"])
    steps = [Step("images in", len(rows), len(rows), 100.0, 0.0, "")]
    for name, fate in (
        ("readable", "rejected"),
        ("unique", "duplicate"),
        ("not leaked", "leak"),
        ("selected", "not_selected"),
    ):
        came = steps[-1].left
        left = came - fates[fate]
        share = 100 / max(len(rows), 1)
        found = ", ".join(f"{count} {reason}" for (of, reason), count in reasons.most_common() if of == fate)
        note = f"{fates[fate]} {fate.replace('_', ' ')}{f': {found}' if found else ''}" if fates[fate] else ""
        steps.append(Step(name, came, left, left * share, (came - left) * share, note))
    return steps


def duplicate_groups(rows: Sequence[Row], album: Album) -> Gallery:
    """The largest groups: the image that was kept, then the copies it stands for, by falling cosine."""
    by_id = {row["item_id"]: row for row in rows if row["fate"] != "duplicate"}
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row["fate"] == "duplicate":
            groups[row["group_id"]].append(row)
    largest = sorted(groups.values(), key=lambda group: (-len(group), group[0]["item_id"]))
    sets = []
    for group in largest[:GROUPS]:
        group = sorted(group, key=lambda row: -_cosine(row))
        pictures = []
        for witness in dict.fromkeys(row["witness_id"] for row in group):
            kept = by_id.get(witness)
            if kept is not None:
                pictures.append(album.picture(kept["source"], kept["key"], "kept", mark="keep"))
        pictures += [album.picture(row["source"], row["key"], _how(row), mark="drop") for row in group[:GROUP_SIZE]]
        more = f", {len(group) - GROUP_SIZE} more not shown" if len(group) > GROUP_SIZE else ""
        sets.append(PictureSet(f"{len(group)} left out{more}", pictures))
    copies = sum(map(len, groups.values()))
    return Gallery(
        "duplicates",
        "Duplicates",
        "Duplicates",
        f"{copies} images were left out because a copy of them stays. Of each group the framed one was kept; under "
        f"the others, the cosine to it and what gave them away.",
        sets,
        f"{len(groups) - GROUPS} smaller groups are not shown." if len(groups) > GROUPS else "",
    )


def leaks(rows: Sequence[Row], album: Album) -> Gallery:
    """Pool images that were taken out because an evaluation set holds them, each beside its witness."""
    found = sorted((row for row in rows if row["fate"] == "leak"), key=lambda row: -_cosine(row))
    sets = [
        PictureSet(
            "",
            [
                album.picture(row["source"], row["key"], _how(row), mark="leak"),
                album.picture(row["witness_source"], row["witness_id"], "evaluation"),
            ],
        )
        for row in spread(found, PAIRS)
    ]
    return Gallery(
        "leaks",
        "Leaks",
        "Leaks of the evaluation sets",
        f"{len(found)} pool images were taken out because they are copies of images that the model will be judged on. "
        f"Left the pool image with its cosine, right the evaluation image.",
        sets,
        f"{len(sets)} of them, evenly from the surest to the least sure." if len(found) > PAIRS else "",
    )


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly over the sequence, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def rejects(rows: Sequence[Row]) -> list[Reject]:
    """Rejected files by reason, the commonest first, with a few names."""
    by_reason: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["fate"] == "rejected":
            by_reason[row["reason"]].append(row)
    ordered = sorted(by_reason.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [Reject(reason, len(group), ", ".join(_name(row) for row in group[:EXAMPLES])) for reason, group in ordered]


def _name(row: Row) -> str:
    """A short name for a person: the file, or the member with its tar."""
    source = Path(row["source"]).name
    return f"{source}/{row['key']}" if source.endswith(".tar") else source


def _cosine(row: Row) -> float:
    return row["cosine"] if row["cosine"] is not None else 1.0


def _how(row: Row) -> str:
    """The caption of an image that was left out: its cosine to the witness, or what else gave it away."""
    return f"{row['cosine']:.3f}" if row["cosine"] is not None else str(row["reason"])
