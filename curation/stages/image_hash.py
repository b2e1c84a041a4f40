"""The 64-bit hashes of the imagehash library, for comparing and for runs that must match hashes made with it."""

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import UsageError


class ImageHash:
    """One of ``phash``, ``dhash`` and ``whash``, at the library's default size of 8 x 8 bits.

    Source:
        Buchner, https://github.com/JohannesBuchner/imagehash
    """

    def __init__(self, method: str) -> None:
        """Take the library's function.

        Raises:
            UsageError: The library is not installed, or has no such hash.
        """
        if method not in ("phash", "dhash", "whash"):
            raise UsageError(f"pca_hash.method {method}: must be pca, phash, dhash or whash")
        try:
            library: Any = importlib.import_module("imagehash")
        except ImportError as error:
            raise UsageError(
                f"pca_hash.method {method} needs the imagehash library: pip install 'curation[imagehash]'"
            ) from error
        self._function = getattr(library, method)

    def __call__(self, rgb_HW3: npt.NDArray[np.uint8]) -> np.uint64:
        """Return the hash of one image; bits row by row, most significant first, as the library writes them in hex."""
        bits = self._function(Image.fromarray(rgb_HW3)).hash
        packed = np.packbits(np.asarray(bits, dtype=bool).reshape(-1))
        return np.uint64(int.from_bytes(packed.tobytes(), "big"))
