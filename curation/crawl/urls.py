"""One spelling for each web address.

The rules are those of browsers (WHATWG URL) as far as http and https need them: relative references, backslashes,
white space, percent-encoding, dot segments, international names, IPv4 addresses in decimal, octal and hexadecimal.
Fragments and default ports are dropped. Queries are encoded in the charset of the page that they stand in.
"""

import codecs
import re
from dataclasses import dataclass
from functools import lru_cache

from curation.crawl.hosts import parse_host
from curation.errors import LinkError

MAX_URL_CHARS = 8192  # longer ones are refused by most servers
DEFAULT_PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_C0_AND_SPACE = "".join(map(chr, range(0x21)))
_TAB_AND_NEWLINES = str.maketrans("", "", "\t\n\r")
_IN_PATH = frozenset(b' "#<>?^`{}')
_IN_QUERY = frozenset(b" \"#<>'")
_IS_PLAIN = re.compile(r"[A-Za-z0-9\-._~!$%&()*+,;=:@/\[\]|]*")  # as it stands in a path and in a query
_SURROGATE = re.compile("[\ud800-\udfff]")
_SINGLE_DOT = frozenset({".", "%2e"})
_DOUBLE_DOT = frozenset({"..", ".%2e", "%2e.", "%2e%2e"})


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A normalised http or https URL in parts.

    Attributes:
        scheme: ``http`` or ``https``.
        host: Lower case; ASCII name, dotted IPv4, or IPv6 in brackets.
        port: Always given.
        path: Starts with a slash; percent-encoded.
        query: Without the question mark; None where there is none.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str | None

    @property
    def origin(self) -> str:
        """Scheme, host and port, the port only where it is not the default."""
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}"

    @property
    def path_and_query(self) -> str:
        """What a server sees of it."""
        return self.path if self.query is None else f"{self.path}?{self.query}"

    def __str__(self) -> str:
        return self.origin + self.path_and_query


def normalise(text: str, base: str | None = None, charset: str = "utf-8") -> str:
    """Return the normalised form of an http or https URL.

    Args:
        text: The URL as found, absolute or relative to ``base``.
        base: A normalised URL.
        charset: Of the page, a codec of Python that is not UTF-16: what its queries are encoded in.

    Raises:
        LinkError: ``bad_url``, ``policy_scheme`` or ``policy_credentials``.

    Source:
        WHATWG URL Standard, https://url.spec.whatwg.org/
    """
    return str(parse(text, base, charset))


def parse(text: str, base: str | None = None, charset: str = "utf-8") -> WebUrl:
    """Return the parts of a URL; see ``normalise``."""
    text = text.strip(_C0_AND_SPACE).translate(_TAB_AND_NEWLINES)
    if len(text) > MAX_URL_CHARS:
        raise LinkError("bad_url", f"longer than {MAX_URL_CHARS} characters")
    text = text.partition("#")[0]
    origin = None if base is None else _parsed(base)
    found = _SCHEME.match(text)
    scheme, rest = (found[1].lower(), text[found.end() :]) if found else ("", text)
    if found and scheme not in DEFAULT_PORTS:
        raise LinkError("policy_scheme", f"scheme {scheme[:20]} is neither http nor https")
    address, question, query_text = rest.partition("?")
    address = address.replace("\\", "/")
    query = _encode(query_text, _IN_QUERY, charset) if question else None
    relative = not found or (origin is not None and scheme == origin.scheme and not address.startswith("//"))
    if not relative:
        return _absolute(scheme, address.lstrip("/"), query)
    if origin is None:
        raise LinkError("bad_url", "relative, and there is no page to start from")
    if address.startswith("//"):
        return _absolute(origin.scheme, address.lstrip("/"), query)
    return _relative(origin, address, query)


_parsed = lru_cache(1 << 10)(parse)  # of pages, which have many links


def _absolute(scheme: str, address: str, query: str | None) -> WebUrl:
    authority, _, path = address.partition("/")
    if "@" in authority:
        raise LinkError("policy_credentials", "carries a user name or password")
    host, port = _split_port(authority, scheme)
    return WebUrl(scheme, parse_host(host), port, _path("/" + path), query)


def _relative(origin: WebUrl, address: str, query: str | None) -> WebUrl:
    if not address:
        return WebUrl(origin.scheme, origin.host, origin.port, origin.path, origin.query if query is None else query)
    path = address if address.startswith("/") else origin.path.rpartition("/")[0] + "/" + address
    return WebUrl(origin.scheme, origin.host, origin.port, _path(path), query)


def _split_port(authority: str, scheme: str) -> tuple[str, int]:
    host, colon, port_text = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        return authority, DEFAULT_PORTS[scheme]
    if not port_text:
        return host, DEFAULT_PORTS[scheme]
    digits = port_text.lstrip("0")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 5 or int(digits) > 65535:
        raise LinkError("bad_url", f"port {port_text[:20]!r} is not a number from 1 to 65535")
    return host, int(digits)


@lru_cache(1 << 14)
def _path(text: str) -> str:
    """Remove dot segments and encode what must not stand in a path."""
    if "/." not in text and "/%2" not in text:
        return "/" + _encode(text[1:], _IN_PATH)
    segments: list[str] = []
    parts = text[1:].split("/")
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        lowered = part.lower()
        if lowered in _DOUBLE_DOT:
            if segments:
                segments.pop()
            if is_last:
                segments.append("")
        elif lowered in _SINGLE_DOT:
            if is_last:
                segments.append("")
        else:
            segments.append(part)
    return "/" + _encode("/".join(segments), _IN_PATH)


def _encode(text: str, escaped: frozenset[int], charset: str = "utf-8") -> str:
    if _IS_PLAIN.fullmatch(text):
        return text
    # Bytes of a header that are not UTF-8 arrive as surrogate escapes, and leave as the bytes they were.
    try:
        data = text.encode(charset, "surrogateescape" if charset == "utf-8" else _IN_CHARSET)
    except UnicodeEncodeError:
        data = _SURROGATE.sub("\ufffd", text).encode()
    return "".join(f"%{byte:02X}" if byte < 0x20 or byte > 0x7E or byte in escaped else chr(byte) for byte in data)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that the charset of a page lacks, and where they end.

    Source:
        WHATWG URL Standard, "percent-encode after encoding".
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(f"%26%23{ord(char)}%3B" for char in error.object[error.start : error.end]), error.end


_IN_CHARSET = "curation.in_charset"
codecs.register_error(_IN_CHARSET, _stand_in)
