"""Pairs of vectors above a floor: one interface over exact and approximate search."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curation.indexes.exact import Edges, cross_join, self_join
from curation.indexes.vectors import Vectors

Codes = npt.NDArray[np.uint8]


class PairSearch(Protocol):
    code_bytes: int

    def encode(self, vectors_ND: Vectors) -> Codes: ...

    def self_pairs(
        self, vectors_ND: Vectors, codes_NW: Codes, floor: float, num_threads: int | None = None
    ) -> Iterator[Edges]: ...

    def cross_pairs(
        self,
        left_ND: Vectors,
        left_codes_NW: Codes,
        right_MD: Vectors,
        right_codes_MW: Codes,
        floor: float,
        num_threads: int | None = None,
    ) -> Iterator[Edges]: ...


class ExactPairs:
    code_bytes = 0

    def encode(self, vectors_ND: Vectors) -> Codes:
        return np.empty((len(vectors_ND), 0), np.uint8)

    def self_pairs(
        self, vectors_ND: Vectors, codes_NW: Codes, floor: float, num_threads: int | None = None
    ) -> Iterator[Edges]:
        yield from self_join(vectors_ND, floor, num_threads=num_threads)

    def cross_pairs(
        self,
        left_ND: Vectors,
        left_codes_NW: Codes,
        right_MD: Vectors,
        right_codes_MW: Codes,
        floor: float,
        num_threads: int | None = None,
    ) -> Iterator[Edges]:
        yield from cross_join(left_ND, right_MD, floor, num_threads=num_threads)


class InvertedPairs(ExactPairs):
    @classmethod
    def fit(cls, sample, num_rows, floors, recall, seed):  # type: ignore
        return cls()

    def save(self, path):  # type: ignore
        np.savez(path)

    @classmethod
    def load(cls, path):  # type: ignore
        return cls()

    def describe(self):  # type: ignore
        return {}
