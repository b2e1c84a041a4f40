"""Seeded vectors with planted copies and ties, and the slow obvious answers."""

import numpy as np
import pytest


def _unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


class Mixture:
    """Random vectors around centres, with exact copies; keys are random and unique."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def vectors(self, num, dim=16, centres=5, spread=0.5):
        middle = self.rng.standard_normal((centres, dim))
        values = middle[self.rng.integers(0, centres, num)] + spread * self.rng.standard_normal((num, dim))
        vectors = _unit(values)
        vectors[num // 2 : num // 2 + num // 10] = vectors[: num // 10]
        return vectors

    def keys(self, num):
        keys = self.rng.integers(0, 2**64, (num, 2), dtype=np.uint64)
        keys[::3, 0] = keys[0, 0]  # the second half has to decide as well
        return keys


def similarities(left, right):
    """The definition: float64 products of the stored float16 rows, rounded."""
    return np.round(left.astype(np.float64) @ right.astype(np.float64).T, 6)


def brute_force(queries, references, keys, k):
    """k best rows of each query by (similarity, key, row)."""
    scores = similarities(queries, references)
    rows = np.full((len(queries), k), -1)
    for q, scores_N in enumerate(scores):
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0], -scores_N))[:k]
        rows[q, : len(order)] = order
    return rows, scores


@pytest.fixture
def mixture():
    return Mixture()


@pytest.fixture
def exact_similarities():
    return similarities


@pytest.fixture
def brute_nearest():
    return brute_force
