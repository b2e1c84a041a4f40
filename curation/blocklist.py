"""Lists of images that must not be kept: sha256 digests in hex, one a line.

A list may have millions of lines. Digests lie sorted in a scratch file that is mapped, 32 bytes each, so that every
process that looks them up shares the same memory with the page cache and none holds them.

Lines are digests in either case, also as ``sha256sum`` writes them, with a file name behind. Empty lines and those that
start with ``#`` say nothing. Anything else is an error: a list that is silently cut short protects nobody.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from curation.errors import BlocklistedError, InputError

_BYTES = 32
_ID_BYTES = 16  # of a digest make an image id
_LINES = 100_000
Versions = tuple[tuple[str, int, int], ...]
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


class Blocklists:
    """Some lists; the first one that has an image names it.

    Args:
        paths: Files.

    Raises:
        InputError: A file cannot be read, or has a line that is no digest.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._lists = [(Path(path).name, read_list(Path(path), "sha256", "fetch.blocked_hashes")) for path in paths]
        for _, digests in self._lists:
            digests.sort()

    def __bool__(self) -> bool:
        return bool(self._lists)

    def check(self, data: bytes) -> None:
        """Refuse an image that is on a list.

        Args:
            data: All bytes, as fetched.

        Raises:
            BlocklistedError: It is.
        """
        if self._lists:
            digest = hashlib.sha256(data).digest()
            for name, digests in self._lists:
                if _holds(digests, digest):
                    raise BlocklistedError(digest.hex(), name)

    def find(self, image_ids: Sequence[str | None]) -> dict[int, tuple[str, str]]:
        """Return the places of listed images among image ids: place → (sha256 in hex, name of the list)."""
        found: dict[int, tuple[str, str]] = {}
        places = [place for place, image_id in enumerate(image_ids) if image_id is not None]
        wanted = np.array([bytes.fromhex(image_ids[place] or "") for place in places], f"S{_ID_BYTES}")
        for name, digests in self._lists:
            if not len(digests) or not len(wanted):
                continue
            # A digest that begins with the id is the first that is not smaller than the id with zeros behind it.
            nearest = digests[np.minimum(np.searchsorted(digests, wanted.astype(f"S{_BYTES}")), len(digests) - 1)]
            for match in np.flatnonzero(nearest.astype(f"S{_ID_BYTES}") == wanted).tolist():
                found.setdefault(places[match], (nearest[match].ljust(_BYTES, b"\0").hex(), name))
        return found


def blocklists(paths: Sequence[str]) -> Blocklists:
    """Return lists as they are now, read once in each process."""
    return _blocklists(versions(paths))


@lru_cache(maxsize=2)
def _blocklists(found: Versions) -> Blocklists:
    return Blocklists([path for path, _, _ in found])


def versions(paths: Sequence[str], setting: str = "fetch.blocked_hashes") -> Versions:
    """Return files with what changes when they do: time and size."""
    found = []
    for path in paths:
        try:
            status = Path(path).stat()
        except OSError as error:
            raise InputError(f"{setting}: {path} cannot be read: {error.strerror}") from error
        found.append((path, status.st_mtime_ns, status.st_size))
    return tuple(found)


def read_list(path: Path, what: str, setting: str) -> npt.NDArray[np.bytes_]:
    """Return the entries of a list, 32 bytes each, in the order of the file, in a scratch file that is mapped.

    Args:
        path: The file.
        what: What an entry is, for messages.
        setting: The setting that names the file, for messages.

    Raises:
        InputError: The file cannot be read, or has a line that is no entry.
    """
    with TemporaryFile(prefix="curation-blocklist-") as scratch:
        size = 0
        for entries in _entries(path, what, setting):
            size += scratch.write(entries)
        scratch.flush()
        return np.memmap(scratch, f"S{_BYTES}", "r+") if size else np.empty(0, f"S{_BYTES}")


def _entries(path: Path, what: str, setting: str) -> Iterator[bytes]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            number = 0
            while lines := list(islice(stream, _LINES)):
                yield _parsed(path, lines, number, what, setting)
                number += len(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{setting}: {path} cannot be read: {error}") from error


def _parsed(path: Path, lines: list[str], before: int, what: str, setting: str) -> bytes:
    try:
        found = bytes.fromhex("".join(lines))  # skips white space: two million lines a second
        if len(found) == _BYTES * len(lines) and all(len(line.strip()) == 2 * _BYTES for line in lines):
            return found
    except ValueError:
        pass  # names, comments, or a mistake
    parts = []
    for number, line in enumerate(lines, before + 1):
        text = line.partition("#")[0].split(maxsplit=1)
        if not text:
            continue
        if not _DIGEST.fullmatch(text[0]):
            raise InputError(
                f"{setting}: {path}: line {number} is no {what} of 64 hexadecimal digits: {text[0][:80]!r}"
            )
        parts.append(bytes.fromhex(text[0]))
    return b"".join(parts)


def _holds(digests: npt.NDArray[np.bytes_], digest: bytes) -> bool:
    wanted = np.array(digest, f"S{_BYTES}")  # compared without zeros at the end, on both sides
    place = int(np.searchsorted(digests, wanted))
    return place < len(digests) and bool(digests[place] == wanted[()])
