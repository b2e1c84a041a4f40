"""Inverted lists and 4-bit product codes of vectors, in arithmetic whose rounding no machine can change.

A vector is rotated (and, where there are many dimensions, reduced), given to the list of its most similar centroid, and
what is left of it after the centroid is cut into pieces of a few values; each piece becomes the number of the nearest
of 16 entries of its codebook. The similarity of a query with the coded vector is then a sum over lists and pieces.

Rotations are float32 multiples of 2^-24, so that products with stored float16 rows are exact in float64 (see
``vectors``). What they give is rounded to multiples of 2^-11, as centroids and codebooks are: products are multiples of
2^-22, and as the absolute products of two rows of norm ~1 sum to at most ~1, **every partial sum fits into the 24 bits
of a float32**. Lists, codes and scores therefore depend on no batch, thread or order of summation.

Sources:
    Jégou, Douze and Schmid 2011, "Product quantization for nearest neighbor search"; André, Kermarrec and Le Scouarnec
    2015, "Cache locality is not enough" (4-bit codes).
"""

import logging
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from curation.errors import VectorError
from curation.indexes.assignment import blas_of_one_thread
from curation.indexes.compiled import compiled
from curation.indexes.preselect import threads
from curation.indexes.vectors import Rows, Singles, Vectors, blocks, widen

logger = logging.getLogger(__name__)

Codes = npt.NDArray[np.uint8]

NUM_ENTRIES = 16  # of a codebook: 4 bits
GRID = 2.0**11
_ROTATION_GRID = 2.0**24
_BLOCK_ROWS = 16384
_LIST_ITERATIONS = 10
_CODE_ITERATIONS = 20
_MAX_CODE_ROWS = 1 << 15  # of the sample, for codebooks


@dataclass(frozen=True)
class Quantizer:
    """A trained quantizer.

    Attributes:
        rotation_DE: float32 (dim, reduced dim) with orthonormal columns or rows, multiples of 2^-24.
        centroids_LE: float32 (lists, reduced dim), of norm ~1, multiples of 2^-11.
        codebook_MSK: float32 (pieces, values in a piece, 16), multiples of 2^-11; E = M * S, and M is even.
    """

    rotation_DE: Singles
    centroids_LE: Singles
    codebook_MSK: Singles

    @property
    def dim(self) -> int:
        """Of the vectors."""
        return len(self.rotation_DE)

    @property
    def num_lists(self) -> int:
        """Inverted lists."""
        return len(self.centroids_LE)

    @property
    def code_bytes(self) -> int:
        """Bytes of a vector's code."""
        return len(self.codebook_MSK) // 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantizer) and all(
            np.array_equal(ours, theirs) for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def project(self, vectors_ND: Vectors, first_row: int = 0) -> Singles:
        """Return vectors as the quantizer sees them, float32 (N, E), multiples of 2^-11.

        Raises:
            DimensionError: Wrong shape or dtype.
            VectorError: A row is not finite or not L2-normalised.
        """
        return _projected(vectors_ND, self.rotation_DE.astype(np.float64), first_row)

    def encode(self, vectors_ND: Vectors) -> tuple[npt.NDArray[np.int32], Codes]:
        """Return each vector's list, (N,), and code, (N, code_bytes); an even piece takes the low four bits.

        Raises:
            DimensionError: Wrong shape or dtype.
            VectorError: A row is not finite or not L2-normalised.
        """
        lists_N = np.empty(len(vectors_ND), np.int32)
        codes_NB = np.empty((len(vectors_ND), self.code_bytes), np.uint8)
        for start, stop in blocks(len(vectors_ND), _BLOCK_ROWS):
            points_BE = self.project(vectors_ND[start:stop], start)
            found_B = nearest_lists(points_BE, self.centroids_LE, 1)[0][:, 0]
            pieces_BM = _nearest_entries(points_BE - self.centroids_LE[found_B], self.codebook_MSK)
            lists_N[start:stop] = found_B
            codes_NB[start:stop] = pieces_BM[:, ::2] | pieces_BM[:, 1::2] << 4
        return lists_N, codes_NB


def train(
    vectors_TD: Vectors, num_lists: int, code_bytes: int, reduced_dim: int, num_threads: int | None = None
) -> Quantizer:
    """Train a quantizer on a sample in an order of content, such as that of ``sampling.HashSample``.

    Args:
        vectors_TD: L2-normalised float16; where there are few different ones, lists stay empty.
        num_lists: At least 1.
        code_bytes: Two pieces a byte.
        reduced_dim: At most this many principal directions are coded; padded to a whole number of values a piece.
        num_threads: Of Faiss.

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised, or there is none.
    """
    if not len(vectors_TD):
        raise VectorError("there is no vector to train an index on")
    num_pieces = 2 * code_bytes
    kept_dim = min(reduced_dim, vectors_TD.shape[1])
    # Where the sample varies in fewer directions, which others come with them is a matter of last bits.
    with blas_of_one_thread():
        rotation_DE = _rotation(vectors_TD, kept_dim, -(-kept_dim // num_pieces) * num_pieces)
    points_TE = _projected(vectors_TD, rotation_DE.astype(np.float64), 0)
    centroids_LE = _centroids(points_TE, num_lists, num_threads)
    points_TE = points_TE[:_MAX_CODE_ROWS]
    found_T = nearest_lists(points_TE, centroids_LE, 1, num_threads)[0][:, 0]
    return Quantizer(rotation_DE, centroids_LE, _codebook(points_TE - centroids_LE[found_T], num_pieces))


def nearest_lists(
    points_NE: Singles, centroids_LE: Singles, num_probes: int, num_threads: int | None = None
) -> tuple[Rows, Singles]:
    """Return the ``num_probes`` most similar lists of each point and their similarities, both (N, num_probes).

    A tie for the last place goes to the smaller number.
    """
    fetched = min(num_probes + 1, len(centroids_LE))
    with threads(num_threads):
        scores, lists = faiss.knn(points_NE, centroids_LE, fetched, metric=faiss.METRIC_INNER_PRODUCT)
    # Scores are exact, so only the order of ties is Faiss's own; one for the last place is rare.
    for row in np.flatnonzero(scores[:, -1] == scores[:, num_probes - 1]) if fetched > num_probes else ():
        every_L = centroids_LE @ points_NE[row]
        lists[row] = np.lexsort((np.arange(len(every_L)), -every_L))[:fetched]
        scores[row] = every_L[lists[row]]
    return np.ascontiguousarray(lists[:, :num_probes]), np.ascontiguousarray(scores[:, :num_probes])


def _projected(vectors_ND: Vectors, rotation_DE: npt.NDArray[np.float64], first_row: int) -> Singles:
    points_NE = np.empty((len(vectors_ND), rotation_DE.shape[1]), np.float32)
    for start, stop in blocks(len(vectors_ND), _BLOCK_ROWS):
        singles_BD = widen(vectors_ND[start:stop], len(rotation_DE), first_row + start)
        points_NE[start:stop] = np.rint(singles_BD.astype(np.float64) @ rotation_DE * GRID) / GRID
    return points_NE


def _rotation(vectors_TD: Vectors, kept_dim: int, padded_dim: int) -> Singles:
    """Return a rotation of the ``kept_dim`` directions in which the sample varies most, at random among themselves.

    Pieces then vary alike, which is what the 8-bit tables of the scan are best at.
    """
    dim = vectors_TD.shape[1]
    directions_DK = np.eye(dim)
    if kept_dim < dim:
        products_DD = np.zeros((dim, dim))
        for start, stop in blocks(len(vectors_TD), _BLOCK_ROWS):
            singles_BD = widen(vectors_TD[start:stop], first_row=start).astype(np.float64)
            products_DD += singles_BD.T @ singles_BD
        directions_DK = np.linalg.eigh(products_DD)[1][:, : dim - kept_dim - 1 : -1]
    mixed_EE, upper_EE = np.linalg.qr(np.random.default_rng(0).standard_normal((padded_dim, padded_dim)))
    mixed_EE *= np.sign(np.diag(upper_EE))
    rotation_DE: Singles = np.rint(directions_DK @ mixed_EE[:kept_dim] * _ROTATION_GRID).astype(np.float32)
    return rotation_DE / np.float32(_ROTATION_GRID)


def _centroids(points_TE: Singles, num_lists: int, num_threads: int | None) -> Singles:
    """Return spherical k-means of a sample; the first centroids are its first rows."""
    centroids_LE = np.zeros((num_lists, points_TE.shape[1]), np.float32)
    centroids_LE[: len(points_TE)] = _on_grid(points_TE[:num_lists])
    for _ in range(_LIST_ITERATIONS):
        lists_TP, scores_TP = nearest_lists(points_TE, centroids_LE, 1, num_threads)
        order = np.argsort(lists_TP[:, 0], kind="stable")
        used_U, starts_U = np.unique(lists_TP[order, 0], return_index=True)
        for number, start, stop in zip(used_U, starts_U, [*starts_U[1:], len(order)], strict=True):
            centroids_LE[number] = _on_grid(points_TE[order[start:stop]].sum(axis=0, dtype=np.float64)[None])
        empty_E = np.setdiff1d(np.arange(min(num_lists, len(points_TE))), used_U)
        # Empty lists start again where points are farthest from their centroid.
        farthest = np.argsort(scores_TP[:, 0], kind="stable")[: len(empty_E)]
        centroids_LE[empty_E[: len(farthest)]] = _on_grid(points_TE[farthest])
    logger.info("trained %d lists on %d vectors, %d of them empty", num_lists, len(points_TE), num_lists - len(used_U))
    return centroids_LE


def _on_grid(points_NE: npt.NDArray[np.floating]) -> Singles:
    """Return rows of norm 1 (zero rows stay) as multiples of 2^-11."""
    norms_N1 = np.sqrt((points_NE.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    rounded_NE: npt.NDArray[np.float64] = np.rint(points_NE / np.where(norms_N1 > 0, norms_N1, 1) * GRID) / GRID
    return rounded_NE.astype(np.float32)


def _codebook(residuals_TE: Singles, num_pieces: int) -> Singles:
    """Return the k-means of each piece; the first entries are those of the first rows, spread over the sample."""
    num_values = residuals_TE.shape[1] // num_pieces
    pieces_TMS = residuals_TE.reshape(-1, num_pieces, num_values)
    first = np.arange(NUM_ENTRIES) * len(residuals_TE) // NUM_ENTRIES
    codebook_MSK = np.ascontiguousarray(pieces_TMS[first].transpose(1, 2, 0))
    for _ in range(_CODE_ITERATIONS):
        sums_MKS = np.zeros((num_pieces, NUM_ENTRIES, num_values))
        counts_MK = np.zeros((num_pieces, NUM_ENTRIES), np.int64)
        _add_pieces(residuals_TE, _nearest_entries(residuals_TE, codebook_MSK), sums_MKS, counts_MK)
        means_MSK = (sums_MKS / np.maximum(counts_MK, 1)[..., None]).transpose(0, 2, 1)
        codebook_MSK = np.where(counts_MK[:, None] > 0, np.rint(means_MSK * GRID) / GRID, codebook_MSK)
        codebook_MSK = np.ascontiguousarray(codebook_MSK, np.float32)
    return codebook_MSK


def _nearest_entries(residuals_NE: Singles, codebook_MSK: Singles) -> Codes:
    codes_NM = np.empty((len(residuals_NE), len(codebook_MSK)), np.uint8)
    _encode(residuals_NE, codebook_MSK, codes_NM)
    return codes_NM


@compiled
def _encode(residuals_NE: Singles, codebook_MSK: Singles, codes_NM: Codes) -> None:
    num_pieces, num_values, num_entries = codebook_MSK.shape
    distances_K = np.empty(num_entries, np.float32)
    for i in range(residuals_NE.shape[0]):
        for m in range(num_pieces):
            distances_K[:] = 0
            for s in range(num_values):
                value = residuals_NE[i, m * num_values + s]
                for k in range(num_entries):
                    difference = value - codebook_MSK[m, s, k]
                    distances_K[k] += difference * difference
            best = 0
            for k in range(1, num_entries):
                if distances_K[k] < distances_K[best]:
                    best = k
            codes_NM[i, m] = best


@compiled
def _add_pieces(
    residuals_NE: Singles,
    codes_NM: Codes,
    sums_MKS: npt.NDArray[np.float64],
    counts_MK: npt.NDArray[np.int64],
) -> None:
    num_values = sums_MKS.shape[2]
    for i in range(residuals_NE.shape[0]):
        for m in range(codes_NM.shape[1]):
            k = codes_NM[i, m]
            counts_MK[m, k] += 1
            for s in range(num_values):
                sums_MKS[m, k, s] += np.float64(residuals_NE[i, m * num_values + s])
