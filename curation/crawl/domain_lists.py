"""Lists of domains, with millions of entries: 8 bytes an entry, read once, and mapped by every process.

A list has one domain a line (``example.com``, ``*.example.com``, ``.example.com``) or is in hosts format
(``0.0.0.0 example.com example.org``). What follows ``#`` says nothing, nor do lines that start with ``!``, ``;`` or
``//``. Names may be written in any script. An entry stands for itself and its subdomains.

What is kept of a name is its 64-bit BLAKE2b hash, sorted, in a file of the cache that is named after the content of the
lists; what in the lists is no name is counted in a file beside it. Two names share a hash with a probability of 2^-64:
of 10^9 hosts looked up among 10^7 entries, one is refused wrongly with a probability of 0.0005.
"""

import hashlib
import ipaddress
import json
import mmap
import os
import re
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curation.crawl.domains import registrable_domain
from curation.crawl.hosts import parse_host
from curation.errors import InputError, LinkError
from curation.models.weights import default_cache_dir

_FORMAT = 2  # raise when the same lists make another file
_HASH_BYTES = 8
_MAX_LINE_BYTES = 1 << 16  # a longer one counts as one entry that is no name
_MAX_NAME_BYTES = 253
_NAME = re.compile(rb"(?:[a-z0-9_-]+\.)*[a-z0-9_-]*[a-z_-][a-z0-9_-]*")  # its last label is no number
_MAX_BAD_SHARE = 0.1  # of lines that name no domain; more and it is another kind of file
_COMMENTS = (b"!", b";", b"//")
_COMMON_TARGETS = frozenset({b"0.0.0.0", b"127.0.0.1", b"::", b"::1"})  # of hosts files


class Contents(NamedTuple):
    """What a list holds.

    Attributes:
        num_names: Entries that name a domain.
        num_others: Entries that name none, and are left out.
        first_other: Line of the first of these, from 1; 0 where there are none.
    """

    num_names: int
    num_others: int
    first_other: int


class DomainSet:
    """Domains that hosts are looked up in.

    Args:
        hashes: Sorted unsigned 64-bit numbers.
        contents: Of each list that they come from.
    """

    def __init__(self, hashes: memoryview, contents: Sequence[Contents] = ()) -> None:
        self._hashes = hashes
        self.contents = tuple(contents)

    def __len__(self) -> int:
        return len(self._hashes)

    def covers(self, host: str) -> bool:
        """Return whether a host (as ``urls.WebUrl.host`` has it) or a domain above it is in the set."""
        name = host.removesuffix(".")
        while name:
            if self._has(name):
                return True
            name = "" if name.startswith("[") else name.partition(".")[2]
        return False

    def _has(self, name: str) -> bool:
        value = int.from_bytes(_hash(name.encode()), sys.byteorder)
        place = bisect_left(self._hashes, value)
        return place < len(self._hashes) and self._hashes[place] == value


def load_domains(paths: Sequence[str], whole_domains: bool = False, cache_dir: Path | None = None) -> DomainSet:
    """Return the union of lists.

    Args:
        paths: Local files.
        whole_domains: An entry stands for its registrable domain.
        cache_dir: Where the sorted hashes are kept; None: as ``weights.default_cache_dir`` says.

    Raises:
        InputError: A list cannot be read, or many of its lines name no domain.
    """
    digest = hashlib.sha256(repr((_FORMAT, sys.byteorder, whole_domains, list_digests(paths))).encode()).hexdigest()
    file = (cache_dir or default_cache_dir()) / "domains" / f"{digest}.u64"
    counts = file.with_suffix(".json")
    if not (file.exists() and counts.exists()):
        hashes, contents = _hashes(paths, whole_domains)
        try:
            _write(counts, json.dumps(contents).encode())
            _write(file, hashes)
        except OSError:  # a home that cannot be written to: this process keeps its own copy
            return DomainSet(memoryview(hashes).cast("Q"), contents)
    contents = [Contents(*entry) for entry in json.loads(counts.read_bytes())]
    with file.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:  # cannot be mapped
            return DomainSet(memoryview(b"").cast("Q"), contents)
        return DomainSet(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)).cast("Q"), contents)


def list_digests(paths: Sequence[str]) -> list[str]:
    """Return the sha256 of each file, in hex: what lists say shapes an output, not where they lie.

    Raises:
        InputError: If a file cannot be read.
    """
    digests = []
    for path in paths:
        try:
            found = Path(path).stat()
            digests.append(_digest(path, found.st_size, found.st_mtime_ns))
        except OSError as error:
            raise InputError(f"fetch.policy: {path} cannot be read: {error.strerror}") from error
    return digests


@lru_cache(256)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashes(paths: Sequence[str], whole_domains: bool) -> tuple[bytes, list[Contents]]:
    found = bytearray()
    contents = []
    for path in paths:
        before, bad, first_bad = len(found), 0, 0
        for line, name in _names(Path(path)):
            if name is None:
                bad += 1
                first_bad = first_bad or line
                continue
            if whole_domains:
                name = (registrable_domain(name.decode()) or name.decode()).encode()
            found += _hash(name)
        good = (len(found) - before) // _HASH_BYTES
        if bad > good * _MAX_BAD_SHARE:
            raise InputError(
                f"fetch.policy: {path}: {bad} entries name no domain (the first in line {first_bad}), and {good} do; "
                "give a list of domains"
            )
        contents.append(Contents(good, bad, first_bad))
    hashes = np.frombuffer(found, dtype=np.uint64)
    hashes.sort()  # in place: np.unique would hold several copies
    data: bytes = hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]].tobytes()
    return data, contents


def _names(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the names of a list with their lines, from 1; None for each entry that is none."""
    with path.open("rb") as stream:
        first = stream.read(3)
        stream.seek(3 if first == b"\xef\xbb\xbf" else 0)
        number = 0
        while line := stream.readline(_MAX_LINE_BYTES):
            number += 1
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield number, None
                while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = stream.readline(_MAX_LINE_BYTES)
                continue
            fields = line.partition(b"#")[0].lower().split()
            if not fields or fields[0].startswith(_COMMENTS):
                continue
            if len(fields) > 1 and not _is_address(fields[0]):
                yield number, None
                continue
            for field in fields[1:] or fields:
                name = field.removeprefix(b"*").removeprefix(b".").removesuffix(b".")
                is_plain = len(name) <= _MAX_NAME_BYTES and _NAME.fullmatch(name)
                yield number, name if is_plain else _any_name(name)


def _any_name(name: bytes) -> bytes | None:
    """Return an address, or a name of another script, as it stands in normalised URLs."""
    text = name.decode("utf-8", "replace")
    try:
        host = parse_host(f"[{text}]" if ":" in text and not text.startswith("[") else text).encode()
    except LinkError:
        return None
    return host if _NAME.fullmatch(host) or _is_address(host.strip(b"[]")) else None


def _is_address(field: bytes) -> bool:
    if field in _COMMON_TARGETS:
        return True
    try:
        ipaddress.ip_address(field.decode("ascii", "replace"))
    except ValueError:
        return False
    return True


def _hash(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=_HASH_BYTES).digest()


def _write(file: Path, data: bytes) -> None:
    """Write a file that other processes may be writing too: each a name of its own, the last rename wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(name, file)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise
