"""What the markers of a plain baseline JPEG say, up to its only scan; anything else is nobody's business here.

Source:
    ITU-T T.81 (1992), annex B.
"""

import functools
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from curation import containers

_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential, Huffman
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8}  # progressive, lossless, arithmetic

_MAX_CODES = 2048  # bytes of codes that are taken in together; those of most files are 432

Code = tuple[bytes, bytes]  # how many codes of each length 1 to 16, and their symbols


@dataclass
class Header:
    """What the markers before the scan say."""

    width: int = 0
    height: int = 0
    orientation: int = 1
    restart_interval: int = 0
    transform: int = 1  # of Adobe's marker; 0: RGB
    scan: int = 0  # first byte of entropy-coded data
    components: list[tuple[int, int, int, int]] = field(default_factory=list)  # id, across, down, quantisation
    tables_C2: list[tuple[int, int]] = field(default_factory=list)  # DC and AC code of each component
    quantisation: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)  # in zigzag order
    codes: dict[int, Code] = field(default_factory=dict)  # class << 4 | id -> lengths, symbols


def read_header(data: bytes) -> Header | None:
    """Read the markers up to the only scan; None if anything is not plain baseline JPEG."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    header, place, is_first_code = Header(), 2, True
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xC4 and is_first_code:  # most files have nothing but those of common encoders up to the scan
            is_first_code = False
            end = data.find(b"\xff\xda", place, place + _MAX_CODES)
            codes = _codes_of_segments(data[place:end]) if end > 0 else None
            if codes is not None:
                header.codes.update(codes)
                place = end
                continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if length < 2 or len(body) != length - 2 or marker in _OTHER_FRAMES or not 0xC0 <= marker <= 0xFE:
            return None
        place += 2 + length
        if marker == 0xDA:
            header.scan = place
            return header if _scan(header, body) else None
        if not _segment(header, marker, body):
            return None
    return None


def _segment(header: Header, marker: int, body: bytes) -> bool:
    """Take in one marker segment; False if it is broken or not of a plain file."""
    if marker in _FRAMES:
        return _frame(header, body)
    if marker in (0xDB, 0xC4):
        tables = _quantisation(body) if marker == 0xDB else _codes(body)
        if tables is None:
            return False
        (header.quantisation if marker == 0xDB else header.codes).update(tables)  # type: ignore[arg-type]
        return True
    if marker == 0xDD and len(body) == 2:
        header.restart_interval = int.from_bytes(body, "big")
    elif marker == 0xE1 and body[:6] == b"Exif\0\0":
        header.orientation = containers.exif_orientation(body)
    elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
        header.transform = body[11]
    return marker >= 0xDB


def _frame(header: Header, body: bytes) -> bool:
    if header.components or len(body) < 6 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return False
    header.height, header.width = struct.unpack(">HH", body[1:5])
    for index in range(body[5]):
        identity, sampling, table = body[6 + 3 * index : 9 + 3 * index]
        header.components.append((identity, sampling >> 4, sampling & 15, table))
    if len(header.components) not in (1, 3) or not header.width or not header.height:
        return False
    if any(not 1 <= factor <= 4 for _, across, down, _ in header.components for factor in (across, down)):
        return False
    first = header.components[0]
    # Luma has the finest samples in every ordinary file; the rest of this module counts on it.
    return all(across <= first[1] and down <= first[2] for _, across, down, _ in header.components)


@functools.lru_cache(maxsize=256)  # most files of a crawl share the tables of few encoders
def _quantisation(body: bytes) -> dict[int, npt.NDArray[np.int64]] | None:
    """Return the steps by table; None if the segment is broken."""
    tables = {}
    while body:
        wide, name = body[0] >> 4, body[0] & 15
        size = 128 if wide else 64
        if wide > 1 or len(body) < 1 + size:
            return None
        tables[name] = np.frombuffer(body[1 : 1 + size], ">u2" if wide else np.uint8).astype(np.int64)
        body = body[1 + size :]
    return tables


@functools.lru_cache(maxsize=256)
def _codes_of_segments(segments: bytes) -> dict[int, Code] | None:
    """Return the codes of whole segments; None if there is anything else."""
    codes: dict[int, Code] = {}
    while segments:
        end = 2 + int.from_bytes(segments[2:4], "big")
        own = _codes(segments[4:end]) if 4 <= end <= len(segments) and segments[:2] == b"\xff\xc4" else None
        if own is None:
            return None
        codes |= own
        segments = segments[end:]
    return codes


@functools.lru_cache(maxsize=256)
def _codes(body: bytes) -> dict[int, Code] | None:
    """Return the codes by class << 4 | name; None if the segment is broken."""
    codes = {}
    while body:
        lengths = body[1:17]
        count = sum(lengths)
        if len(lengths) < 16 or count > 256 or len(body) < 17 + count or body[0] & 0xEC:
            return None
        codes[body[0]] = (lengths, body[17 : 17 + count])
        body = body[17 + count :]
    return codes


def _scan(header: Header, body: bytes) -> bool:
    count = len(header.components)
    if not count or len(body) != 4 + 2 * count or body[0] != count or body[-3:] != b"\x00\x3f\x00":
        return False
    names = [body[1 + 2 * index] for index in range(count)]
    is_rgb = count == 3 and (header.transform == 0 or bytes(names) == b"RGB")
    header.tables_C2 = [(body[2 + 2 * index] >> 4, body[2 + 2 * index] & 15) for index in range(count)]
    return not is_rgb and names == [component[0] for component in header.components]
