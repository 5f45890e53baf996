"""How much of what was planted does curation find? Scores a manifest against a pack with truth files.

    python benchmarks/curation_truth.py quickset runs/quickstart/curate/manifest.parquet [--result NAME]
        [--pack-name TEXT]

PACK is a folder with `truth/*.csv` and `pool/index.parquet`. Pairs are transitive inside a group. Recall is given by
level of the harder copy and by edit (of copies with their unedited base), precision over pairs of photographs that are
neither planted nor unjudged, because icons, glyphs and charts resemble each other by nature. With --result the figures
are also written to benchmarks/results/, beside the thresholds, the compared pairs and the seconds of the run's summary
and the machine that scored, which is that of the run if both ran here.
"""

import argparse
import csv
import datetime
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from runtime.environment import describe

PHOTOS = {"tinyimagenet", "caltech101", "flowers"}
MOST = 400  # photographs in one group, above which all its pairs count as wrong; no group planted is as large
Pair = tuple[str, str]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a truth file; none where the pack has no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pair(a: str, b: str) -> Pair:
    return (a, b) if a < b else (b, a)


def share(hits: list[bool]) -> dict[str, Any]:
    return {"found": sum(hits), "of": len(hits), "share": round(sum(hits) / len(hits), 4) if hits else None}


def precision(hits: list[bool], wrong: int) -> dict[str, Any]:
    """Share of hits, beside so many more that are wrong."""
    total = len(hits) + wrong
    return {"found": sum(hits), "of": total, "share": round(sum(hits) / total, 4) if total else None}


def by_name(outcomes: list[tuple[str, bool]]) -> dict[str, Any]:
    """Shares of outcomes under one name, and of all."""
    names = defaultdict(list)
    for name, hit in outcomes:
        names[name].append(hit)
    return {name: share(names[name]) for name in sorted(names)} | {"all": share([hit for _, hit in outcomes])}


def score(pack: Path, manifest: Path) -> dict[str, Any]:
    """Recall and precision of duplicates and leaks in a manifest."""
    truth = pack / "truth"
    rows = {str(row["key"]): row for row in pq.read_table(manifest).to_pylist()}
    source = {row["key"]: row["source"] for row in pq.read_table(pack / "pool" / "index.parquet").to_pylist()}
    planted = defaultdict(list)
    for row in read_csv(truth / "duplicates.csv"):
        planted[row["group"]].append(row)
    unjudged = {pair(row["key_a"], row["key_b"]) for row in read_csv(truth / "unjudged_pairs.csv")}
    in_unjudged = {key for p in unjudged for key in p}
    leaks = {row["key"]: row for row in read_csv(truth / "leaks.csv")}

    def together(a: str, b: str) -> bool:
        group = rows.get(a, {}).get("group_id")
        return group is not None and group == rows.get(b, {}).get("group_id")

    true_pairs: set[Pair] = set()
    levels: list[tuple[str, bool]] = []
    edits: list[tuple[str, bool]] = []
    for group in planted.values():
        for x, y in itertools.combinations(group, 2):
            true_pairs.add(pair(x["key"], y["key"]))
            levels.append((f"level {max(int(x['level'] or 0), int(y['level'] or 0))}", together(x["key"], y["key"])))
            if "1" in (x["is_base"], y["is_base"]):
                edits.append((x["edit"] or y["edit"], together(x["key"], y["key"])))

    groups = defaultdict(list)
    for key, row in rows.items():
        if row["group_id"] is not None and source.get(key) in PHOTOS and key not in leaks:
            groups[row["group_id"]].append(key)
    small = [keys for keys in groups.values() if len(keys) <= MOST]
    heaps = sum(len(keys) * (len(keys) - 1) // 2 for keys in groups.values() if len(keys) > MOST)
    found = [pair(a, b) for keys in small for a, b in itertools.combinations(keys, 2)]
    undecided = {p for p in found if p in unjudged or (p[0] in in_unjudged and p[1] in in_unjudged)} - true_pairs
    judged = [p for p in found if p not in undecided]

    called = {key for key, row in rows.items() if row["fate"] == "leak"}
    twins = {
        row["key"] for group in planted.values() if any(r["key"] in leaks for r in group) for row in group
    }  # planted copies of a leak go with it
    excused = twins | {row["key"] for row in read_csv(truth / "unjudged_eval_pairs.csv")}
    judged_leaks = [key for key in called if key in leaks or (key not in excused and source.get(key) in PHOTOS)]
    apart = [(row["why"], not together(row["key_a"], row["key_b"])) for row in read_csv(truth / "not_duplicates.csv")]
    return {
        "images": len(rows),
        "pair_recall_by_level": by_name(levels),
        "pair_recall_by_edit": by_name(edits),
        "pair_precision_photos": precision([p in true_pairs for p in judged], heaps),
        "wrong_pairs_photos": sorted(p for p in judged if p not in true_pairs)[:50],
        "kept_apart": by_name(apart),
        "leak_recall_by_level": by_name([(f"level {row['level']}", key in called) for key, row in leaks.items()]),
        "leak_precision_photos": share([key in leaks for key in judged_leaks]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--result", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--pack-name", metavar="TEXT", help="how the result calls the pack (the folder's name)")
    args = parser.parse_args()
    result = score(args.pack, args.manifest)
    print(json.dumps(result, indent=1))
    if args.result:
        summary = args.manifest.parent / "summary.json"
        run = json.loads(summary.read_text()) if summary.is_file() else {}
        about = {
            name: run.get(name) for name in ("config_hash", "manifest_sha256", "thresholds", "seconds", "versions")
        }
        pairs = run.get("stages", {}).get("verify", {}).get("compared")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        result = {"date": date, "pack": args.pack_name or args.pack.name} | result | about
        result |= {"compared_pairs": pairs, "hardware": describe()}
        path = Path(__file__).parent / "results" / f"{args.result}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
