"""Find keys among others."""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.indexes.keys import Keys, check_keys


def as_bytes(keys_N2: Keys) -> npt.NDArray[Any]:
    """Return keys as (N,) 16-byte strings, which sort like their hex; a padded zero byte changes no comparison."""
    check_keys(keys_N2, len(keys_N2))
    return np.ascontiguousarray(keys_N2.astype(">u8")).view("S16").reshape(-1)


def find(known_N2: Keys, wanted_M2: Keys) -> npt.NDArray[np.int64]:
    """Return the row in ``known_N2`` (unique keys, any order) of each wanted key, or -1, shape (M,)."""
    known, wanted = as_bytes(known_N2), as_bytes(wanted_M2)
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    rows = order[place]
    return np.where(known[rows] == wanted, rows, -1)


def among(sorted_N: npt.NDArray[Any], wanted_M: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return whether each wanted value is one of the sorted ones, (M,), without sorting these again."""
    if not len(sorted_N):
        return np.zeros(len(wanted_M), bool)
    place = np.minimum(np.searchsorted(sorted_N, wanted_M), len(sorted_N) - 1)
    found: npt.NDArray[np.bool_] = sorted_N[place] == wanted_M
    return found
