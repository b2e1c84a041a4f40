"""Patterns with ``*``, matched in linear time whatever a stranger wrote into them; no regular expressions."""

import re

MAX_WORK = 4_000_000  # patterns x characters of a URL: about 10 ms, in which nothing else is done
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_NOT_ASCII = re.compile(r"(?:%[89A-F][0-9A-F])+")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class Glob:
    """A pattern that texts match as a whole; ``*`` is any run of characters, everything else is itself."""

    __slots__ = ("_head", "_middle", "_tail")

    def __init__(self, pattern: str) -> None:
        self._head, *rest = pattern.split("*")
        self._tail = rest.pop() if rest else None
        self._middle = [part for part in rest if part]

    def matches(self, text: str) -> bool:
        """Return whether ``text`` matches from its first to its last character."""
        if self._tail is None:
            return text == self._head
        place, end = len(self._head), len(text) - len(self._tail)
        if end < place or not text.startswith(self._head) or not text.endswith(self._tail):
            return False
        for part in self._middle:  # the first fit leaves the most room for the parts that follow
            place = text.find(part, place, end)
            if place < 0:
                return False
            place += len(part)
        return True


def path_glob(pattern: str) -> Glob:
    """Return the glob of a path pattern of robots.txt or tdmrep.json: a prefix, or all of it where it ends with ``$``.

    Both sides of a comparison must have gone through ``comparable``.
    """
    pattern = comparable(pattern)
    return Glob(pattern[:-1] if pattern.endswith("$") else pattern + "*")


def comparable(text: str) -> str:
    """Return a URL or a part of one in the spelling that patterns are compared in.

    Percent-encoded letters, digits, ``-._~`` are decoded, other escapes get upper case digits, and what is no ASCII is
    percent-encoded.

    Source:
        RFC 3986, section 6.2.2.
    """
    if not text.isascii():
        text = _escaped(text.encode("utf-8", "replace"))
    return _ESCAPE.sub(_decoded, text) if "%" in text else text


def caseless(text: str) -> str:
    """Return what ``comparable`` does, without the case of letters of any script."""
    text = comparable(text)
    return (_NOT_ASCII.sub(_lowered, text) if "%" in text else text).lower()


def _lowered(found: re.Match[str]) -> str:
    data = bytes.fromhex(found[0].replace("%", ""))
    return _escaped(data.decode("utf-8", "surrogateescape").lower().encode("utf-8", "surrogateescape"))


def _escaped(data: bytes) -> str:
    return "".join(chr(byte) if byte < 0x80 else f"%{byte:02X}" for byte in data)


def _decoded(found: re.Match[str]) -> str:
    char = chr(int(found[1], 16))
    return char if char in _UNRESERVED else f"%{found[1].upper()}"
