"""Numbers and untrusted text, as people read them."""

from http import HTTPStatus

from curation import schema

_REASONS = {
    "not_an_image": "the content is none of the allowed formats",
    "truncated": "ends before it should",
    "undecodable": "broken content",
    "crashes_decoder": "kills the process that decodes it",
    "decode_timeout": "takes too long to decode",
    "too_many_pixels": "more pixels than images.max_pixels",
    "too_large": "more bytes than fetch.max_bytes",
    "too_small": "a side under images.min_side_px",
    "bad_aspect": "longer and thinner than images.max_aspect",
    "bad_url": "no URL",
    "policy_scheme": "neither http nor https",
    "policy_credentials": "the URL carries a user name or a password",
    "policy_port": "a port of other services, or none of those allowed",
    "policy_domain": "its domain is on a list of blocked ones, or on none of the allowed ones",
    "policy_pattern": "a pattern of blocked URLs matches it",
    "tracking_pixel": "its address is that of a tracking pixel",
    "policy_address": "the host's addresses are not public",
    "robots": "robots.txt forbids it, or could not be read",
    "opt_out_noai": "a page that shows it, or the answer, says noai",
    "opt_out_noimageai": "a page that shows it, or the answer, says noimageai",
    "opt_out_noml": "a page that shows it, or the answer, says noml",
    "opt_out_tdm": "the rights of text and data mining are reserved (TDMRep)",
    "dns": "the name does not resolve",
    "connect": "no connection, or one that broke",
    "tls": "the certificate or the handshake failed",
    "timeout": "the deadline fetch.timeout_s passed, or the server fell silent",
    "host_down": "its host gave no answer to many requests in a row; not requested",
    "host_busy": "its host kept saying that it gets too many requests; not requested",
    "too_many_frames": "an animation or a file of more frames than images.max_frames",
    "bad_redirect": "a redirect without a target, or to something that is not http or https",
    "too_many_redirects": "more redirects than fetch.max_redirects",
    "empty": "no bytes",
    "missing_file": "a local image is gone, or a Parquet row holds no bytes",
    "unreadable": "a local image cannot be read",
}


def reason_text(reason: str) -> str:
    """Return what a reject reason means; empty for one that is not known."""
    known = schema.REASONS.get(reason) or _REASONS.get(reason)
    if known is not None:
        return known
    status = reason.removeprefix("http_")
    if status == reason or not status.isdecimal() or len(status) != 3:
        return ""
    try:
        return f"the server answered {status} {HTTPStatus(int(status)).phrase}"
    except ValueError:
        return f"the server answered {status}"


def plain(text: str, max_length: int = 300) -> str:
    """Return text that comes from data so that it cannot steer a terminal or a page: printable, and not too long.

    Control, format (such as right-to-left marks) and surrogate characters become U+FFFD.
    """
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return such as ``1 row`` or ``1,234 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: int) -> str:
    """Return bytes in decimal units."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.5 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:,.0f} PB"


def took(seconds: float) -> str:
    """Return a duration, such as ``0.3 s``, ``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:,.1f} h"


def share(part: int, whole: int) -> str:
    """Return ``part / whole`` in percent; what is not quite nothing or all is never rounded to it."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"
