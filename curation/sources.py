"""Names of sources: `NAME=PATH` in a config, or the name that a path has by itself."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.files import EMBEDDED, locate

# A name has no slash, so `/data/date=2020` is a path; a path whose first part holds "=" is written ./date=2020.
NAMED = re.compile(r"([^/=:*?\[\]]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One entry of `source.paths`, `seeds.paths` or `guard.paths`."""

    name: str  # as mixtures and the manifest call it
    path: str  # folder, tar, parquet file, image or glob


def parse_source(entry: str) -> Source:
    """`NAME=PATH`, or a path, whose name is its last part without extension (of a glob: the last part before it)."""
    match = NAMED.fullmatch(entry)
    if match:
        return Source(match[1], match[2])
    return Source(_default_name(entry), entry)


def parse_sources(field: str, entries: Sequence[str]) -> list[Source]:
    """The sources of a field of the config. Raises UserError when two paths have one name."""
    found: dict[str, Source] = {}
    for source in map(parse_source, entries):
        other = found.setdefault(source.name, source)
        if other.path != source.path:
            raise UserError(
                f"{field}: {other.path} and {source.path} are both called {source.name!r}\n"
                f"  give them names: {field}=[{source.name}-1={other.path},{source.name}-2={source.path}]"
            )
    return list(found.values())


def _default_name(path: str) -> str:
    plain = path.removeprefix(EMBEDDED)
    parts = [part for part in re.split(r"[^/]*[*?\[]", plain)[0].split("/") if part]
    if not parts or parts[-1] in (".", "..", "~"):
        parts = os.path.abspath(locate("/".join(parts) or ".")).split("/")
    last = parts[-1]
    if plain.rstrip("/").endswith(last):  # not of a glob's folder, which keeps its dots
        last = re.sub(r"\.(tar\.gz|[A-Za-z]\w{0,7})$", "", last) or last
    return last or path
