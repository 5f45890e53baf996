"""The header walk agrees with tarfile, says where damaged tars end, and groups as webdataset does."""

import csv
import gzip
import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from imaging.decode import IMAGE_EXTENSIONS, Rejected, decode
from runtime.errors import UserError
from runtime.files import locate
from runtime.tars import DamagedTar, Member, group_samples, member_header, scan_tar, split_name, stream_tar

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF; silent outside pytest

LARGER_PACK = Path(__file__).parents[2].parent / "shared" / "data" / "corrupt"


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def truth(folder: Path) -> list:
    if not folder.is_dir():
        return []
    with (folder / "shards.csv").open(newline="") as file:
        return [
            pytest.param(folder / row["file"], int(row["good_samples"]), id=row["file"]) for row in csv.DictReader(file)
        ]


def good_samples(path: Path) -> int:
    samples, _ = group_samples(scan_tar(path)[0])
    data = path.read_bytes()
    good = 0
    for sample in samples:
        image = next((member for member in sample if member.extension in IMAGE_EXTENSIONS), None)
        if image is None:
            continue
        try:
            decode(data[image.offset : image.offset + image.length])
            good += 1
        except Rejected:
            pass
    return good


@pytest.mark.parametrize(("path", "expected"), truth(locate("embedded:corrupt")) + truth(LARGER_PACK))
def test_odd_shards_give_as_many_good_samples_as_their_truth_says(path, expected):
    assert good_samples(path) == expected


def test_odd_shards_are_reported():
    shards = locate("embedded:corrupt") / "shards"
    assert scan_tar(shards / "good.tar")[1] is None
    assert "cut off inside 0005.jpg" in str(scan_tar(shards / "cut_off.tar")[1])
    _, problems = group_samples(scan_tar(shards / "twice_the_key.tar")[0])
    assert "0002.jpg: key 0002 comes twice; the first is kept" in problems


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_bytes(tmp_path, format):
    members = {"a.jpg": b"x" * 512, "deep/" * 12 + "ü.jpg": b"yy", "c.json": b"", "d.tar.gz": b"z" * 1300}
    path = write_tar(tmp_path / "t.tar", members, format)
    found, problem = scan_tar(path)
    assert problem is None
    data = path.read_bytes()
    assert {member.name: data[member.offset : member.offset + member.length] for member in found} == members


def test_every_cut_keeps_the_whole_members_before_it(tmp_path):
    whole = write_tar(tmp_path / "t.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(4)}).read_bytes()
    for end in range(0, 4 * 1536 + 1, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        found, problem = scan_tar(tmp_path / "cut.tar")
        complete = sum(start + 512 + 700 <= end for start in range(0, 4 * 1536, 1536))
        assert len(found) == complete, end
        assert problem is not None


def test_a_damaged_header_is_reported_with_its_place(tmp_path):
    data = bytearray(write_tar(tmp_path / "t.tar", {f"{i}.jpg": b"x" * 700 for i in range(4)}).read_bytes())
    data[2 * 1536 + 10] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(data)
    found, problem = scan_tar(tmp_path / "t.tar")
    assert [member.name for member in found] == ["0.jpg", "1.jpg"]
    assert problem == f"damaged header at byte {2 * 1536}"


def test_links_and_folders_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    assert scan_tar(tmp_path / "t.tar") == ([], None)


def test_compressed_and_missing_tars_say_what_to_do(tmp_path):
    path = tmp_path / "t.tar.gz"
    path.write_bytes(gzip.compress(b"anything"))
    with pytest.raises(UserError, match="gunzip -k"):
        scan_tar(path)
    with pytest.raises(UserError, match="no file"):
        scan_tar(tmp_path / "absent.tar")


def test_a_file_that_is_no_tar_says_so(tmp_path):
    (tmp_path / "t.tar").write_text("<html>" * 200)
    found, problem = scan_tar(tmp_path / "t.tar")
    assert found == []
    assert "not readable as tar" in str(problem)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/0007.seg.PNG", ("a/b.c/0007", "seg.png")),
        ("0001.jpg", ("0001", "jpg")),
        ("noext", ("noext", "")),
        (".hidden.jpg", (".hidden.jpg", "")),
    ],
)
def test_names_split_as_webdataset_splits_them(name, expected):
    assert split_name(name) == expected
    key, extension = webdataset.tariterators.base_plus_ext(name)
    assert (key or name, (extension or "").lower()) == expected


def test_groups_equal_those_of_webdataset(tmp_path):
    members = {"a/1.jpg": b"1", "a/1.json": b"{}", "b/1.jpg": b"2", "2.cls": b"0", "2.jpg": b"3"}
    path = write_tar(tmp_path / "t.tar", members)
    theirs = {
        sample["__key__"]: {extension: sample[extension] for extension in sample if not extension.startswith("__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    data = path.read_bytes()
    samples, problems = group_samples(scan_tar(path)[0])
    ours = {sample[0].key: {m.extension: data[m.offset : m.offset + m.length] for m in sample} for sample in samples}
    assert ours == theirs
    assert problems == []


def test_a_sample_keeps_the_first_of_two_equal_extensions():
    members = [Member("1", "jpg", "1.jpg", 0, 1), Member("1", "jpg", "1.JPG", 512, 1)]
    samples, problems = group_samples(members)
    assert samples == [(members[0],)]
    assert len(problems) == 1


@pytest.mark.parametrize("length", [0, 1, 511, 4096, 8**11 - 1, 8**11, 2**40])
@pytest.mark.parametrize("name", ["a.jpg", f"{'0af' * 10}.jpg", "x" * 100, "x" * 101, "d/" * 60 + "a.jpg", "ü.jpg", ""])
def test_headers_are_those_of_tarfile(name, length):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = length, 0o644, 0
    assert member_header(name, length) == entry.tobuf(tarfile.PAX_FORMAT)


class Forward(io.RawIOBase):
    """Bytes that come in small pieces and only once, as from a network."""

    def __init__(self, data: bytes):
        self.left = io.BytesIO(data)

    def read(self, length: int = -1) -> bytes:
        return self.left.read(min(length, 100) if length > 0 else length)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_stream_says_the_same_as_a_scan(tmp_path, format):
    long = "folder/" + "n" * (60 if format == tarfile.USTAR_FORMAT else 200) + ".jpg"
    path = write_tar(tmp_path / "t.tar", {"a.jpg": b"a" * 700, long: b"b" * 512, "c.empty": b"", "d.txt": b"d"}, format)
    data = path.read_bytes()
    members, damage = scan_tar(path)
    assert damage is None
    found = list(stream_tar(Forward(data)))
    assert [member for member, _ in found] == members
    assert [content for _, content in found] == [data[m.offset : m.offset + m.length] for m in members]


def test_a_stream_that_ends_anywhere_is_damaged(tmp_path):
    """Cut at every block and in between: what is given out is whole, and the end is noticed."""
    data = write_tar(tmp_path / "t.tar", {"a.jpg": b"a" * 700, "b.jpg": b"b" * 512, "c.jpg": b"c"}).read_bytes()
    whole = [content for _, content in stream_tar(Forward(data))]
    end = 3 * 512 + 1024 + 512 + 512
    assert len(list(stream_tar(Forward(data[: end + 512])))) == 3  # the end mark is there
    for cut in [*range(0, end + 1, 512), 1, 511, 700, 1300, end - 100]:
        found = []
        with pytest.raises(DamagedTar):  # noqa: PT012
            for _, content in stream_tar(Forward(data[:cut])):
                found.append(content)
        assert found == whole[: len(found)], cut
