import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.data import Files, centre_crop, draw, normalise, open_images, open_labelled
from runtime.errors import UserError


def test_train_and_test_halves(colours: Path):
    task = open_labelled(str(colours))
    assert task.classes == ("blue", "red")
    assert task.train_labels.tolist() == [0] * 4 + [1] * 4
    assert task.test is not None
    assert task.test_labels.tolist() == [0] * 3 + [1] * 3
    assert [task.test.read(i)[0] for i in range(6)] == [
        f"{name}/{i}.png" for name in ("blue", "red") for i in (4, 5, 6)
    ]


def test_val_is_a_test_half(colours: Path):
    (colours / "test").rename(colours / "val")
    task = open_labelled(str(colours))
    assert task.test is not None
    assert len(task.test) == 6


def test_without_test_half_every_image_is_judged(colours: Path):
    task = open_labelled(str(colours / "train"))
    assert task.test is None
    assert task.test_labels.tolist() == task.train_labels.tolist() == [0] * 4 + [1] * 4


def test_a_class_of_the_test_half_keeps_its_train_label(colours: Path):
    shutil.rmtree(colours / "test" / "blue")
    (colours / "test" / "green").mkdir()  # an empty folder is no class
    shutil.copytree(colours / "test" / "red", colours / "test" / "blue")
    shutil.rmtree(colours / "test" / "red")
    with pytest.raises(UserError, match="one class, blue"):
        open_labelled(str(colours))
    shutil.copytree(colours / "train" / "red", colours / "train" / "amber")
    shutil.copytree(colours / "test" / "blue", colours / "test" / "red")
    task = open_labelled(str(colours))
    assert task.classes == ("amber", "blue", "red")
    assert task.test_labels.tolist() == [1] * 3 + [2] * 3


def test_embedded_set():
    task = open_labelled("embedded:eval")
    assert task.test is not None
    assert (len(task.classes), len(task.train), len(task.test)) == (10, 120, 100)
    assert task.name == "embedded:eval"


def make_missing(root: Path) -> str:
    return str(root / "nowhere")


def make_file(root: Path) -> str:
    return str(root / "train" / "red" / "0.png")


def make_empty(root: Path) -> str:
    (root / "empty").mkdir()
    return str(root / "empty")


def make_flat(root: Path) -> str:
    return str(root / "train" / "red")


def make_one_class(root: Path) -> str:
    shutil.rmtree(root / "train" / "red")
    return str(root / "train")


def make_single_image(root: Path) -> str:
    for i in range(1, 4):
        (root / "train" / "red" / f"{i}.png").unlink()
    return str(root / "train")


def make_no_test(root: Path) -> str:
    shutil.rmtree(root / "test")
    return str(root)


def make_unknown_class(root: Path) -> str:
    shutil.copytree(root / "test" / "red", root / "test" / "green")
    return str(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, "no folder .*nowhere"),
        (make_file, "that is a file"),
        (make_empty, "no labelled image"),
        (make_flat, "no labelled image"),
        (make_one_class, "one class, blue"),
        (make_single_image, "class red .* has one image"),
        (make_no_test, "neither test/ nor val/"),
        (make_unknown_class, "class green .* no image in .*train"),
    ],
)
def test_folders_that_are_no_task(colours: Path, make, message: str):
    with pytest.raises(UserError, match=message) as caught:
        open_labelled(make(colours))
    assert len(str(caught.value).splitlines()) <= 3


def test_no_data_was_given():
    with pytest.raises(UserError, match=r"evaluate\.data: empty"):
        open_labelled("")


def test_fingerprint_names_content_and_not_the_place(colours: Path, tmp_path: Path):
    before = open_labelled(str(colours)).fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(colours, moved)
    assert open_labelled(str(moved)).fingerprint == before
    picture = moved / "test" / "red" / "4.png"
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert open_labelled(str(moved)).fingerprint != before


def test_unlabelled_folder_takes_all_depths_and_no_hidden_file(colours: Path):
    shutil.copy(colours / "train" / "red" / "0.png", colours / ".hidden.png")
    (colours / "notes.txt").write_text("not an image")
    images = open_images(str(colours))
    assert len(images) == 14


def test_unlabelled_folder_without_images(tmp_path: Path):
    with pytest.raises(UserError, match="no image and no tar"):
        open_images(str(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        open_images(str(tmp_path / "nowhere"))


def test_shards_are_images_too():
    images = draw(open_images("embedded:pool"), 5, seed=1)
    assert len(images) == 5
    assert draw(open_images("embedded:pool"), 5, seed=1).fingerprint == images.fingerprint
    assert draw(open_images("embedded:pool"), 5, seed=2).fingerprint != images.fingerprint
    name, data = images.read(0)
    assert name
    assert data


def test_draw_keeps_order_and_is_repeatable(colours: Path):
    images = open_images(str(colours))
    assert isinstance(images, Files)
    drawn = draw(images, 5, seed=0)
    names = [drawn.read(i)[0] for i in range(5)]
    assert names == sorted(names)
    assert names == [draw(images, 5, seed=0).read(i)[0] for i in range(5)]
    assert draw(images, 14, seed=0) is images


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_crop_takes_the_centre():
    image = Image.new("RGB", (60, 20), "white")
    image.paste("red", (20, 0, 40, 20))
    assert np.unique(np.array(centre_crop(encode(image), size=20, coverage=1.0)).reshape(-1, 3), axis=0).tolist() == [
        [255, 0, 0]
    ]


@pytest.mark.parametrize("sides", [(451, 300), (300, 452), (256, 256), (90, 133)])
def test_crop_equals_the_transform_of_dinov2(sides: tuple[int, int]):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    noise = np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])(image)
    assert np.array_equal(np.array(centre_crop(encode(image), size=224, coverage=224 / 256)), np.array(expected))


def test_tiny_and_narrow_images_are_enlarged():
    assert centre_crop(encode(Image.new("RGB", (1, 1))), size=32, coverage=0.875).size == (32, 32)
    assert centre_crop(encode(Image.new("RGB", (500, 2))), size=32, coverage=0.875).size == (32, 32)


def test_normalise():
    view = normalise(Image.new("RGB", (2, 3), (255, 0, 51)), mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 0.1))
    assert view.shape == (3, 3, 2)
    assert view[:, 0, 0].tolist() == pytest.approx([1.0, -2.0, 2.0])
