"""Images that must not be kept: the same bytes as a listed image, or almost the same picture.

The same picture, encoded anew or made smaller, has other bytes. Its PDQ hash, 256 bits of the luma's low frequencies,
differs in few bits: up to 31 is what the makers of the hash call a match. Lists of hashes are compared with outright:
20 ms for a million, on a busy core, beside which each image is decoded once more.

Source:
    Davis and Rosen 2019, "Open-sourcing photo- and video-matching technology to make the internet safer".
"""

import hashlib
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.blocklist import Blocklists, Versions, read_list, versions
from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.crashes import watch
from curation.errors import BlocklistedError, UsageError
from curation.images import decode

_SIDE_PX = 512  # the hash makes 64 x 64 of it: a JPEG need not be decoded in full
_MIN_QUALITY = 50  # of 100; flatter pictures have hashes that say little, as its makers warn
_WORDS = 4  # of 64 bits
_CHUNK = 1 << 16


class BlockedImages(Blocklists):
    """Lists of digests and of PDQ hashes.

    Args:
        fetch: Names the lists.
        images: Limits of decoding.

    Raises:
        InputError: A list cannot be read, or has a line that is no hash.
        UsageError: There are lists of PDQ hashes, and the library that makes them is not installed.
    """

    def __init__(self, fetch: FetchConfig, images: ImagesConfig) -> None:
        super().__init__(fetch.blocked_hashes)
        self._distance = fetch.blocked_pdq_distance
        self._limits = images
        self._alike = [(Path(path).name, _words(Path(path))) for path in fetch.blocked_pdq]
        self._compute: Any = _library().compute if self._alike else None

    def check(self, data: bytes) -> None:
        """Refuse an image that is on a list, or looks like one that is.

        Raises:
            BlocklistedError: It does.
            ImageError: It does not decode, so that its PDQ hash cannot be made.
        """
        super().check(data)
        if not self._alike:
            return
        digest = hashlib.sha256(data).hexdigest()
        with watch().at_work(digest[:32], data, self._limits):
            bits, quality = self._compute(decode(data, self._limits, _SIDE_PX))
        if quality < _MIN_QUALITY:
            return
        wanted = np.packbits(np.asarray(bits, bool)).view(np.uint64)
        for name, words in self._alike:
            if _nearest(words, wanted) <= self._distance:
                raise BlocklistedError(digest, name)


def blocked_images(fetch: FetchConfig, images: ImagesConfig) -> BlockedImages:
    """Return the lists that settings name, as they are now, read once in each process."""
    found = versions(fetch.blocked_hashes) + versions(fetch.blocked_pdq, "fetch.blocked_pdq")
    return _blocked_images(fetch, images, found)


@lru_cache(maxsize=2)
def _blocked_images(fetch: FetchConfig, images: ImagesConfig, found: Versions) -> BlockedImages:
    return BlockedImages(fetch, images)


def _library() -> Any:
    try:
        return importlib.import_module("pdqhash")
    except ImportError as error:
        raise UsageError("fetch.blocked_pdq needs the pdqhash library: pip install 'curation[pdq]'") from error


def _words(path: Path) -> npt.NDArray[np.uint64]:
    """Return the hashes of a list, shape (N, 4)."""
    return read_list(path, "PDQ hash", "fetch.blocked_pdq").view(np.uint64).reshape(-1, _WORDS)


def _nearest(words_NW: npt.NDArray[np.uint64], wanted_W: npt.NDArray[np.uint64]) -> int:
    """Return in how many bits the nearest hash differs; more than there are bits where there is none."""
    nearest = 64 * _WORDS + 1
    for start in range(0, len(words_NW), _CHUNK):
        chunk = words_NW[start : start + _CHUNK]
        different = np.zeros(len(chunk), np.uint16)
        for word in range(_WORDS):  # five times as fast as a sum over the rows of all four
            different += np.bitwise_count(chunk[:, word] ^ wanted_W[word])
        nearest = min(nearest, int(different.min()))
    return nearest
