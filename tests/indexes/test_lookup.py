import numpy as np
import pytest

from curation.indexes.lookup import among, as_bytes


@pytest.mark.parametrize("num_known", [0, 1, 500])
def test_what_is_among_sorted_values_is_what_numpy_says(num_known):
    rng = np.random.default_rng(num_known)
    known = rng.integers(0, 5, (num_known, 2)).astype(np.uint64) << np.uint64(56)
    wanted = rng.integers(0, 6, (300, 2)).astype(np.uint64) << np.uint64(56)
    found = among(np.sort(as_bytes(known)), as_bytes(wanted))
    assert np.array_equal(found, np.isin(as_bytes(wanted), as_bytes(known)))
    assert found.dtype == bool
