"""Image bytes to an upright RGB picture, or a reason from a fixed list why not.

Every picture that enters the house passes here once, so the choices that silently spoil data sets elsewhere are made
in one place: 16-bit samples are divided (Pillow clips them to white), transparency is composited on white (dropping
alpha reveals hidden colours), EXIF orientation is applied, and size limits are read from the header before any pixel
is decoded.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .sniff import ends_early, impossible_size, reason_damaged, reason_unopened

REASONS = ("empty", "not an image", "unsupported format", "truncated", "corrupt", "too large")
"""The words a rejected file is labelled with; `curation` adds "too small" and "unreadable"."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "gif", "webp", "avif", "bmp", "tif", "tiff", "ppm", "pgm",
                    "pbm", "pnm", "jp2", "j2k", "mpo", "ico")  # fmt: skip

# Vector, document and scientific formats are left out on purpose: they have no pixels of their own.
# Multi-picture files (MPO) come through the JPEG reader.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")

ORIENTATION = 0x0112  # EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's readers raise on damaged files: they parse foreign bytes with struct, zlib, indices and dictionaries.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
           ZeroDivisionError, RuntimeError, struct.error, zlib.error)  # fmt: skip

# Damaged EXIF and sizes near Pillow's own limit warn on stderr, once per file; our own checks say what matters.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Rejected(Exception):
    """These bytes are not a usable image: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # an exception with two arguments does not survive a process pool otherwise
        return Rejected, (self.reason, self.detail)


@dataclass(frozen=True)
class Header:
    """What the file says of itself. Sizes are in pixels and upright (after EXIF orientation)."""

    width: int
    height: int
    format: str  # Pillow's name, for example "JPEG"
    orientation: int  # EXIF value 1 to 8; 1 where there is none or it is broken
    frames: int  # 1 unless animated or of several pages


def decode(data: bytes, *, max_pixels: int = 100_000_000, min_side: int | None = None) -> tuple[Image.Image, Header]:
    """The first picture in `data`, upright, mode RGB, with its header.

    max_pixels: refuse larger pictures from their header; Pillow's own limit of 178,956,970 holds besides.
    min_side: the caller needs no more than this many pixels on the short side, so JPEG may be decoded at 1/2, 1/4 or
        1/8 size; the picture is then smaller than its header says, its short side never below min_side.
    Raises Rejected.
    """
    if not data:
        raise Rejected("empty", "zero bytes")
    Image.init()  # the named readers are registered only now; free after the first call
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width < 1 or height < 1:
            raise Rejected("corrupt", f"size {width}x{height}")
        if width * height > max_pixels:
            raise Rejected("too large", f"{width}x{height} pixels; the limit is {max_pixels}")
        if ends_early(data, image.format or ""):
            raise Rejected("truncated", f"{image.format} of {len(data)} bytes ends early")
        if min_side is not None and image.format == "JPEG" and min(width, height) > min_side:
            scale = min_side / min(width, height)
            image.draft(None, (int(np.ceil(width * scale)), int(np.ceil(height * scale))))
        image.load()
        orientation = _orientation(image)
        picture = _rgb(image)
    except Image.UnidentifiedImageError:
        raise Rejected(*reason_unopened(data)) from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Rejected("corrupt" if impossible_size(data) else "too large", str(error)) from None
    except DAMAGED as error:
        raise Rejected(*reason_damaged(data, error)) from None
    if orientation in TRANSPOSE:
        picture = picture.transpose(TRANSPOSE[orientation])
    if orientation >= 5:
        width, height = height, width
    return picture, Header(width, height, image.format or "", orientation, _num_frames(image))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1  # the pixels are fine; broken EXIF only loses the orientation
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _num_frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except DAMAGED:
        return 1  # only the first frame is ever read


def _rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB."""
    if image.mode.startswith("I"):
        return _from_wide_gray(image).convert("RGB")
    if image.mode == "F":
        raise Rejected("unsupported format", "floating-point samples: nothing says which value is white")
    if image.has_transparency_data:
        color = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", color.size, "white"), color).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit: divided by 257, so that 65535 is white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise Rejected("unsupported format", "32-bit samples: nothing says which value is white")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
