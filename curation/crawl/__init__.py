"""From pages, lists and image sets to links, and from links to checked images.

``read_inputs`` yields what the inputs of a run hold; ``fetch`` turns links into bytes that decode, or a reason. They
are imported when they are asked for: who only wants a module of this package needs no HTTP client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curation.crawl.fetcher import fetch
    from curation.crawl.inputs import read_inputs
    from curation.crawl.links import Fetched, Link

__all__ = ["Fetched", "Link", "fetch", "read_inputs"]

_HOMES = {"Fetched": "links", "Link": "links", "fetch": "fetcher", "read_inputs": "inputs"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
