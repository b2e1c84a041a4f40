"""Hosts of URLs, in one spelling each, by the rules of browsers (WHATWG URL).

Percent-encoded and international names (UTS 46), IPv4 addresses in one to four decimal, octal or hexadecimal numbers,
and IPv6 addresses.
"""

import ipaddress
import re
from functools import lru_cache

import idna

from curation.errors import LinkError

_JOINERS = "\u200c\u200d"
_MAX_NAME_CHARS = 1000  # of a host before it is mapped
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20#/:<>?@\[\\\]^|%\x7f]")


@lru_cache(1 << 14)
def parse_host(text: str) -> str:
    """Return a host as ``WebUrl.host`` has it.

    Raises:
        LinkError: With reason ``bad_url``.
    """
    if text.startswith("["):
        return _ipv6(text)
    name = _percent_decode(text)
    if not name.isascii():
        name = _ascii_name(name)
    name = name.lower()
    if not name or len(name) > 254 or _FORBIDDEN_IN_HOST.search(name):
        raise LinkError("bad_url", f"host {text[:80]!r} is not a name")
    labels = name.removesuffix(".").split(".")
    if any(not label or len(label) > 63 for label in labels):
        raise LinkError("bad_url", f"host {text[:80]!r} has an empty label or one of more than 63 characters")
    last = labels[-1]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        return _ipv4(labels, text)
    return name


def _ascii_name(name: str) -> str:
    """Map a name of another script as browsers do (UTS 46); IDNA 2008 would refuse names that exist, like emoji."""
    if len(name) > _MAX_NAME_CHARS:  # encoding a label takes time quadratic in its length
        raise LinkError("bad_url", f"host {name[:80]!r} is too long")
    try:
        mapped = idna.uts46_remap(name, std3_rules=False, transitional=False)
        return ".".join(map(_ascii_label, mapped.split(".")))
    except ValueError as error:  # idna.IDNAError among them
        raise LinkError("bad_url", f"host {name[:80]!r} is not an international name: {error}") from error


def _ascii_label(label: str) -> str:
    if label.startswith("xn--"):
        decoded = label[4:].encode("ascii").decode("punycode")
        if decoded.isascii() or _ascii_label(idna.uts46_remap(decoded, std3_rules=False, transitional=False)) != label:
            raise idna.IDNAError(f"{label} is no encoded name")
        return label
    if label.isascii():
        return label
    for place, char in enumerate(label):
        if char in _JOINERS and not idna.valid_contextj(label, place):
            raise idna.IDNAError("a joiner between letters that are not joined")
    idna.check_bidi(label)
    return f"xn--{label.encode('punycode').decode('ascii')}"


def _ipv4(labels: list[str], text: str) -> str:
    """Read the one to four numbers of an IPv4 address; the last one fills the bytes that are left."""
    numbers = [_number(label) for label in labels]
    if len(numbers) > 4 or any(number is None for number in numbers):
        raise LinkError("bad_url", f"host {text[:80]!r} ends in a number and is no IPv4 address")
    *heads, tail = [number for number in numbers if number is not None]
    if any(head > 255 for head in heads) or tail >= 256 ** (4 - len(heads)):
        raise LinkError("bad_url", f"host {text[:80]!r} is out of the range of IPv4 addresses")
    value = tail + sum(head << (8 * (3 - place)) for place, head in enumerate(heads))
    return str(ipaddress.IPv4Address(value))


def _number(label: str) -> int | None:
    if re.fullmatch(r"0x[0-9a-f]*", label):
        return int(label[2:] or "0", 16)
    if re.fullmatch(r"0[0-7]*", label):
        return int(label, 8)
    return int(label) if re.fullmatch(r"[1-9][0-9]*", label) else None


def _ipv6(text: str) -> str:
    try:
        # A zone (%eth0) would be accepted by ipaddress; it names an interface of this machine.
        if not text.endswith("]") or "%" in text:
            raise ValueError("no closing bracket, or a zone")
        return f"[{_compressed(ipaddress.IPv6Address(text[1:-1]))}]"
    except ValueError as error:
        raise LinkError("bad_url", f"host {text[:80]!r} is no IPv6 address") from error


def _compressed(address: ipaddress.IPv6Address) -> str:
    """Return the one spelling of the standard; ``str`` writes IPv4-mapped addresses differently from Python 3.13 on."""
    pieces = [f"{int(piece, 16):x}" for piece in address.exploded.split(":")]
    runs = [(start, stop) for start in range(8) for stop in range(start + 2, 9) if set(pieces[start:stop]) == {"0"}]
    if not runs:
        return ":".join(pieces)
    start, stop = max(runs, key=lambda run: (run[1] - run[0], -run[0]))
    return f"{':'.join(pieces[:start])}::{':'.join(pieces[stop:])}"


def _percent_decode(text: str) -> str:
    if "%" not in text:
        return text
    data = re.sub(
        rb"%([0-9A-Fa-f]{2})", lambda found: bytes([int(found[1], 16)]), text.encode("utf-8", "surrogateescape")
    )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LinkError("bad_url", f"host {text[:80]!r} is not UTF-8") from error
