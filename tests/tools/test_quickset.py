"""The embedded image set says of every picture whence it comes."""

import csv
import hashlib
import tarfile
from pathlib import Path

from runtime.files import locate

ROWS = {row["path"]: row for row in csv.DictReader((locate("embedded:ATTRIBUTION.csv")).open())}
QUICKSET = locate("embedded:.")
NOT_IMAGES = (".csv", ".parquet", ".md", ".txt", ".py", ".pyc")


def members(tar: Path) -> dict[str, str | None]:
    """SHA-256 of each image member by name; None for the one where the tar is cut off."""
    found: dict[str, str | None] = {}
    with tarfile.open(tar) as opened:
        try:
            for member in opened:
                if member.name.endswith(".json"):
                    continue
                content = opened.extractfile(member).read()
                found[member.name] = hashlib.sha256(content).hexdigest() if len(content) == member.size else None
        except tarfile.ReadError:
            assert tar.name == "cut_off.tar"
            found[member.name] = None
    return found


def test_every_image_has_its_row_and_every_row_its_image():
    seen: dict[str, str | None] = {}
    for path in sorted(QUICKSET.rglob("*")):
        name = path.relative_to(QUICKSET).as_posix()
        if path.suffix == ".tar":
            seen |= {f"{name}/{member}": digest for member, digest in members(path).items()}
        elif path.is_file() and path.suffix not in NOT_IMAGES:
            seen[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(seen) == set(ROWS)
    assert {name: digest or "" for name, digest in seen.items()} == {n: row["sha256"] for n, row in ROWS.items()}


def test_flower_photographs_name_their_flickr_photo():
    flowers = [row for row in ROWS.values() if row["source"] == "flowers"]
    assert len(flowers) > 150
    for row in flowers:
        assert row["flickr_photo"].isdigit()
        assert Path(row["origin"]).name.startswith(f"{row['flickr_photo']}_")


def test_every_picture_has_a_licence():
    assert {row["license"] for row in ROWS.values() if row["source"] != "none"} == {
        "CC-BY-4.0 upstream", "CC-BY upstream", "CC0-1.0", "BSD-3-Clause", "MIT",
    }  # fmt: skip
