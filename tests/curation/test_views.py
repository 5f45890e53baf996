import numpy as np

from curation.views import _merge, describe, view_pairs, windows
from imaging.decode import decode
from runtime.files import locate


def thumbs(num: int) -> np.ndarray:
    files = sorted(locate("embedded:eval/test").rglob("*.jpg"))[: 3 * num : 3]
    return np.stack([np.asarray(decode(file.read_bytes())[0].convert("L").resize((64, 64))) for file in files])


def cropped(images: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    from PIL import Image

    cuts = images[:, top : top + side, left : left + side]
    return np.stack([np.asarray(Image.fromarray(cut).resize((64, 64), Image.Resampling.BICUBIC)) for cut in cuts])


def test_windows_cover_the_thumbnail_and_start_with_the_whole():
    cuts = windows(64)
    assert cuts[0] == (0, 0, 64)
    assert len(cuts) == len(set(cuts)) == 28
    assert all(top >= 0 and top + side <= 64 and left >= 0 and left + side <= 64 for top, left, side in cuts)


def test_vectors_have_unit_length():
    vectors = describe(thumbs(3))
    assert vectors.shape == (28, 3, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float32), axis=2), 1, atol=2e-3)


def test_crops_and_mirrored_crops_find_their_originals():
    images = thumbs(30)
    crops = cropped(images, 5, 14, 46)
    for queries in (crops, crops[:, :, ::-1].copy()):
        pairs = view_pairs(queries, images, k=4)
        assert len(pairs) == 120
        assert np.sum(pairs[:, 0] == pairs[:, 1]) >= 28  # by chance: 4


def test_merging_keeps_the_best_of_distinct_images():
    generator = np.random.default_rng(0)
    for _ in range(50):
        a, b = generator.random((2, 4), dtype=np.float32), generator.random((2, 4), dtype=np.float32)
        i, j = (np.stack([generator.permutation(6)[:4] for _ in range(2)]) for _ in range(2))
        similarity, index = _merge(a, i, b, j)
        for row in range(2):
            best: dict[int, float] = {}
            for image, value in [*zip(i[row], a[row], strict=True), *zip(j[row], b[row], strict=True)]:
                best[int(image)] = max(best.get(int(image), -1), float(value))
            expected = sorted(best, key=lambda image: -best[image])[:4]
            assert index[row].tolist() == expected
            np.testing.assert_allclose(similarity[row], [best[image] for image in expected])
