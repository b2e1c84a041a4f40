import subprocess
import sys

import numpy as np
import pytest

from curation.errors import DimensionError, VectorError
from curation.indexes.vectors import blocks, pair_similarities, widen


def test_widening_is_exact_for_every_finite_float16():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    small = every[np.isfinite(every) & (np.abs(every) <= 0.5)]
    rows = np.zeros((len(small), 3), np.float16)
    rows[:, 0] = small
    rows[:, 1] = np.sqrt(1 - small.astype(np.float64) ** 2)
    wide = widen(rows)
    assert wide.dtype == np.float32
    assert np.array_equal(wide.view(np.uint32), rows.astype(np.float32).view(np.uint32))


def test_similarity_is_exact_in_any_order_of_summation(mixture, exact_similarities):
    vectors = mixture.vectors(60, dim=1280)
    left, right = (a.ravel() for a in np.indices((60, 60)))
    found = pair_similarities(widen(vectors), widen(vectors), left, right)
    assert np.array_equal(found, exact_similarities(vectors, vectors).ravel())
    shuffled = vectors[:, mixture.rng.permutation(1280)]
    assert np.array_equal(found, pair_similarities(widen(shuffled), widen(shuffled), left, right))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (3.0, "has norm 3.*L2-normalise")],
)
def test_a_bad_value_is_refused_with_its_row(mixture, value, reason):
    vectors = mixture.vectors(20)
    vectors[7, 3] = value
    with pytest.raises(VectorError, match=f"row 107 .*{reason}"):
        widen(vectors, first_row=100)


def test_a_zero_row_is_refused(mixture):
    vectors = mixture.vectors(20)
    vectors[[4, 9]] = 0
    with pytest.raises(VectorError, match=r"row 4 is all zeros \(1 more"):
        widen(vectors)


@pytest.mark.parametrize(
    "wrong", [np.ones((2, 4), np.float32), np.ones(4, np.float16), np.ones((2, 0), np.float16), np.ones((2, 5), "f2")]
)
def test_a_wrong_shape_or_type_is_refused(wrong):
    with pytest.raises(DimensionError):
        widen(wrong, dim=4)


def test_no_rows_are_fine():
    assert widen(np.empty((0, 4), np.float16)).shape == (0, 4)
    assert list(blocks(0, 3)) == []
    assert list(blocks(7, 3)) == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(DimensionError, match="block_rows"):
        list(blocks(7, 0))


def test_kernels_compile_where_no_cache_can_be_written():
    # A function without a source file has no place for a cache, like one in a read-only folder without a home.
    code = (
        "from curation.indexes.compiled import compiled\n"
        "space = {}\n"
        "exec(compile('def double(x):\\n    return x + x\\n', '<nowhere>', 'exec'), space)\n"
        "import numba\n"
        "try:\n    numba.njit(cache=True)(space['double'])\nexcept RuntimeError:\n"
        "    print(compiled(space['double'])(21))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "42", done.stderr
