"""What bytes are that no reader opened, and whether an image file ends before its own end."""

import struct
import zlib

# Real images and pictures-with-structure that this house does not read.
OTHER_FORMATS = {
    b"%PDF-": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "Photoshop",
    b"\x1aE\xdf\xa3": "Matroska video",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"v/1\x01": "OpenEXR",
    b"SIMPLE  =": "FITS",
    b"OggS": "Ogg media",
    b"RIFF": "RIFF media",
}
DAMAGED_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"\x00\x00\x01\x00": "ICO",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
}


def reason_unopened(data: bytes) -> tuple[str, str]:
    """(reason, detail) for bytes that no image reader accepts."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _damaged(data, "WEBP")
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return _damaged(data, "BMP")
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1").strip()
        return _damaged(data, "AVIF") if brand in ("avif", "avis") else ("unsupported format", f"ISO media {brand!r}")
    for signature, name in DAMAGED_SIGNATURES.items():
        if data.startswith(signature):
            return _damaged(data, name)
    for signature, name in OTHER_FORMATS.items():
        if data.startswith(signature):
            return "unsupported format", name
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text):
        return "unsupported format", "SVG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "not an image", "HTML page"
    if text.startswith(b"version https://git-lfs"):
        return "not an image", "Git LFS pointer; the file itself was not fetched"
    return "not an image", f"starts with {data[:8]!r}"


def reason_damaged(data: bytes, error: Exception) -> tuple[str, str]:
    """(reason, detail) for an image that a reader began and gave up with `error`."""
    if "truncated" in str(error).lower():
        return "truncated", str(error)
    if data[:4] == b"RIFF" and ends_early(data, "WEBP"):
        return "truncated", "WEBP ends early"
    return "corrupt", f"{type(error).__name__}: {error}"


def impossible_size(data: bytes) -> bool:
    """True for a BMP of negative width, which Pillow takes for an enormous one."""
    return data[:2] == b"BM" and len(data) >= 22 and struct.unpack_from("<i", data, 18)[0] < 0


def ends_early(data: bytes, format: str) -> bool:
    """True when the file's own structure reaches beyond its last byte (JPEG, PNG, WEBP).

    Pillow reads some of these without complaint, or calls them corrupt. Raises ValueError on a wrong PNG check sum.
    """
    if format in ("JPEG", "MPO"):
        return _jpeg_ends_early(data)
    if format == "PNG":
        return _png_ends_early(data)
    return format == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _damaged(data: bytes, format: str) -> tuple[str, str]:
    try:
        early = ends_early(data, format)
    except ValueError as error:
        return "corrupt", str(error)
    return ("truncated", f"{format} ends early") if early else ("corrupt", f"unreadable {format} header")


def _jpeg_ends_early(data: bytes) -> bool:
    """Walk the segments up to the scan; then an end marker must follow somewhere."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return False  # not a segment: damaged, not short
        if data[at + 1] == 0xFF:  # fill byte
            at += 1
            continue
        if data[at + 1] == 0xDA:
            return data.rfind(b"\xff\xd9", at) < 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at : at + 2] != b"\xff\xd9"


def _png_ends_early(data: bytes) -> bool:
    """Walk the chunks. Pillow skips the check sums of pixel data, so a flipped bit would pass as an image."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return False
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if not kind.isalpha():
            raise ValueError(f"PNG: no chunk at byte {at}")
        if end + 4 > len(data):
            return True
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"PNG: wrong check sum in chunk {kind.decode()} at byte {at}")
        if kind == b"IEND":
            return False
        at = end + 4
    return True
