"""How pages are read and images are fetched, and what is never visited."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from curation.settings import Settings


class CrawlConfig(Settings):
    """Settings of the ``crawl`` stage."""

    host_spread: int = Field(
        4,
        ge=1,
        description=(
            "A host with many links is spread over this many shards, and over more only where a shard would hold more "
            "than 100 times shards.rows of its links."
        ),
    )
    max_page_bytes: int = Field(10_000_000, ge=1_000, description="Pages are read up to this size.")
    max_pages_per_link: int = Field(
        10_000, ge=1, description="Pages kept of an image that more pages than this show: the first by their URL."
    )
    max_download_bytes: int = Field(50_000_000_000, ge=1_000, description="Larger remote input files are refused.")
    input_attempts: int = Field(
        6, ge=1, le=100, description="Attempts in a row without a byte before a remote input file is given up."
    )
    input_backoff_s: float = Field(1.0, ge=0, le=60, description="Pause before the second attempt; it doubles.")
    input_timeout_s: float = Field(60.0, gt=0, le=3600, description="Silence after which an attempt has failed.")


class ConsentConfig(Settings):
    """What sites say about being visited and used; all of it is obeyed unless it is turned off."""

    robots: bool = Field(True, description="robots.txt (RFC 9309).")
    page: bool = Field(
        True, description="What pages say about their images: noai, noimageai, noml, and TDM reservations."
    )
    headers: bool = Field(
        True, description="X-Robots-Tag of an image's own answer: noai, noimageai, noml; its body is not read."
    )
    tdm: bool = Field(
        True, description="TDM reservations (W3C TDMRep): of pages, of answers, and in /.well-known/tdmrep.json."
    )


class PolicyConfig(Settings):
    """Which URLs are visited at all. What is refused ends as a row with a reason, and no request is sent."""

    LISTS: ClassVar[tuple[str, ...]] = ("blocked_domains", "allowed_domains", "blocked_url_lists")  # paths of files

    blocked_domains: tuple[str, ...] = Field(
        (), description="Files of domains that are refused, one a line or in hosts format; subdomains are included."
    )
    allowed_domains: tuple[str, ...] = Field(
        (), description="Files of domains; where there are any, all other domains are refused."
    )
    whole_domains: bool = Field(
        False, description="A listed host stands for its registrable domain: for www.example.co.uk, example.co.uk."
    )
    blocked_urls: tuple[str, ...] = Field((), description="Patterns of refused URLs; * is any run of characters.")
    blocked_url_lists: tuple[str, ...] = Field((), description="Files of such patterns, one a line.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        (), description="Ports that may be connected to; none given: all but the bad ports of the Fetch standard."
    )
    tracking_pixels: bool = Field(True, description="Refuse URLs of known tracking pixels and of images of 1x1 pixel.")


class ResizeConfig(Settings):
    """How fetched images are made smaller before they are stored; they are never enlarged."""

    side_px: int = Field(256, ge=16, le=16_384, description="Side that the shorter or longer side is brought to.")
    mode: Literal["shorter", "longer", "none"] = Field(
        "shorter", description="Which side becomes side_px, the ratio kept; none: only encode anew."
    )
    format: Literal["jpeg", "png", "webp"] = Field("jpeg", description="What is stored.")
    quality: int = Field(95, ge=1, le=100, description="Of the lossy formats.")


class FetchConfig(Settings):
    """Settings of the ``fetch`` stage, and of visiting pages in ``crawl``."""

    user_agent: str = Field(
        "curation/0.1 (+https://github.com/curation-project/curation; image dataset research)",
        min_length=1,
        pattern=r"^[\x20-\x7e]+$",
        description="Sent with each request; robots.txt knows it by its first word, or the one behind `(compatible;`.",
    )
    allow_private_addresses: bool = Field(
        False, description="Connect to loopback and private addresses; only for tests and intranets."
    )
    concurrency: int = Field(64, ge=1, le=10_000, description="Requests at a time in one worker.")
    host_concurrency: int = Field(
        8,
        ge=1,
        description="Requests at a time to one host, of all workers; shards that share it get a part, at least 1.",
    )
    host_requests_per_s: float | None = Field(
        default_factory=lambda given: None if given.get("allow_private_addresses") else 20.0,
        gt=0,
        description=(
            "Requests a second to one host, of all workers; null: no limit. The default is 20, and null with "
            "`allow_private_addresses`, whose hosts are the user's own."
        ),
    )
    max_crawl_delay_s: float = Field(
        30.0, ge=0, le=3600, description="A longer Crawl-delay of robots.txt counts as this one."
    )
    host_failures: int = Field(
        10, ge=1, description="Failures in a row without any answer after which a host is left alone, tried, given up."
    )
    timeout_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="Deadline of one URL, from DNS to the last byte; waiting for a turn is not in it.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, le=600, description="Deadline of a connection.")
    idle_timeout_s: float = Field(10.0, gt=0, le=600, description="Longest silence of a connection within an answer.")
    max_bytes: int = Field(30_000_000, ge=1_000, description="Larger answers are refused.")
    max_redirects: int = Field(5, ge=0, le=20)
    retries: int = Field(1, ge=0, le=10, description="Further attempts after a connection error, a 429 or a 5xx.")
    blocked_hashes: tuple[str, ...] = Field(
        (), description="Lists of sha256 digests (hex, one a line): images whose bytes they name are discarded unseen."
    )
    blocked_pdq: tuple[str, ...] = Field(
        (), description="Lists of PDQ hashes (hex, one a line): images that look like one of them are discarded."
    )
    blocked_pdq_distance: int = Field(31, ge=0, le=128, description="Bits of 256 in which these may differ.")
    resize: ResizeConfig | None = Field(
        None, description="Store images of the web smaller, and encoded anew; null: as they came."
    )
    proxy: str | None = Field(
        None,
        description="HTTP proxy of all requests, http://host:port; null: none, whatever the environment says. Names "
        "are checked here, but the proxy resolves them again, so it must refuse private addresses itself.",
    )
    consent: ConsentConfig = Field(default_factory=ConsentConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)

    @field_validator("proxy")
    @classmethod
    def _has_no_secrets(cls, proxy: str | None) -> str | None:
        if proxy is not None and re.fullmatch(r"https?://[^/@\s]+/?", proxy) is None:
            raise ValueError("must be http://host:port, without user name and password")  # which runs would record
        return proxy
