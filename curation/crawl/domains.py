"""Registrable domains, by the snapshot of the Public Suffix List that tldextract brings; nothing is downloaded."""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tldextract import TLDExtract


@lru_cache(1 << 16)
def registrable_domain(host: str) -> str | None:
    """Return the part of a host that its owner registered: ``example.co.uk`` of ``www.example.co.uk``.

    Args:
        host: As ``urls.WebUrl.host`` has it.

    Returns:
        None for addresses, and for names that are a public suffix or end in none. Suffixes under which companies let
        others have names (``github.io``) count as domains of the company.
    """
    if host.startswith("["):
        return None
    return _suffixes().extract_str(host).top_domain_under_registry_suffix or None


@lru_cache(1)
def _suffixes() -> "TLDExtract":
    from tldextract import TLDExtract  # here: it imports requests, which takes a tenth of a second

    return TLDExtract(cache_dir=None, suffix_list_urls=(), fallback_to_snapshot=True)
