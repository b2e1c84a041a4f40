"""How long a page would keep an HTML parser busy, told by one pass over its bytes.

lexbor is quadratic in the attributes of a tag (each is compared with those before it) and in the depth of the tree (the
stack of open elements is searched): 10,000 of either take 0.2 s, 40,000 take 3 s, and a page of 10 MB could hold a
million. The deepest of 130 real pages has, counted as here, some 1,100 open tags.
"""

import re

import numpy as np
import numpy.typing as npt

from curation.errors import LinkError
from curation.indexes.compiled import compiled

MAX_OPEN_TAGS = 10_000
MAX_ATTRIBUTES = 2_000
MAX_WORK = 500_000_000  # sum of depths and of squared numbers of attributes; 2 to 4 s

# Void elements, and those that the next one closes: they make the tree no deeper.
_FLAT = b" area base br col embed hr img input link meta param source track wbr li p td th tr dt dd option "
_RAW_TEXT = b" script style textarea title xmp iframe noembed noframes "
_WITHOUT_RAW_TEXT = re.compile(rb"<(?:svg|math|select|frameset)", re.IGNORECASE)
_NAME_BYTES = 10
_SLOTS = 4096


def refuse_costly(page: bytes) -> None:
    """Refuse a page that is built to take forever.

    Elements like ``<script>`` hold text in HTML and may hold tags inside ``<svg>``: a page that has such places must
    be cheap either way.

    Raises:
        LinkError: With reason ``bad_page``.
    """
    if page.count(b"<") * 8 < MAX_ATTRIBUTES and len(page) < MAX_ATTRIBUTES:
        return
    for honour_raw_text in (True, False) if _WITHOUT_RAW_TEXT.search(page) else (True,):
        depth, attributes, work = _scan(np.frombuffer(page, np.uint8), _FLAT_NAMES, _RAW_NAMES, honour_raw_text)
        if depth > MAX_OPEN_TAGS:
            raise LinkError("bad_page", f"more than {MAX_OPEN_TAGS} open tags")
        if attributes > MAX_ATTRIBUTES:
            raise LinkError("bad_page", f"a tag with more than {MAX_ATTRIBUTES} attributes")
        if work > MAX_WORK:
            raise LinkError("bad_page", "deep, and long at that")


def _names(listed: bytes) -> npt.NDArray[np.uint64]:
    found = []
    for name in listed.split():
        code = 0
        for byte in name:
            code = code * 31 + byte
        found.append(code)
    return np.array(found, dtype=np.uint64)


_FLAT_NAMES = _names(_FLAT)
_RAW_NAMES = _names(_RAW_TEXT)


@compiled
def _scan(
    page: npt.NDArray[np.uint8],
    flat: npt.NDArray[np.uint64],
    raw: npt.NDArray[np.uint64],
    honour_raw_text: bool,
) -> tuple[int, int, int]:
    """Return the greatest depth, the most attributes of a tag, and the work.

    A closing tag lessens the depth only where one of its name is open: what closes nothing is ignored by parsers.
    """
    opened = np.zeros(_SLOTS, np.int64)
    depth = most_depth = most_attributes = work = 0
    end = len(page)
    place = 0
    inside = np.uint64(0)  # the raw text element that we are in
    while place < end - 1:
        if page[place] != 60:  # <
            place += 1
            continue
        place += 1
        closing = page[place] == 47  # /
        if closing:
            place += 1
        name = np.uint64(0)
        start = place
        while place < end and place - start < _NAME_BYTES:
            byte = page[place] | 32
            if not (97 <= byte <= 122 or (place > start and 48 <= page[place] <= 57)):
                break
            name = name * np.uint64(31) + np.uint64(byte if byte >= 97 else page[place])
            place += 1
        if place == start or (inside != 0 and not (closing and name == inside)):
            continue
        slot = np.int64(name % np.uint64(_SLOTS))
        is_flat = bool((flat == name).any())
        if closing:
            inside = np.uint64(0)
            if opened[slot] > 0 and not is_flat:
                opened[slot] -= 1
                depth -= 1
        elif not is_flat:
            opened[slot] += 1
            depth += 1
            most_depth = max(most_depth, depth)
        work += depth
        attributes = 0
        between = True
        after_equals = False
        while place < end and page[place] != 62:  # >
            byte = page[place]
            if byte == 32 or 9 <= byte <= 13 or byte == 47:
                between = True
            elif byte == 61 and not between:  # =
                after_equals = True
                between = False
            elif (byte == 34 or byte == 39) and after_equals:
                place += 1
                while place < end and page[place] != byte:
                    place += 1
                between, after_equals = True, False
            else:
                if between and not after_equals:
                    attributes += 1
                between = after_equals = False
            place += 1
        most_attributes = max(most_attributes, attributes)
        work += attributes * attributes
        if honour_raw_text and not closing and (raw == name).any():
            inside = name
    return most_depth, most_attributes, work
