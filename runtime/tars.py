"""Tar files as tables of members: offsets and lengths from a walk over the headers, no data read; and headers to write.

The same rules as webdataset: a sample is a run of members whose names agree up to the first dot of the base name.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
BLOCK = tarfile.BLOCKSIZE
WRITE = 1 << 16  # bytes written at a time; calls of 128 KB and more took Linux ten times the time per byte on ext4
LONGEST_NAME = tarfile.LENGTH_NAME  # bytes in a plain header; longer names need a second one
LARGEST_FILE = 8**11 - 1  # bytes in a plain header
# What follows the check sum and the type "0"; the sum counts the check sum itself as eight spaces.
REST = b"".ljust(100, b"\0") + b"ustar\00000" + b"".ljust(64 + 16 + 155 + 12, b"\0")
REST_SUM = sum(REST) + ord("0") + 8 * ord(" ")


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


class DamagedTar(Exception):
    """A tar that was read front to back is cut off or no tar."""


def stream_tar(file) -> Iterator[tuple[Member, bytes]]:
    """The regular files of a plain tar with their bytes, from a binary file that is read front to back.

    Raises DamagedTar at the end of a tar that is cut off.
    """
    forward = _Forward(file)
    try:
        with tarfile.open(fileobj=forward, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            while (entry := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                if entry.isreg() and not entry.issparse():
                    data = forward.read(entry.size)
                    if len(data) < entry.size:
                        raise DamagedTar(f"cut off inside {entry.name}")
                    yield Member(*split_name(entry.name), entry.name, entry.offset_data, entry.size), data
    except tarfile.TarError as error:
        raise DamagedTar(f"cut off or no tar, at byte {forward.position}: {error}") from error
    if problem := _bad_end(forward.last, forward.position):
        raise DamagedTar(problem)


class _Forward:
    """A file that cannot seek, for tarfile: it asks only for what lies ahead."""

    def __init__(self, file):
        self.file, self.position, self.last = file, 0, b""

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        while self.position < position and self.read(min(WRITE, position - self.position)):
            pass

    def read(self, length: int) -> bytes:
        parts = []
        missing = length
        while missing and (part := self.file.read(missing)):
            parts.append(part)
            missing -= len(part)
        self.position += length - missing
        self.last = b"".join(parts)
        return self.last


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


def member_header(name: str, length: int) -> bytes:
    """A tar header that says nothing of when, where and by whom it was written: mode 644, all else zero.

    The bytes of `tarfile.TarInfo(name).tobuf(PAX_FORMAT)`, for short plain names ten times as fast.
    """
    if name.isascii() and len(name) <= LONGEST_NAME and length <= LARGEST_FILE:
        start = (
            name.encode().ljust(LONGEST_NAME, b"\0") + b"0000644\0000000000\0000000000\0%011o\00000000000000\0" % length
        )
        return b"%b%06o\0 0%b" % (start, sum(start) + REST_SUM, REST)
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = length, 0o644, 0
    return entry.tobuf(tarfile.PAX_FORMAT)


class TarWriter:
    """A tar written front to back in large blocks, with its check sum; the caller fills in the data of each member."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.digest = hashlib.sha256()
        self.buffer = memoryview(bytearray(WRITE))
        self.filled = 0  # bytes of the buffer in use
        self.written = 0  # bytes in the file

    def add(self, name: str, length: int) -> tuple[int, memoryview]:
        """A new member: the offset of its data in the tar, and where to put them before the next call."""
        header = member_header(name, length)
        start = len(header)
        size = start + -(-length // BLOCK) * BLOCK
        if self.filled + size > len(self.buffer):
            self._flush()
            if size > len(self.buffer):
                self.buffer = memoryview(bytearray(size))
        member = self.buffer[self.filled : self.filled + size]
        member[:start] = header
        member[start + length :] = bytes(size - start - length)
        offset = self.written + self.filled + start
        self.filled += size
        return offset, member[start : start + length]

    def finish(self) -> str:
        """Close the tar; SHA-256 of all of it, in hex."""
        self._flush()
        self.buffer[: 2 * BLOCK] = bytes(2 * BLOCK)
        self.filled = 2 * BLOCK
        self._flush()
        return self.digest.hexdigest()

    def _flush(self) -> None:
        part = self.buffer[: self.filled]
        self.digest.update(part)
        while part:
            count = os.pwrite(self.descriptor, part[:WRITE], self.written)
            self.written, part = self.written + count, part[count:]
        self.filled = 0


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
