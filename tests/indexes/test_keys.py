import hashlib

import numpy as np
import pytest

from curation.errors import DimensionError, InputError
from curation.indexes.keys import hex_from_keys, keys_from_hex

IDS = [hashlib.sha256(bytes([i])).hexdigest()[:32] for i in range(200)] + ["0" * 32, "f" * 32, "0" * 31 + "1"]


def test_hex_survives_the_round_trip():
    assert hex_from_keys(keys_from_hex(IDS)) == IDS
    assert keys_from_hex([]).shape == (0, 2)
    assert hex_from_keys(keys_from_hex([])) == []


def test_keys_sort_as_their_hex_strings():
    keys = keys_from_hex(IDS)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    assert [IDS[i] for i in order] == sorted(IDS)


@pytest.mark.parametrize("bad", ["", "ab", "g" * 32, "0" * 33, " " * 2 + "0" * 30, "é" * 32])
def test_what_is_not_an_id_is_refused(bad):
    with pytest.raises(InputError, match="image id"):
        keys_from_hex(["0" * 32, bad])


def test_keys_of_another_shape_are_refused():
    with pytest.raises(DimensionError, match="keys must be uint64"):
        hex_from_keys(np.zeros((3, 3), np.uint64))
