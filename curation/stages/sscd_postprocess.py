"""What is done to SSCD descriptors between the model and the table: PCA whitening, and a bias for score normalisation.

Both are optional and fitted on a sample of the pool, as the authors do with DISC's training images.

- *Whitening*: minus the mean, projected on the principal components, each divided by its standard deviation; then unit
  length. It spreads out what the pool's images have in common, so the cosines of different images come closer to 0,
  and those of copies get smaller too: thresholds do not carry over.
- *Score normalisation* (``1.0[0,2]`` of the authors' evaluation): the score of query and reference is their cosine
  minus the query's bias, the mean of its 3 largest cosines with the background. It is no cosine: a pair has two scores,
  one a direction, and a search for pairs has no query. And a background drawn from a pool with copies has some too: the
  more copies an image has there, the larger its bias and the smaller their scores, which is the reverse of what
  deduplication looks for. So the bias is stored beside the descriptor, changes none, and deduplication does not use it.
  For retrieval the authors' trick works on what is stored: append ``-score_bias`` to the query's descriptor and 1 to
  each reference's, and search by inner product.

Source:
    Pizzi et al. 2022, "A self-supervised descriptor for image copy detection"; ``disc_eval.py`` of
    facebookresearch/sscd-copy-detection.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DimensionError
from curation.indexes.keys import Keys
from curation.indexes.lookup import find
from curation.models.vectors import normalised

NUM_NEAREST = 3  # of the background, whose mean similarity is the bias
_DECIMALS = 6
_MIN_RELATIVE_VARIANCE = 1e-9  # of the first component; what is below is rounding noise and would be blown up
_NOTHING = np.empty((0, 0))

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Postprocess:
    """Fitted whitening and background; the one that is not wanted is empty.

    Attributes:
        mean_D: Mean descriptor, float64, (512,) or (0,).
        matrix_DD: Its columns are components over their deviations, float64, (512, 512) or (0, 0).
        background_MD: Whitened, L2-normalised descriptors, float16, (M, 512) or (0, 0).
        keys_M2: The background's image ids, so that no image counts as its own background.
    """

    mean_D: npt.NDArray[np.float64]
    matrix_DD: npt.NDArray[np.float64]
    background_MD: npt.NDArray[np.float16]
    keys_M2: Keys

    @classmethod
    def none(cls) -> Self:
        """Return what leaves descriptors as they are."""
        return cls(np.empty(0), _NOTHING, _NOTHING.astype(np.float16), np.empty((0, 2), np.uint64))

    @property
    def has_background(self) -> bool:
        """Whether scores have a bias."""
        return len(self.background_MD) > 0

    @property
    def digest(self) -> str:
        """The sha256 of all values, hex."""
        arrays = (self.mean_D, self.matrix_DD, self.background_MD, self.keys_M2)
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    def whitened(self, unit_ND: Rows) -> Rows:
        """Return rows of unit length, (N, D), whitened if that was fitted; NaN where a row was, or has no direction.

        Each row is projected by itself, so that it does not depend on its batch.
        """
        if not len(self.mean_D):
            return unit_ND
        projected = [(row.astype(np.float64) - self.mean_D) @ self.matrix_DD for row in unit_ND]
        return normalised(np.stack(projected)) if projected else unit_ND

    def bias(self, unit_ND: Rows, keys_N2: Keys) -> npt.NDArray[np.float64]:
        """Return the bias of rows as they are stored (float16), (N,), rounded to 1e-6; NaN without a background."""
        bias_N = np.full(len(unit_ND), np.nan)
        if self.has_background:
            own_N = find(self.keys_M2, keys_N2)
            for row, (unit_D, own) in enumerate(zip(unit_ND, own_N, strict=True)):
                cosine_M = unit_D.astype(np.float16).astype(np.float32) @ self._columns
                if own >= 0:
                    cosine_M[own] = -np.inf
                # The few that count are computed again, exactly.
                nearest = np.argpartition(-cosine_M, NUM_NEAREST - 1)[:NUM_NEAREST]
                exact = self.background_MD[nearest].astype(np.float64) @ unit_D.astype(np.float16).astype(np.float64)
                bias_N[row] = np.round(exact.mean(), _DECIMALS)
        return bias_N

    @cached_property
    def _columns(self) -> Rows:
        return np.ascontiguousarray(self.background_MD.astype(np.float32).T)

    def save(self, path: Path) -> None:
        """Write as ``.npz``; equal values give equal bytes."""
        with path.open("wb") as file:
            np.savez(
                file,
                mean=self.mean_D,
                matrix=self.matrix_DD,
                background=self.background_MD,
                background_keys=self.keys_M2,
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            CorruptError: The file is something else.
        """
        names = ("mean", "matrix", "background", "background_keys")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                mean_D, matrix_DD, background_MD, keys_M2 = (arrays[name] for name in names)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, AttributeError, TypeError) as error:
            raise CorruptError(f"{path}: not fitted for SSCD: {error}") from error
        dim = len(mean_D)
        fits = matrix_DD.shape == (dim, dim) and keys_M2.shape == (len(background_MD), 2)
        if not fits or background_MD.dtype != np.float16 or keys_M2.dtype != np.uint64:
            raise CorruptError(f"{path}: not fitted for SSCD: shapes {matrix_DD.shape}, {background_MD.shape}")
        return cls(mean_D, matrix_DD, background_MD, keys_M2)


def fit_whitening(stored_ND: npt.NDArray[np.float16]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean (D,) and the whitening matrix (D, D) of descriptors as they are stored.

    Directions in which the sample does not vary get no weight.

    Raises:
        DimensionError: Fewer than two rows a dimension: such a covariance is mostly chance.
    """
    num_rows, dim = stored_ND.shape
    if num_rows < 2 * dim:
        raise DimensionError(f"{num_rows} descriptors, and at least {2 * dim} are needed to whiten {dim} dimensions")
    x_ND = stored_ND.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    x_ND -= mean_D
    variance_D, components_DD = np.linalg.eigh(x_ND.T @ x_ND / num_rows)
    variance_D, components_DD = variance_D[::-1], components_DD[:, ::-1]  # largest first
    strongest: npt.NDArray[Any] = components_DD[np.abs(components_DD).argmax(axis=0), np.arange(dim)]
    components_DD = components_DD * np.where(strongest < 0, -1, 1)  # a sign is a convention: fix it
    varies_D = variance_D > _MIN_RELATIVE_VARIANCE * variance_D[0]
    scale_D = np.zeros(dim)
    scale_D[varies_D] = 1 / np.sqrt(variance_D[varies_D])
    return mean_D, components_DD * scale_D
