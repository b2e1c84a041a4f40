"""HTML that cannot be broken into: text is escaped unless it was made here."""

import html
from collections.abc import Iterable, Sequence

from curation.report.words import plain


class Markup(str):
    """HTML made by this package; every other string is escaped when it is put into some."""

    __slots__ = ()


def text(value: str | int) -> Markup:
    """Return a value as HTML text, safe in elements and in quoted attributes."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(f"{value:,}" if isinstance(value, int) else plain(value), quote=True))


def joined(parts: Iterable[str | int], separator: str = "") -> Markup:
    """Return parts one after the other."""
    return Markup(text(separator).join(text(part) for part in parts))


def element(name: str, *content: str | int, **attributes: str) -> Markup:
    """Return an element; ``class_`` and such are attributes whose name is a word of Python."""
    shown = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{shown}>{joined(content)}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str | int]], numbers: Sequence[int], last: str = "") -> Markup:
    """Return a table.

    Args:
        head: Titles of the columns.
        rows: Cells.
        numbers: Columns that are flush right.
        last: Class of the last row.
    """

    def row(kind: str, cells: Sequence[str | int], class_: str = "") -> Markup:
        made = [
            element(kind, cell, class_="n") if column in numbers else element(kind, cell)
            for column, cell in enumerate(cells)
        ]
        return element("tr", *made, class_=class_) if class_ else element("tr", *made)

    found = list(rows)
    body = [row("td", cells, last if index == len(found) - 1 else "") for index, cells in enumerate(found)]
    inner = element("thead", row("th", head)) + element("tbody", *body)
    return element("div", element("table", Markup(inner)), class_="scroll")
