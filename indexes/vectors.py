"""Stored vectors and the similarity that decisions are taken on.

Vectors are L2-normalised float16 rows. A finite float16 is an integer multiple of 2^-24, so a product of two is a
multiple of 2^-48, and the absolute products of two rows of norm ~1 sum to at most ~1 (Cauchy-Schwarz): every partial
sum fits into the 53 bits of a float64. **The float64 dot product of two stored rows is therefore exact, in any order
of summation, with any library**, and so is its value rounded to ``ROUNDING``. In the same way a float64 sum of up to
5e8 rows (values up to 1, multiples of 2^-24, below 2^29) is exact, which makes the sums of k-means independent of
order and sharding.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError, VectorError
from curation.indexes.compiled import compiled
from curation.indexes.keys import Keys, hex_from_keys

Vectors = npt.NDArray[np.float16]
Singles = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Similarities = npt.NDArray[np.float64]

ROUNDING = 1e-6  # similarities are whole multiples of it
PER_UNIT = 1e6
# A float16 rounding of a unit vector changes each value by at most 2^-11 of itself, so its norm by less than 5e-4.
NORM_TOLERANCE = 2e-3


def check_shape(vectors_ND: npt.NDArray[np.generic], dim: int | None = None) -> None:
    """Check that vectors are float16 (N, dim) without looking at values.

    Raises:
        DimensionError: Wrong dtype, number of axes or dimension.
    """
    wanted = "dim" if dim is None else str(dim)
    if vectors_ND.dtype != np.float16 or vectors_ND.ndim != 2 or vectors_ND.shape[1] == 0:
        raise DimensionError(f"vectors must be float16 (N, {wanted}), got {vectors_ND.dtype} {vectors_ND.shape}")
    if dim is not None and vectors_ND.shape[1] != dim:
        raise DimensionError(f"vectors must have {dim} dimensions, got {vectors_ND.shape[1]}")


def widen(vectors_ND: Vectors, dim: int | None = None, first_row: int = 0, keys_N2: Keys | None = None) -> Singles:
    """Return checked vectors as contiguous float32 (N, dim), which is exact.

    Args:
        vectors_ND: float16 rows, an array or a memory map.
        dim: The dimension they must have; None: any.
        first_row: Number of the first row in error messages.
        keys_N2: Keys of the rows, which error messages name instead: rows of a sample are nobody's numbers.

    Raises:
        DimensionError: Wrong dtype, number of axes or dimension.
        VectorError: A row with NaN or infinity, a zero row, or one that is not L2-normalised.
    """
    check_shape(vectors_ND, dim)
    # A copy, so that a read-only memory map is the same type to Numba as an array: one compilation less.
    bits_ND = np.array(vectors_ND, order="C").view(np.uint16)
    singles_ND = np.empty(vectors_ND.shape, np.float32)
    squares_N = np.empty(len(vectors_ND), np.float64)
    _widen(bits_ND, singles_ND.view(np.uint32))
    _scale(singles_ND, squares_N)
    bad = np.flatnonzero(~(np.abs(np.sqrt(squares_N) - 1.0) <= NORM_TOLERANCE))
    if len(bad):
        row = int(bad[0])
        name = f"row {first_row + row}" if keys_N2 is None else f"image {hex_from_keys(keys_N2[row : row + 1])[0]}"
        raise VectorError(_what_is_wrong(vectors_ND[row], name, len(bad)))
    return singles_ND


def blocks(num_rows: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive blocks.

    Raises:
        DimensionError: ``block_rows`` is below 1.
    """
    if block_rows < 1:
        raise DimensionError(f"block_rows must be at least 1, got {block_rows}")
    for start in range(0, num_rows, block_rows):
        yield start, min(start + block_rows, num_rows)


def pair_similarities(left_ND: Singles, right_MD: Singles, left_P: Rows, right_P: Rows) -> Similarities:
    """Return the rounded similarity of each pair of rows, (P,), from widened vectors."""
    result = np.empty(len(left_P), np.float64)
    _pair_similarities(left_ND, right_MD, left_P, right_P, result)
    return result


def stored_similarities(left_MD: Vectors, right_ND: Vectors, left_P: Rows, right_P: Rows) -> Similarities:
    """Like ``pair_similarities``, from checked float16 rows in an array or a memory map, which are not copied."""
    result = np.empty(len(left_P), np.float64)
    _stored_similarities(
        np.asarray(left_MD).view(np.uint16), np.asarray(right_ND).view(np.uint16), left_P, right_P, result
    )
    return result


@compiled
def similarity(left_D: Singles, right_D: Singles) -> Any:
    """Return the rounded similarity of two widened rows; for other kernels to call."""
    total = 0.0
    for j in range(left_D.shape[0]):
        total += np.float64(left_D[j]) * np.float64(right_D[j])
    return np.rint(total * PER_UNIT) / PER_UNIT


@compiled
def _pair_similarities(left_ND: Singles, right_MD: Singles, left_P: Rows, right_P: Rows, out_P: Similarities) -> None:
    for p in range(left_P.shape[0]):
        out_P[p] = similarity(left_ND[left_P[p]], right_MD[right_P[p]])


@compiled
def _stored_similarities(left_MD: Any, right_ND: Any, left_P: Any, right_P: Any, out_P: Similarities) -> None:
    # As _widen and _scale do it, row by row: 2^112 twice.
    left_D = np.empty(left_MD.shape[1], np.uint32)
    right_D = np.empty(left_MD.shape[1], np.uint32)
    left, right = left_D.view(np.float32), right_D.view(np.float32)
    before = np.int64(-1)
    for p in range(left_P.shape[0]):
        if left_P[p] != before:
            before = np.int64(left_P[p])
            _widen_row(left_MD[before], left_D)
        _widen_row(right_ND[right_P[p]], right_D)
        total = 0.0
        for j in range(left.shape[0]):
            total += np.float64(left[j]) * np.float64(right[j])
        out_P[p] = np.rint(total * 2.0**224 * PER_UNIT) / PER_UNIT


@compiled
def _widen_row(bits_D: Any, out_D: npt.NDArray[np.uint32]) -> None:
    for j in range(bits_D.shape[0]):
        half = np.uint32(bits_D[j])
        out_D[j] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | ((half & np.uint32(0x8000)) << np.uint32(16))


@compiled
def _widen(bits_ND: npt.NDArray[np.uint16], out_ND: npt.NDArray[np.uint32]) -> None:
    # Exponent and fraction move to their float32 places; _scale mends the exponent bias. 7x faster than astype.
    for i in range(bits_ND.shape[0]):
        _widen_row(bits_ND[i], out_ND[i])


@compiled
def _scale(singles_ND: Singles, squares_N: Similarities) -> None:
    # 2^112 = 2^(127 - 15) is exact for zero, subnormal and normal values. NaN and infinity come out at 65536 or more,
    # so that they fail the check of norms.
    bias = np.float32(2.0**112)
    for i in range(singles_ND.shape[0]):
        total = 0.0
        for j in range(singles_ND.shape[1]):
            value = singles_ND[i, j] * bias
            singles_ND[i, j] = value
            total += np.float64(value) * np.float64(value)
        squares_N[i] = total


def _what_is_wrong(vector_D: Vectors, name: str, num_bad: int) -> str:
    if not np.isfinite(vector_D).all():
        what = "has a value that is not finite"
    elif not vector_D.any():
        what = "is all zeros"
    else:
        norm = float(np.linalg.norm(vector_D.astype(np.float64)))
        what = f"has norm {norm:.4g}: L2-normalise vectors before they are stored"
    others = f" ({num_bad - 1} more rows of this block are wrong too)" if num_bad > 1 else ""
    return f"vector of {name} {what}{others}"
