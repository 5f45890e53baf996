import numpy as np

from curation.codes import build_codes, code_pairs, read_codes, write_codes
from curation.threshold import threshold_pairs
from curation.unit_vectors import UnitVectors


def test_codes_propose_and_the_vectors_decide(tmp_path):
    draw = np.random.default_rng(0)
    values = draw.standard_normal((1000, 64))
    values[700:900] = values[:200] + 0.5 * draw.standard_normal((200, 64))
    values[900:] = values[:100] + 0.7 * draw.standard_normal((100, 64))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    vectors = UnitVectors(tuple(np.split(values.astype(np.float16), [300])))
    write_codes(build_codes(vectors, 16, seed=0), tmp_path / "codes.faiss")
    index = read_codes(tmp_path / "codes.faiss")
    exact = threshold_pairs(vectors, threshold=0.7)
    assert len(exact) > 250
    whole = code_pairs(vectors, index, k=16, num_probes=16, threshold=0.7)
    there = np.isin(exact.index @ [1000, 1], whole.index @ [1000, 1])
    assert there.mean() > 0.99
    np.testing.assert_array_equal(whole.index, exact.index[there])
    np.testing.assert_array_equal(whole.cosine, exact.cosine[there])
    units = [
        code_pairs(vectors, index, k=16, num_probes=16, threshold=0.7, rows=rows).index
        for rows in ((0, 10), (10, 600), (600, 1000))
    ]
    np.testing.assert_array_equal(np.unique(np.concatenate(units), axis=0), whole.index)
