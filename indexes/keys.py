"""Image ids as numbers.

An image id is 16 bytes in hex (``schema.IMAGE_ID``). A *key* is the same 16 bytes as two big-endian uint64 numbers, so
that comparing (first, second) as numbers orders keys as their hex strings.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError, InputError

Keys = npt.NDArray[np.uint64]

KEY_BYTES = 16
NO_KEY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # both halves of the key of a neighbour that does not exist


def keys_from_hex(ids: Sequence[str]) -> Keys:
    """Return the keys of image ids.

    Args:
        ids: N strings of 32 hex digits.

    Returns:
        (N, 2) uint64.

    Raises:
        InputError: An id is not 32 hex digits.
    """
    if any(len(image_id) != 2 * KEY_BYTES for image_id in ids):
        bad = next(image_id for image_id in ids if len(image_id) != 2 * KEY_BYTES)
        raise InputError(f"image id {bad[:40]!r} must have {2 * KEY_BYTES} hex digits")
    try:
        data = bytes.fromhex("".join(ids))
    except ValueError:
        raise InputError("an image id has a character that is not a hex digit") from None
    if len(data) != KEY_BYTES * len(ids):  # fromhex skips blanks
        raise InputError("an image id has a blank in it")
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def hex_from_keys(keys_N2: Keys) -> list[str]:
    """Return the image ids of (N, 2) keys: the inverse of ``keys_from_hex``."""
    digits = check_keys(keys_N2, len(keys_N2)).astype(">u8").tobytes().hex()
    return [digits[start : start + 2 * KEY_BYTES] for start in range(0, len(digits), 2 * KEY_BYTES)]


def check_keys(keys_N2: Keys, num_rows: int) -> Keys:
    """Return the keys if they are (num_rows, 2) uint64.

    Raises:
        DimensionError: They are not.
    """
    if keys_N2.dtype != np.uint64 or keys_N2.shape != (num_rows, 2):
        raise DimensionError(f"keys must be uint64 ({num_rows}, 2), got {keys_N2.dtype} {keys_N2.shape}")
    return keys_N2
