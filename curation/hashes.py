"""Three identities of an image: of its bytes, of its pixels, and of how it looks."""

import hashlib

import imagehash
import numpy as np
from PIL import Image, ImageOps


def content_id(data: bytes | memoryview) -> str:
    """32 hex digits of the SHA-256 of a file's bytes: the name of an image everywhere in the house."""
    return hashlib.sha256(data).hexdigest()[:32]


def pixel_hash(image: Image.Image) -> str:
    """32 hex digits of the SHA-256 of upright RGB pixels and size: equal for a PNG and a BMP of one picture."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def perceptual_hashes(image: Image.Image) -> tuple[int, int]:
    """64-bit pHash of an image and of its mirror image (low frequencies of a 32x32 grey cosine transform)."""
    gray = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    return _as_int(imagehash.phash(gray)), _as_int(imagehash.phash(ImageOps.mirror(gray)))


def as_codes(hashes: np.ndarray) -> np.ndarray:
    """uint64 [N] hashes as the uint8 [N, 8] rows that FAISS's binary indexes read."""
    return np.ascontiguousarray(hashes.astype(">u8")).view(np.uint8).reshape(-1, 8)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ between uint64 hashes, elementwise; int64 [N]."""
    return np.bitwise_count(a ^ b).astype(np.int64)


def _as_int(hashed: imagehash.ImageHash) -> int:
    return int.from_bytes(np.packbits(hashed.hash).tobytes(), "big")
