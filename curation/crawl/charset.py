"""A page's bytes as text, by what the page, its headers and its bytes say of their charset."""

import codecs
import re

_META_CHARSET = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.\-]{2,40})", re.IGNORECASE)
# Codecs of Python, and what browsers take for them (WHATWG Encoding Standard); of labels, letters and digits count.
_LABELS = {
    "cp1252": "iso88591 iso885911987 latin1 l1 ascii usascii ansix341968 cp819 ibm819 isoir100 csisolatin1",
    "iso8859-2": "iso88592 iso885921987 latin2 l2 isoir101 csisolatin2",
    "cp1254": "iso88599 iso885991989 latin5 l5 isoir148 csisolatin5",
    "cp874": "tis620 iso885911 dos874",
    "cp932": "shiftjis sjis xsjis mskanji ms932 windows31j csshiftjis",
    "gb18030": "gb18030 gbk xgbk gb2312 gb231280 chinese isoir58 csgb2312 csiso58gb231280",
    "cp949": "euckr ksc5601 ksc56011987 ksc56011989 korean isoir149 cseuckr csksc56011987",
    "big5": "big5 big5hkscs cnbig5 xxbig5 csbig5",
    "euc_jp": "eucjp xeucjp cseucpkdfmtjapanese",
    "iso2022_jp": "iso2022jp csiso2022jp",
    "iso8859-8": "iso88598 iso88598i logical visual hebrew",
    "cp866": "ibm866 866 csibm866",
    "koi8-r": "koi8r koi8 koi cskoi8r",
    "koi8-u": "koi8u koi8ru",
    "mac-roman": "macintosh mac xmacroman csmacintosh",
    "mac-cyrillic": "xmaccyrillic xmacukrainian",
    "utf-8": "utf8 unicode11utf8 unicode20utf8 xunicode20utf8",
    "utf-16-le": "utf16 utf16le unicode ucs2 unicodefeff iso10646ucs2 csunicode",
    "utf-16-be": "utf16be unicodefffe",
}
_CODECS = {label: codec for codec, labels in _LABELS.items() for label in labels.split()}
_CODECS |= {f"iso8859{part}": f"iso8859-{part}" for part in (3, 4, 5, 6, 7, 10, 13, 14, 15, 16)}
_CODECS |= {
    f"{prefix}{page}": f"cp{page}"
    for page in (866, 874, 949, *range(1250, 1259))
    for prefix in ("windows", "cp", "xcp")
}


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
    return _CODECS.get(re.sub(r"[^a-z0-9]", "", label.lower()))
