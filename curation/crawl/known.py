"""The URLs that a collection has already, on scratch disk: which rows of a later list are new.

Holds 16 bytes a URL, in 256 sorted files that are mapped: a billion URLs take 16 GB of disk, 64 MB of memory while one
file is sorted, and what the page cache can spare. That two of a billion URLs have the same 16 bytes is out of the
question.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_BUCKETS = 256
_KEY_BYTES = 16
_HELD = 500_000

Keys = npt.NDArray[np.bytes_]


class KnownUrls:
    """A set of URLs.

    Args:
        folder: An empty folder of this machine.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._paths = [folder / f"{bucket:03d}" for bucket in range(_BUCKETS)]
        self._waiting: list[Keys] = []
        self._is_sorted = False

    def add(self, urls: Iterable[str]) -> None:
        """Put URLs in; all of them before the first question.

        Raises:
            ValueError: After the first question.
        """
        if self._is_sorted:
            raise ValueError("URLs cannot be added once they were asked for")
        self._waiting.append(_keys(urls))
        if sum(map(len, self._waiting)) >= _HELD:
            self._write()

    def _write(self) -> None:
        keys = np.concatenate([*self._waiting, _keys(())])
        for bucket, rows in _by_bucket(keys):
            with self._paths[bucket].open("ab") as stream:
                stream.write(keys[rows].tobytes())
        self._waiting.clear()

    def new(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the rows whose URL is not in the set, in their order; tables may be empty.

        Args:
            tables: With a column ``url``, without nulls.
        """
        held = self._sorted()
        for table in tables:
            keys = _keys(table.column("url").to_pylist())
            known = np.zeros(len(keys), bool)
            for bucket, rows in _by_bucket(keys):
                if len(held[bucket]):
                    place = np.minimum(np.searchsorted(held[bucket], keys[rows]), len(held[bucket]) - 1)
                    known[rows] = held[bucket][place] == keys[rows]
            yield table.filter(pa.array(~known))

    def _sorted(self) -> list[Keys]:
        """Return the keys of each bucket, sorted where they lie."""
        if not self._is_sorted:
            self._is_sorted = True
            self._write()
            for path in filter(Path.exists, self._paths):
                np.memmap(path, f"S{_KEY_BYTES}", "r+").sort()
        nothing = _keys(())
        return [np.memmap(path, f"S{_KEY_BYTES}", "r") if path.exists() else nothing for path in self._paths]


def _keys(urls: Iterable[str]) -> Keys:
    digests = (hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest() for url in urls)
    return np.array(bytearray(b"".join(digests)), np.uint8).view(f"S{_KEY_BYTES}")


def _by_bucket(keys: Keys) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each bucket and the places of its keys."""
    if not len(keys):
        return
    buckets = keys.view(np.uint8).reshape(-1, _KEY_BYTES)[:, 0]
    order = np.argsort(buckets, kind="stable")
    different, starts = np.unique(buckets[order], return_index=True)
    yield from zip(different.tolist(), np.split(order, starts[1:]), strict=True)
