"""Links: what ``crawl`` finds and ``fetch`` turns into images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from curation import schema
from curation.images import ImageInfo

SourceKind = Literal["web", "file", "tar", "parquet"]

LINK_REASONS = frozenset(
    {
        "bad_url",  # not a URL
        "policy_scheme",  # neither http nor https
        "policy_credentials",  # it carries a user name or a password
        "policy_port",  # a port of other services, or not one of fetch.policy.ports
        "policy_domain",  # its domain is on a list of blocked ones, or on none of the allowed ones
        "policy_pattern",  # a pattern of blocked URLs matches it
        "tracking_pixel",  # its address is one of a known tracking pixel, or says that it has 1x1 pixel
        "policy_address",  # the host is, or resolves only to, addresses that are not public
        "robots",  # robots.txt forbids it, or could not be read
        "opt_out_noai",  # a page that shows the image, or the answer, says `noai`
        "opt_out_noimageai",  # the same with `noimageai`
        "opt_out_noml",  # the same with `noml`
        "opt_out_tdm",  # the rights of text and data mining are reserved (TDMRep)
        "dns",  # the name does not resolve
        "connect",  # no connection, or one that broke or did not speak HTTP
        "tls",  # the certificate or the handshake
        "timeout",  # the deadline passed, from DNS to the last byte, or the server fell silent
        "host_down",  # its host did not answer many requests in a row, nor trials after that; not requested
        "host_busy",  # its host kept saying that it gets too many requests; not requested
        "bad_redirect",  # a redirect without a target, or to something that is not http or https
        "too_many_redirects",
        "too_large",  # more bytes than allowed, before or after decompression
        "truncated",  # the server promised more bytes than it sent
        "empty",  # no bytes
        "undecodable",  # the content encoding is broken
        "missing_file",  # a local image is gone, or a Parquet row holds no bytes
        "unreadable",  # a local image cannot be read
        "blocklisted",  # on a list of images that must not be kept; nothing else of its link is
    }
)  # and http_<status>, and schema.IMAGE_REASONS
PAGE_REASONS = frozenset(
    {
        "not_html",  # the answer is no HTML
        "bad_page",  # built to take forever: too many open tags or attributes
    }
)  # of pages only, counted as page_<reason>, and LINK_REASONS


@dataclass(frozen=True, slots=True)
class Link:
    """Where one image is; a row of ``schema.CRAWL``.

    Attributes:
        url: Normalised; ``file:///path``, ``file:///x.tar#member`` or ``file:///x.parquet#row`` for local sets.
        page_urls: Pages that show the image, sorted.
        source_kind: Where the bytes come from.
        source_path: Local file; None for the web.
        source_offset: First byte in a tar; row number in a Parquet file.
        source_bytes: Length in a tar or of a file.
        opt_out: Reason for which a page that shows the image forbids its use, one of ``LINK_REASONS``; None: none does.
        extra: Further columns of a URL list, as a JSON object with sorted keys.
        host_shards: Shards of the collection that hold links of the same host; None where it is not of the web.
    """

    url: str
    page_urls: tuple[str, ...] = ()
    source_kind: SourceKind = "web"
    source_path: str | None = None
    source_offset: int | None = None
    source_bytes: int | None = None
    opt_out: str | None = None
    extra: str | None = None
    host_shards: int | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of one link: bytes that decode, or a reason.

    Attributes:
        index: Position of the link in the list that was fetched.
        data: Encoded bytes as they came, or resized; None where rejected.
        info: Format and size of ``data``; None where rejected.
        reject_reason: One of ``LINK_REASONS``, ``schema.IMAGE_REASONS``, or ``http_<status>``; None where kept.
        http_status: Of the last answer; None for local sets and failures before it.
        fetch_ms: Milliseconds from the first attempt to the last byte.
        detail: Why, in words.
        num_redirects: Followed before the last answer; None for local sets and where there was no answer.
        received_bytes: Of the last answer's body, as they came over the wire.
        etag: Header of the last answer.
        last_modified: Header of the last answer.
        sha256: Of the bytes, in hex; only where they are blocklisted.
        list_name: Which list has it.
        image_id: First 128 bits of the sha256 of the bytes as they came, in hex; None where rejected.
        stored_id: The same of ``data``.
    """

    index: int
    data: bytes | None
    info: ImageInfo | None
    reject_reason: str | None
    http_status: int | None = None
    fetch_ms: int = 0
    detail: str = ""
    num_redirects: int | None = None
    received_bytes: int | None = None
    etag: str | None = None
    last_modified: str | None = None
    sha256: str | None = None
    list_name: str | None = None
    image_id: str | None = None
    stored_id: str | None = None


def to_table(links: Sequence[Link]) -> pa.Table:
    """Return ``links`` as rows of ``schema.CRAWL``, in order."""
    fields = schema.CRAWL.schema
    columns = [pa.array([getattr(link, field.name) for link in links], field.type) for field in fields]
    return pa.table(columns, schema=fields)


def web_links(urls: pa.Array, extra: pa.Array | None = None) -> pa.Table:
    """Return rows of ``schema.CRAWL`` for normalised URLs of the web that no page was seen to show.

    Args:
        urls: Strings without nulls.
        extra: Strings, as long; None: nothing else is known.
    """
    fields = schema.CRAWL.schema
    known = {
        "url": urls,
        "page_urls": pa.ListArray.from_arrays(pa.array([0] * (len(urls) + 1), pa.int32()), pa.array([], pa.string())),
        "source_kind": pa.repeat(pa.scalar("web"), len(urls)),
    }
    if extra is not None:
        known["extra"] = extra
    columns = [known[field.name] if field.name in known else pa.nulls(len(urls), field.type) for field in fields]
    return pa.table(columns, schema=fields)


def from_table(table: pa.Table) -> Iterator[Link]:
    """Yield the links of a table with the columns of ``schema.CRAWL``, in order."""
    for batch in table.select(schema.CRAWL.schema.names).to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield Link(**{**row, "page_urls": tuple(row["page_urls"] or ())})
