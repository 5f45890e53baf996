import io

import imagehash
import numpy as np
from PIL import Image, ImageOps

from curation.hashes import as_codes, content_id, hamming, perceptual_hashes, pixel_hash
from imaging.decode import decode
from runtime.files import locate


def photo() -> Image.Image:
    return decode(locate("embedded:corrupt/files/baseline.jpg").read_bytes())[0]


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_content_id_is_the_start_of_sha256():
    assert content_id(b"abc") == "ba7816bf8f01cfea414140de5dae2223"


def test_pixels_are_the_same_in_lossless_formats_and_differ_by_one_value_or_shape():
    image = photo()
    assert pixel_hash(decode(saved(image, "PNG"))[0]) == pixel_hash(decode(saved(image, "BMP"))[0]) == pixel_hash(image)
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert pixel_hash(changed) != pixel_hash(image)
    black = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    assert pixel_hash(black[0]) != pixel_hash(black[1])


def test_the_second_hash_is_that_of_the_mirror_image():
    image = photo()
    plain, mirrored = perceptual_hashes(image)
    assert perceptual_hashes(ImageOps.mirror(image)) == (mirrored, plain)
    assert plain != mirrored


def test_a_recompressed_picture_stays_within_four_bits_and_a_different_one_does_not():
    image, other = photo(), decode(locate("embedded:corrupt/files/progressive.jpg").read_bytes())[0]
    hashes = np.array([perceptual_hashes(im)[0] for im in (image, decode(saved(image, "JPEG", quality=40))[0], other)])
    assert hamming(hashes[:1], hashes[1:2])[0] <= 4
    assert hamming(hashes[:1], hashes[2:])[0] > 12


def test_bits_and_codes_are_those_of_imagehash():
    hashes = [imagehash.phash(photo()), imagehash.dhash(photo())]
    values = np.array([int(str(h), 16) for h in hashes], dtype=np.uint64)
    assert hamming(values[:1], values[1:])[0] == hashes[0] - hashes[1]
    np.testing.assert_array_equal(np.unpackbits(as_codes(values)[0]), hashes[0].hash.reshape(-1))
