"""`troodon curate explain`: the story of one image of a finished curation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EXIT_DONE

if TYPE_CHECKING:
    from runtime.signals import StopRequest

NAME = "curate explain"


def add_explain(verbs: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """The verb, which the command line knows as two words. add: `verbs.add`."""
    verb = add(
        verbs,
        NAME,
        explain_image,
        "tell what became of one image and why: copies, group, scores, leaks, seeds, shard",
        "troodon curate explain runs/mine /my/images/a.jpg\n"
        "troodon curate explain runs/mine /my/scans.tar/000123 --json\n"
        "troodon curate explain runs/mine 5f0c91",
    )
    verb.add_argument("out", metavar="OUT", help="folder of a finished curation or run")
    verb.add_argument("image", metavar="IMAGE", help="path, key, TAR/KEY, FILE.parquet/ROW or content id")
    verb.add_argument("--json", action="store_true", help="one JSON object instead of text")


def joined(arguments: list[str]) -> list[str]:
    """The arguments with the verb's two words as one; a config file of that name is given as ./explain."""
    return [NAME, *arguments[2:]] if arguments[:2] == NAME.split() else arguments


def explain_image(args: argparse.Namespace, _: StopRequest) -> int:
    from curation.explain import as_text, explain

    story = explain(Path(args.out), args.image)
    print(json.dumps(story, indent=1, ensure_ascii=False) if args.json else as_text(story))
    return EXIT_DONE
