"""`troodon shards`: look into WebDataset tars, ours or anyone's; check them; make them readable by offset."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:
    from runtime.signals import StopRequest


def add_shards(verbs: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """The verb and its kinds. add: `verbs.add`."""
    group = add(verbs, "shards", None, "look into WebDataset tars, ours or anyone's", "troodon shards inspect --help")
    kinds = group.add_subparsers(dest="kind", metavar="KIND", required=True)
    paths = "folder of tars, or tars"
    verb = add(
        kinds,
        "inspect",
        inspect_shards,
        "count samples, formats and sizes of shards, name what is damaged or comes twice",
        "troodon shards inspect runs/mine/curate/shards\ntroodon shards inspect /data/web/*.tar --json",
    )
    verb.add_argument("paths", nargs="+", metavar="PATH", help=paths)
    verb.add_argument("--json", action="store_true", help="one JSON object instead of text")
    verb = add(
        kinds,
        "verify",
        verify_shards,
        "check shards against their manifest and index",
        "troodon shards verify runs/mine/curate/shards",
    )
    verb.add_argument("folder", metavar="PATH", help="folder of shards with manifest.json")
    verb = add(
        kinds,
        "index",
        index_shards,
        "write an .idx beside each tar that has none, so that training reads it by offset; check those that are there",
        "troodon shards index /data/web/*.tar",
    )
    verb.add_argument("paths", nargs="+", metavar="PATH", help=paths)


def inspect_shards(args: argparse.Namespace, _: StopRequest) -> int:
    from curation.shards import inspect_shards
    from runtime.files import human_bytes

    found = inspect_shards(args.paths)
    if args.json:
        print(json.dumps(found, indent=1))
        return EXIT_DONE
    print(f"{found['samples']} samples in {found['shards']} shards, {human_bytes(found['bytes'])}")
    print("members: " + ", ".join(f"{count} {extension or '(none)'}" for extension, count in found["members"].items()))
    print(f"index: beside {found['indexed']} of {found['shards']}")
    print("".join(f"{problem}\n" for problem in found["problems"]), end="")
    return EXIT_DONE


def verify_shards(args: argparse.Namespace, _: StopRequest) -> int:
    from curation.shards import verify_shards
    from runtime.progress import say

    problems = verify_shards(Path(args.folder))
    for problem in problems:
        print(problem)
    say(f"{len(problems)} problems" if problems else "all as its manifest says")
    return EXIT_FAILED if problems else EXIT_DONE


def index_shards(args: argparse.Namespace, stop: StopRequest) -> int:
    from curation.shards import index_shards

    status = EXIT_DONE
    for tar, found, fine in index_shards(args.paths):
        print(f"{tar}: {found}", flush=True)
        status = status if fine else EXIT_FAILED
        stop.check()
    return status
