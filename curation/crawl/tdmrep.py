"""``/.well-known/tdmrep.json``: for which paths of an origin the rights of text and data mining are reserved.

The file is a JSON list of rules, each with a ``location`` (a path pattern as in robots.txt) and ``tdm-reservation``, 1
or 0. The first rule whose location matches decides; where none does, and where the file is no such list, nothing is
reserved.

Source:
    W3C TDMRep Community Group, "TDM Reservation Protocol (TDMRep)", final report of 10 May 2024.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from curation.crawl.globs import MAX_WORK, Glob, comparable, path_glob
from curation.crawl.urls import WebUrl

TDMREP_PATH = "/.well-known/tdmrep.json"
MAX_TDMREP_BYTES = 1 << 20
MAX_RULES = 10_000
_ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TdmRules:
    """Rules of one origin, in the order of the file.

    Attributes:
        rules: Path pattern, and whether the rights are reserved there.
    """

    rules: tuple[tuple[Glob, bool], ...] = ()

    def reserves(self, url: WebUrl) -> bool:
        """Return whether the rights of ``url`` are reserved, or it takes too long to tell."""
        text = comparable(url.path_and_query)
        if len(self.rules) * len(text) > MAX_WORK:
            return True
        return next((reserved for glob, reserved in self.rules if glob.matches(text)), False)


ALL_RESERVED = TdmRules(((Glob("*"), True),))
NOT_RESERVED = TdmRules()


def parse_tdmrep(data: bytes) -> TdmRules:
    """Read a tdmrep.json of at most ``MAX_TDMREP_BYTES``.

    What is no JSON says nothing: many sites answer any path with a page. A single rule that lacks its list counts as
    one. Rules without a location, or whose reservation is neither 0 nor 1, are passed over. A list that is too long to
    be read reserves everything, as nobody can tell what it would have said.
    """
    text = data.decode("utf-8-sig", "replace")
    if len(data) >= MAX_TDMREP_BYTES:
        return ALL_RESERVED if text.lstrip()[:1] in ("[", "{") else NOT_RESERVED
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return NOT_RESERVED
    entries = [found] if isinstance(found, dict) else found
    if not isinstance(entries, list):
        return NOT_RESERVED
    if len(entries) > MAX_RULES:
        return ALL_RESERVED
    return TdmRules(tuple(rule for entry in entries if (rule := _rule(entry)) is not None))


def _rule(entry: Any) -> tuple[Glob, bool] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("location"), str):
        return None
    reservation = entry.get("tdm-reservation")
    if reservation not in (0, 1, "0", "1"):
        return None
    path = _ORIGIN.sub("", entry["location"].strip(), count=1)  # some write whole URLs
    if not path.startswith(("/", "*")):
        path = "/" + path
    return path_glob(path), reservation in (1, "1")
