"""Rows of features: normalised, or marked as missing."""

from typing import Any

import numpy as np
import numpy.typing as npt


def normalised(features_ND: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return rows of unit length, float32; NaN rows where a feature is not finite or all are zero.

    Each row is normalised by itself in float64, so that the result does not depend on its neighbours.
    """
    x_ND = np.asarray(features_ND, dtype=np.float64)
    norms_N1 = np.sqrt((x_ND * x_ND).sum(axis=1, keepdims=True))
    usable_N1 = np.isfinite(norms_N1) & (norms_N1 > 0)
    unit_ND = np.full(x_ND.shape, np.nan)
    np.divide(x_ND, norms_N1, out=unit_ND, where=np.broadcast_to(usable_N1, x_ND.shape))
    return unit_ND.astype(np.float32)
