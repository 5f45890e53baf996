"""Every odd file comes out as its truth file says, and no image costs more memory than its header allows."""

import csv
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.decode import REASONS, Rejected, decode
from runtime.files import locate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF; silent outside pytest

LARGER_PACK = Path(__file__).parents[2].parent / "shared" / "data" / "corrupt"


def truth(folder: Path) -> list:
    if not folder.is_dir():
        return []
    with (folder / "truth.csv").open(newline="") as file:
        return [pytest.param(folder, row, id=row["file"]) for row in csv.DictReader(file)]


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int = 160, height: int = 120) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


def outcome(data: bytes) -> str:
    """The mode of the decoded picture, or the reason for its rejection."""
    try:
        return decode(data)[0].mode
    except Rejected as error:
        return error.reason


@pytest.mark.parametrize(("folder", "row"), truth(locate("embedded:corrupt")) + truth(LARGER_PACK))
@pytest.mark.parametrize("min_side", [None, 32])
def test_odd_files_come_out_as_their_truth_says(folder, row, min_side):
    data = (folder / "files" / row["file"]).read_bytes()
    if row["verdict"] != "must be decoded":
        with pytest.raises(Rejected) as caught:
            decode(data, min_side=min_side)
        assert caught.value.reason == row["reason"]
        assert caught.value.reason in REASONS
        assert caught.value.detail
        return
    image, header = decode(data, min_side=min_side)
    assert image.mode == "RGB"
    if row["width"]:
        assert (header.width, header.height) == (int(row["width"]), int(row["height"]))
    if row["mean_r"]:
        # The truth was summed in single precision, which shows (255.9 of 255) for the twelve-megapixel file.
        mean = np.asarray(image, dtype=np.float32).mean(axis=(0, 1))
        expected = [float(row[f"mean_{channel}"]) for channel in "rgb"]
        np.testing.assert_allclose(mean, expected, atol=float(row["mean_tolerance"]))


def test_the_embedded_set_has_odd_files():
    assert len(truth(locate("embedded:corrupt"))) == 22


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is only honoured on Linux")
def test_bombs_are_refused_without_their_memory():
    script = """
import resource, sys
from imaging.decode import Rejected, decode
from PIL import Image
import io
buffer = io.BytesIO()
Image.new("1", (11000, 11000)).save(buffer, "PNG")  # 121 megapixels: below Pillow's own limit, above ours
bombs = [buffer.getvalue()] + [open(name, "rb").read() for name in sys.argv[1:]]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, used + 100_000_000))
for data in bombs:
    try:
        decode(data)
    except Rejected as error:
        assert error.reason == "too large" and "Memory" not in error.detail, error
    else:
        raise SystemExit("decoded")
"""
    files = locate("embedded:corrupt") / "files"
    bombs = [str(files / "bomb.gif"), str(files / "bomb_declared.png")]
    subprocess.run([sys.executable, "-c", script, *bombs], check=True, cwd=Path(__file__).parents[2])


def test_limit_counts_pixels_of_the_header():
    data = encoded(photo(40, 30), "PNG")
    assert decode(data, max_pixels=1200)[0].size == (40, 30)
    with pytest.raises(Rejected, match="too large: 40x30"):
        decode(data, max_pixels=1199)


def test_sixteen_bit_gray_is_divided_not_clipped():
    values = np.array([[0, 257, 32768], [65535, 25700, 128]], dtype=np.uint16)
    image, _ = decode(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 1, 128], [255, 100, 0]])


def test_transparent_pixels_become_white_and_half_transparent_ones_mix():
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    image, _ = decode(encoded(Image.fromarray(rgba), "PNG"))
    np.testing.assert_allclose(np.asarray(image)[0], [[255, 255, 255], [255, 0, 0], [127, 127, 127]], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation):
    upright = photo(64, 48)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, header = decode(encoded(stored, "JPEG", quality=98, subsampling=0, exif=exif))
    assert (header.width, header.height, header.orientation) == (64, 48, orientation)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(upright, dtype=int)).mean() < 2


@pytest.mark.parametrize("value", [0, 9, 4711])
def test_impossible_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    image, header = decode(encoded(photo(64, 48), "JPEG", exif=exif))
    assert image.size == (64, 48)
    assert header.orientation == 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_count_with_their_first_frame(format):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    image, header = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True))
    assert header.frames == 3
    assert image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(("min_side", "expected"), [(None, 480), (480, 480), (240, 240), (100, 120), (59, 60)])
def test_draft_scaling_never_goes_below_the_wanted_side(min_side, expected):
    image, header = decode(encoded(photo(640, 480), "JPEG"), min_side=min_side)
    assert min(image.size) == expected
    assert (header.width, header.height) == (640, 480)


def test_every_cut_of_a_file_is_rejected_as_truncated():
    for format in ("JPEG", "PNG", "WEBP", "GIF", "AVIF"):
        data = encoded(photo(), format)
        for end in range(64, len(data) - 64, max(1, len(data) // 13)):
            with pytest.raises(Rejected) as caught:
                decode(data[:end])
            assert caught.value.reason in ("truncated", "corrupt"), (format, end)
            if format in ("JPEG", "PNG", "WEBP"):
                assert caught.value.reason == "truncated", (format, end)


def test_random_damage_never_escapes():
    generator = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM", "ICO", "JPEG2000"):
        whole = np.frombuffer(encoded(photo(32, 32), format), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[generator.integers(0, min(200, len(whole)), 4)] = generator.integers(0, 256, 4)
            assert outcome(damaged.tobytes()) in ("RGB", *REASONS)


def test_a_rejection_survives_a_process_pool():
    error = pickle.loads(pickle.dumps(Rejected("truncated", "PNG ends early")))
    assert (error.reason, error.detail) == ("truncated", "PNG ends early")
