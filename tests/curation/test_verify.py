"""Aligning two pictures and comparing them: copies pass, look-alikes do not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from curation import verify
from curation.config import DedupConfig
from curation.verify import agreement, from_boxes, refine, verify_pairs
from imaging.decode import decode
from runtime.files import locate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the stages: many small operations are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


THRESHOLD = DedupConfig().verify_threshold


def photos(num: int) -> list[Image.Image]:
    files = sorted(locate("embedded:eval/test").rglob("*.jpg"))
    return [decode(file.read_bytes())[0] for file in files[:: len(files) // num][:num]]


def scores(a: list[Image.Image], b: list[Image.Image]) -> np.ndarray:
    images = [*a, *b]
    thumbs = np.stack([np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BICUBIC)) for image in images])
    aspect = np.array([image.width / image.height for image in images], dtype=np.float32)
    pairs = np.stack([np.arange(len(a)), len(a) + np.arange(len(b))], axis=1)
    return verify_pairs(thumbs, aspect, pairs, CPU)


def crop(image: Image.Image, keep: float, x: float = 0.5, y: float = 0.5) -> Image.Image:
    width, height = round(image.width * keep), round(image.height * keep)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def captioned(image: Image.Image) -> Image.Image:
    taller = Image.new("RGB", (image.width, round(image.height * 1.18)), "black")
    taller.paste(image)
    ImageDraw.Draw(taller).text((4, image.height + 1), "seen in the wild", fill="white")
    return taller


EDITS = {
    "the same": lambda image: image,
    "recompressed": lambda image: recompressed(image, 30),
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
    "gray and darker": lambda image: ImageEnhance.Brightness(ImageOps.grayscale(image).convert("RGB")).enhance(0.7),
    "small crop": lambda image: crop(image, 0.87, 1.0, 0.2),
    "large crop": lambda image: crop(image, 0.68, 0.1, 0.8),
    "mirrored": ImageOps.mirror,
    "mirrored crop": lambda image: ImageOps.mirror(crop(image, 0.8, 0.0, 1.0)),
    "border": lambda image: ImageOps.expand(image, border=round(image.height * 0.1), fill="navy"),
    "caption": captioned,
    "caption, mirrored": lambda image: captioned(ImageOps.mirror(image)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_copies_pass(edit):
    originals = photos(20)
    assert np.mean(scores(originals, [EDITS[edit](image) for image in originals]) >= THRESHOLD) >= 0.95


def test_different_photographs_do_not_pass():
    images = photos(40)
    found = scores(images[:20], images[20:])
    assert found.max() < 0.65
    assert np.median(found) < 0.4


def test_different_photographs_under_one_caption_and_border_do_not_pass():
    dressed = [ImageOps.expand(captioned(image.resize((100, 80))), border=8, fill="red") for image in photos(40)]
    assert scores(dressed[:20], dressed[20:]).max() < THRESHOLD


def test_copies_turned_by_a_few_degrees_are_found():
    originals = photos(20)
    turned = [crop(image.rotate(5, Image.Resampling.BICUBIC), 0.85) for image in originals]
    assert np.mean(scores(originals, turned) > 0.74) > 0.9
    assert scores(originals, turned[1:] + turned[:1]).max() < 0.6


def test_flat_pictures_are_no_evidence():
    white, black = Image.new("RGB", (50, 40), "white"), Image.new("RGB", (50, 40))
    assert scores([white, white], [white, black]).max() < 0.01


def test_the_order_of_a_pair_does_not_matter():
    originals = photos(20)
    edited = [crop(image, 0.7) for image in originals]
    np.testing.assert_allclose(scores(originals, edited), scores(edited, originals), atol=0.02)


def test_scores_do_not_depend_on_how_many_images_are_held(monkeypatch):
    images = photos(24)
    thumbs = np.stack([np.asarray(image.convert("L").resize((64, 64))) for image in images])
    aspect = np.array([image.width / image.height for image in images], dtype=np.float32)
    pairs = np.argwhere(np.triu(np.ones((24, 24)), 1))[::3]
    at_once = verify_pairs(thumbs, aspect, pairs, CPU)
    monkeypatch.setattr(verify, "MAX_IMAGES", 7)
    np.testing.assert_allclose(verify_pairs(thumbs, aspect, pairs, CPU), at_once, atol=1e-4)


def test_no_pairs_give_no_scores():
    assert verify_pairs(np.zeros((2, 64, 64), np.uint8), np.ones(2), np.empty((0, 2), np.int64), CPU).shape == (0,)


def test_refinement_finds_a_known_box():
    image = photos(1)[0].convert("L").resize((256, 256))
    reference = torch.from_numpy(np.asarray(image.resize((64, 64))).copy()).float()[None]
    cut = image.crop((48, 32, 208, 224)).resize((64, 64))
    moving = torch.from_numpy(np.asarray(cut).copy()).float()[None]
    truth = torch.tensor([[48, 32, 160, 192]]) / 256
    start = from_boxes(truth + torch.tensor([[0.01, -0.01, 0.01, 0.01]]))
    sharp = [verify.local_contrast(x) for x in (reference, moving)]
    found = refine(*sharp, start, steps=10)
    assert (found - from_boxes(truth)).abs().max() < 0.03
    assert agreement(reference, moving, found) > 0.95 > agreement(reference, moving, start)
