"""A page's bytes as text, by what the page, its headers and its bytes say of their charset."""

import codecs
import re

_META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
# What browsers take these labels for (WHATWG Encoding Standard).
_ALIASES = {"iso-8859-1": "cp1252", "latin1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252"}
_ALIASES |= {"iso-8859-9": "cp1254", "tis-620": "cp874", "shift_jis": "cp932", "shift-jis": "cp932", "sjis": "cp932"}
_ALIASES |= {"gb2312": "gb18030", "gbk": "gb18030", "euc-kr": "cp949", "ks_c_5601-1987": "cp949", "x-sjis": "cp932"}
_CHARSETS = re.compile(
    r"utf-?8|utf-16(le|be)?|iso-?8859-\d+|windows-?\d+|cp\d+|koi8-[ru]|gb18030|big5|euc-jp|iso-2022-jp"
)


def decode_html(data: bytes, content_type: str = "") -> tuple[str, str]:
    """Decode a page by its byte order mark, its Content-Type, its ``<meta>``, as UTF-8, or as Windows-1252.

    Returns:
        The text, and the charset of queries in it, a codec of Python: the page's own, or UTF-8 where that is UTF-16.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace"), "utf-8"
    header = _HEADER_CHARSET.search(content_type)
    charset = _charset(header[1]) if header else None
    if charset is None and (meta := _META_CHARSET.search(data[:4096])):
        charset = _charset(meta[1].decode("ascii"))
        if charset is not None and charset.startswith("utf-16"):
            charset = "utf-8"  # it was read as ASCII, so it is not UTF-16
    if charset is not None:
        return data.decode(charset, "replace"), "utf-8" if charset.startswith("utf-16") else charset
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        is_cut = error.start >= max(4, len(data) - 3)  # in the middle of its last character
        few_errors = text.count("\ufffd") <= len(text) // 10_000
        return (text, "utf-8") if is_cut or few_errors else (data.decode("cp1252", "replace"), "cp1252")


def _charset(label: str) -> str | None:
    name = label.strip().lower()
    name = _ALIASES.get(name, name)
    if not _CHARSETS.fullmatch(name):
        return None
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None
