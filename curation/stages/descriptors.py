"""Feature rows as they are stored: float16 lists of a fixed size, null where a row is not finite."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def half_rows(features_ND: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return rows, shape (N, dim), as a column of float16 lists; a row with a NaN or an infinity is null."""
    missing_N: npt.NDArray[np.bool_] = np.logical_not(np.isfinite(features_ND).all(axis=1))
    stored_ND = np.where(missing_N[:, None], 0, features_ND).astype(np.float16)
    values = pa.array(stored_ND.ravel(), type=pa.float16())
    return pa.FixedSizeListArray.from_arrays(values, features_ND.shape[1], mask=pa.array(missing_N))
