"""A curation in figures: how copies were searched and how many of them were found, what each threshold would leave,
what the ways of retrieval brought.

Read from `summary.json` and the plan of the join (docs/formats.md); what a run does not have is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from runtime.files import read_json

from .charts import Curve, interval, threshold_chart

Counts = dict[str, Any]
WAYS = {  # of making groups: what they are called, what they are
    "components": ("components", "all that hang together become one image, as in DINOv2"),
    "leader": (
        "leader",
        "an image goes only for a copy that stays; those of the same bytes, pixels or look went before",
    ),
}
AXES = {  # of the survivor curves
    "score": "by the agreement of the aligned pictures, less what their cosine lacks",
    "cosine": "by the cosine of the copy vectors alone",
}


@dataclass(frozen=True)
class Figures:
    """A small table."""

    title: str
    why: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1  # columns of words, the others are numbers


@dataclass(frozen=True)
class Search:
    """How pairs of copies were searched, and the share of them that was found."""

    how: str
    recall: str  # with its interval; empty where no pair was there to be found
    svg: str
    means: str
    reasons: list[str]  # of the plan; empty where its file is gone


@dataclass(frozen=True)
class Survivors:
    """What other thresholds and the other way of grouping would leave."""

    why: str
    groups: Figures
    charts: list[tuple[str, str]]  # title, SVG


@dataclass(frozen=True)
class Facts:
    sources: Figures | None
    search: Search | None
    survivors: Survivors | None
    retrieval: list[Figures]


def read_facts(folder: Path, manifest: pa.Table) -> Facts:
    """The figures of a curation's folder."""
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    stages, thresholds = summary.get("stages", {}), summary.get("thresholds", {})
    plan = folder / "stages" / "index" / "plan.json"
    dedup = stages.get("dedup", {})
    return Facts(
        sources=by_source(manifest),
        search=search(summary["pair_recall"], plan) if summary.get("pair_recall") else None,
        survivors=survivors(dedup, thresholds["dedup"]) if "survivors" in dedup else None,
        retrieval=retrieval(stages.get("retrieve", {})),
    )


def by_source(manifest: pa.Table) -> Figures | None:
    """What became of the images of each source; None where all are of one."""
    if "source_name" not in manifest.column_names:
        return None
    names = sorted(manifest["source_name"].unique().to_pylist(), key=str)
    if len(names) < 2:
        return None
    fates = ("kept", "duplicate", "leak", "not_selected", "rejected")
    rows = []
    for name in names:
        own = manifest.filter(pc.field("source_name") == name)
        found = {entry["values"]: entry["counts"] for entry in own["fate"].value_counts().to_pylist()}
        rows.append([str(name), str(len(own)), *(str(found.get(fate, 0)) for fate in fates)])
    columns = ["source", "images in", *(fate.replace("_", " ") for fate in fates)]
    return Figures("By source", "A copy counts for the source of the image that went.", columns, rows)


def search(recall: Counts, plan: Path) -> Search:
    """The measured recall of the join and the plan's reasons."""
    reasons = read_json(plan)["pool"]["reasons"] if plan.is_file() else []
    said, svg = "", ""
    if recall["recall"] is not None:
        low, high = recall["interval_95"]
        said = (
            f"{_percent(recall['recall'])} of the pairs found ({recall['found']} of {recall['pairs']}), 95 % interval "
            f"{_percent(low)} to {_percent(high)}, measured on {recall['sampled_images']} random images"
        )
        svg = interval(recall["recall"], low, high)
    return Search(recall["search"], said, svg, recall["means"], list(reasons))


def survivors(dedup: Counts, thresholds: Counts) -> Survivors:
    """Both ways of grouping, and the curves. dedup: counts of the stage; thresholds: its settings."""
    used = thresholds["groups"]
    rows = [
        [
            WAYS[name][0] + (" (used)" if name == used else ""),
            WAYS[name][1],
            str(found["out"]),
            str(found["removed"]),
            f"{found['unsupported']} ({_percent(found['share'])})",
            str(found["without_edge_to_any_kept"]),
        ]
        for name, found in dedup["groups"].items()
    ]
    columns = ["groups", "", "images left", "removed", "unsupported", "without any kept copy"]
    why = (
        "A removal is unsupported when the image is no copy of the one that stands for it, but of a copy of a copy. "
        "Removed counts exact copies too."
    )
    decided, at = ("score", "verify_threshold") if thresholds["verify"] else ("cosine", "threshold")
    marks = {decided: (thresholds[at], dedup["out"])}
    charts = []
    for axis in (axis for axis in AXES if axis in dedup["survivors"]):
        curves = [
            Curve(name, [(t, n) for t, n in points], dashed=name != "components")
            for name, points in dedup["survivors"][axis].items()
        ]
        title = AXES[axis] + ("" if axis in marks else ", which did not decide")
        charts.append((title, threshold_chart(curves, mark=marks.get(axis), title=f"images left {title}")))
    left = (
        f"{dedup['in']} images were compared, {dedup['edges']} of {dedup['candidate_pairs']} candidate pairs are "
        f"copies, the largest group has {dedup['largest_group']} images. The curves say how many images another "
        f"threshold would leave; the upright line is the threshold of this run."
    )
    return Survivors(left, Figures("Two ways of making groups", why, columns, rows, texts=2), charts)


def retrieval(counts: Counts) -> list[Figures]:
    """What each way of retrieval selected. counts: of the stage retrieve."""
    methods = {name: found for name, found in counts.get("methods", {}).items() if name != "all"}
    found = []
    if by_k := methods.get("sample", {}).get("by_k"):
        found.append(
            Figures(
                "Yield of the seeds",
                f"Images that the {counts['seeds']} seeds retrieve with k neighbours each. What several seeds ask for "
                f"is a collision and counts once; where collisions grow as fast as the retrieved, a larger k brings "
                f"little.",
                ["k", "retrieved", "different images", "collisions"],
                _cells(by_k, "k", "retrieved", "unique", "collisions"),
            )
        )
    if sets := methods.get("cluster", {}).get("sets"):
        found.append(
            Figures(
                "Cells around the seeds",
                f"Of {methods['cluster']['cells']} k-means cells those with more than retrieval.cluster.min_seeds of a "
                f"set's seeds.",
                ["seed set", "seeds", "cells", "images in them", "taken"],
                _cells(sets, "seed_set", "seeds", "cells", "retrieved", "taken"),
            )
        )
    if levels := methods.get("hierarchical", {}).get("levels"):
        numbered = [{"level": level, **row} for level, row in enumerate(levels, start=1)]
        found.append(
            Figures(
                "Levels of the hierarchy",
                f"{methods['hierarchical']['unique']} images were drawn evenly from the highest level down.",
                ["level", "clusters", "largest", "median", "most drawn from one"],
                _cells(numbered, "level", "clusters", "largest", "median", "drawn_from_one_at_most"),
            )
        )
    if counts.get("mixture"):
        found.append(
            Figures(
                "Mixture",
                "The selection was cut to these weights; nothing is repeated.",
                ["of", "weight", "available", "drawn"],
                _cells(counts["mixture"], "source", "weight", "available", "drawn"),
            )
        )
    return found


def _cells(rows: Sequence[Counts], *names: str) -> list[list[str]]:
    """The named values of each row as text."""
    return [[f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]


def _percent(share: float) -> str:
    """A share with the digits that one reads near 100 %: 46.4 %, 99.87 %, 100 %."""
    value = 100 * share
    digits = 2 if value > 99 else 1
    return f"{value:.{digits}f}".removesuffix(".00").removesuffix(".0") + "\u00a0%"
