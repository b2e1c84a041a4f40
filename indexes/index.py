"""One interface for all indexes: ``train`` or ``load``, then ``add``, ``merge``, ``search`` and ``save``."""

from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from curation.indexes import index_header
from curation.indexes.exact import Neighbours
from curation.indexes.flat import FlatIndex
from curation.indexes.index_header import HEADER_FILE
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.keys import Keys
from curation.indexes.parameters import Parameters
from curation.indexes.vectors import Vectors


class Index(Protocol):
    """Vectors with their keys; see ``FlatIndex`` and ``IvfPqIndex`` for arguments and errors."""

    dim: int

    def __len__(self) -> int: ...

    def add(self, vectors_ND: Vectors, keys_N2: Keys) -> None:
        """Append rows."""

    def merge(self, other: Self) -> None:
        """Append the rows of another index of the same kind, without copying them."""

    def search(
        self,
        queries_QD: Vectors,
        k: int,
        *,
        num_threads: int | None = None,
        among_N: npt.NDArray[np.bool_] | None = None,
    ) -> Neighbours:
        """Return the ``k`` most similar rows of each query."""

    def empty(self) -> Self:
        """Return an index without rows that can be merged into this one."""

    def save(self, folder: str | Path) -> None:
        """Write the index into a folder."""


def train(sample_ND: Vectors, parameters: Parameters, num_threads: int | None = None) -> Index:
    """Return an empty index of the kind that the parameters say.

    Args:
        sample_ND: What it is trained on, in an order of content; a flat index takes its dimension only.
        parameters: See ``parameters.choose``.
        num_threads: Of Faiss.

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    if parameters.kind == "flat":
        return FlatIndex(sample_ND.shape[1])
    return IvfPqIndex.train(sample_ND, parameters, num_threads)


def load(folder: str | Path, verify: bool = True) -> Index:
    """Map a saved index of any kind into memory.

    Args:
        folder: Where ``save`` wrote.
        verify: Read everything once and check it now.

    Raises:
        CorruptError: Files are missing, damaged, or hold something else.
    """
    path = Path(folder) / HEADER_FILE
    if index_header.read(path).quantizer is None:
        return FlatIndex.load(folder, verify)
    return IvfPqIndex.load(folder, verify)
