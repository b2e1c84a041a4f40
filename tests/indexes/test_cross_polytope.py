import numpy as np
import pytest

from curation.errors import DimensionError, VectorError
from curation.indexes.cross_polytope import MAX_DIM, SKETCH_WORDS, compare, encode, num_rotations, random_signs


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def by_matrix(vectors, signs):
    """Sketch bits (N, 512) and hashes (N, rotations, 8) with a Hadamard matrix, in whole numbers."""
    width = signs.shape[1]
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    values = np.zeros((len(vectors), width), np.int64)
    values[:, : vectors.shape[1]] = np.rint(vectors.astype(np.float64) * 2**14)
    bits, shift, sketches, hashes = width.bit_length() - 1, 0, None, []
    for i, negative in enumerate(signs):
        shift = (bits * (i + 1)) // 2 - (bits * i) // 2
        values = np.rint((values * np.where(negative, -1, 1)) @ matrix / 2**shift).astype(np.int64)
        groups = values[:, :512].reshape(len(values), 8, 64)
        if i == 2:
            sketches = values[:, :512] > 0
        elif i > 2:
            place = np.abs(groups).argmax(axis=2)
            value = np.take_along_axis(groups, place[:, :, None], 2)[:, :, 0]
            hashes.append(2 * place + (value < 0))
    return sketches, np.stack(hashes, axis=1)


def unpacked(words):
    bytes_NB = words.view(np.uint8)
    split = 8 * SKETCH_WORDS
    return (
        np.unpackbits(bytes_NB[:, :split], axis=1, bitorder="little").astype(bool),
        bytes_NB[:, split:].reshape(len(words), -1, 8),
    )


@pytest.mark.parametrize("dim", [1, 3, 512, 700])
def test_codes_are_those_of_hadamard_matrices(dim):
    vectors = unit(np.random.default_rng(0).standard_normal((70, dim)))
    signs = random_signs(dim, 5, 1)
    assert num_rotations(signs) == 5
    for found, wanted in zip(unpacked(encode(vectors, signs)), by_matrix(vectors, signs), strict=True):
        assert np.array_equal(found, wanted)


def test_rows_with_a_single_value_are_told_apart():
    codes = encode(np.eye(512, dtype=np.float16), random_signs(512, 4, 0))
    left, right = np.triu_indices(512, 1)
    equal, distances = compare(codes[left], codes[right])
    assert equal.mean() / 8 < 0.012  # 1 in 128 by chance
    assert distances[:, 1].min() > 150


def test_compare_counts_equal_hashes_and_different_bits():
    rng = np.random.default_rng(0)
    vectors = unit(rng.standard_normal((50, 64)))
    near = unit(vectors + rng.standard_normal((50, 64)) * 0.05)
    signs = random_signs(64, 3, 0)
    left, right = encode(vectors, signs), encode(near, signs)
    (bits, hashes), (other_bits, other_hashes) = unpacked(left), unpacked(right)
    equal, distances = compare(left, right)
    assert np.array_equal(equal, (hashes == other_hashes).sum(axis=2))
    assert np.array_equal(distances, np.stack([(bits != other_bits)[:, :256].sum(1), (bits != other_bits).sum(1)], 1))
    assert 0 < equal.mean() < 8


def test_bad_input_is_refused():
    signs = random_signs(16, 2, 0)
    assert encode(np.empty((0, 16), np.float16), signs).shape == (0, SKETCH_WORDS + 2)
    with pytest.raises(DimensionError):
        encode(unit(np.ones((2, 2000))), signs)
    with pytest.raises(VectorError):
        encode(np.full((2, 16), np.nan, np.float16), signs)
    for dim in (0, MAX_DIM + 1):
        with pytest.raises(DimensionError):
            random_signs(dim, 2, 0)
