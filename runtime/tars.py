"""Tar files as tables of members: offsets and lengths from a walk over the headers, no data read.

The same rules as webdataset: a sample is a run of members whose names agree up to the first dot of the base name.
"""

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """One regular file inside a tar. `tar[offset : offset + length]` are its bytes."""

    key: str  # name up to the first dot of its base name, folders included; the whole name where there is no dot
    extension: str  # what follows that dot, lower case; "" where there is no dot or nothing before it
    name: str
    offset: int  # bytes
    length: int  # bytes


def scan_tar(path: str | Path) -> tuple[list[Member], str | None]:
    """The complete regular files of a plain tar, in tar order, and where a cut-off or damaged tar ended (None: whole).

    Raises UserError for a compressed tar (no random access) and for a missing file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"tar: no file {path}")
    size = path.stat().st_size
    if size == 0:
        return [], "zero bytes"
    with path.open("rb") as file:
        _refuse_compressed(path, file.read(6))
        file.seek(0)
        members: list[Member] = []
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (entry := tar.next()) is not None:
                    if entry.offset_data + entry.size > size:
                        return members, f"cut off inside {entry.name} at byte {size}"
                    if entry.isreg() and not entry.issparse():
                        members.append(Member(*split_name(entry.name), entry.name, entry.offset_data, entry.size))
                    # tarfile remembers every header; millions of them fill the memory.
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                end = tar.offset
        except tarfile.TarError as error:
            return members, f"not readable as tar: {error}"
        file.seek(end)
        return members, _bad_end(file.read(BLOCK), end)


def split_name(name: str) -> tuple[str, str]:
    """(key, lower-case extension) of a member name."""
    match = NAME.match(name)
    return (match[1], match[2].lower()) if match else (name, "")


def group_samples(members: Sequence[Member]) -> tuple[list[tuple[Member, ...]], list[str]]:
    """Samples (members of one key that follow each other), and one line for everything left out.

    Left out: a key met again later (the first is kept), an extension met again within a sample, names that leave the
    folder, names without an extension (webdataset skips those too).
    """
    groups: dict[str, list[Member]] = {}
    problems: list[str] = []
    last = None
    for member in members:
        if member.extension == "":
            problems.append(f"{member.name}: no extension")
        elif member.name.startswith("/") or ".." in member.name.split("/"):
            problems.append(f"{member.name}: leaves the folder")
        elif member.key not in groups:
            groups[member.key] = [member]
            last = member.key
        elif member.key != last or member.extension in {other.extension for other in groups[member.key]}:
            problems.append(f"{member.name}: key {member.key} comes twice; the first is kept")
            last = None
        else:
            groups[member.key].append(member)
    return [tuple(group) for group in groups.values()], problems


def _refuse_compressed(path: Path, start: bytes) -> None:
    tools = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}
    for magic, tool in tools.items():
        if start.startswith(magic):
            raise UserError(
                f"tar: {path} is compressed, so its members cannot be read by offset\n"
                f"  unpack it first: {tool} -k {path}"
            )


def _bad_end(block: bytes, end: int) -> str | None:
    if not block:
        return f"no end-of-archive mark at byte {end}; perhaps cut off"
    return f"damaged header at byte {end}" if block.strip(b"\0") else None
