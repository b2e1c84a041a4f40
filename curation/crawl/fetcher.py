"""Links to checked images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from curation.config import RunConfig
from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.crawl.addresses import CheckedResolver, IPAddress
from curation.crawl.blocked import blocked_images
from curation.crawl.client import Client
from curation.crawl.consent import refuse_opt_out
from curation.crawl.links import Fetched, Link
from curation.crawl.local import load_local
from curation.crawl.policy import UrlPolicy
from curation.crawl.urls import parse
from curation.crawl.verify import Verified, refused, verify
from curation.crawl.visitor import Visited, Visitor
from curation.errors import BlocklistedError, ImageError, LinkError

_ACCEPT_IMAGES = "image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8,*/*;q=0.5"


def fetch(links: Sequence[Link], config: RunConfig, should_stop: Callable[[], bool] | None = None) -> Iterator[Fetched]:
    """Download or read, and verify, every link.

    Args:
        links: Of the web and of local sets, in any mixture.
        config: Limits.
        should_stop: Asked often; once it says yes the iterator ends early, and some links have no result.

    Yields:
        One result for each link, as they complete; ``index`` is the position in ``links``.
    """
    policy = UrlPolicy.load(config.fetch.policy)
    web = []
    for index, link in enumerate(links):
        if link.source_kind == "web":
            # Here and not where they are requested: what is refused anyway takes no turn of its host.
            try:
                refuse_opt_out(link.opt_out, config.fetch.consent)
                policy.check(parse(link.url))
            except LinkError as error:
                yield Fetched(index, None, None, error.reason, detail=error.detail)
            else:
                web.append(index)
    local = [index for index, link in enumerate(links) if link.source_kind != "web"]
    fetcher = Fetcher(config.fetch, config.images)
    for fetched in fetcher.fetch_all([links[index] for index in web], should_stop):
        yield replace(fetched, index=web[fetched.index])
    for fetched in load_local([links[index] for index in local], config):
        if should_stop is not None and should_stop():
            return
        yield replace(fetched, index=local[fetched.index])


class Fetcher:
    """Download and verify images of the web.

    Args:
        fetch: Limits of downloads.
        images: Limits of decoding.
        allow: Which addresses may be connected to; None: as ``fetch.allow_private_addresses`` says.
        resolver: None: one that obeys ``allow``.
    """

    def __init__(
        self,
        fetch: FetchConfig,
        images: ImagesConfig,
        allow: Callable[[IPAddress], bool] | None = None,
        resolver: CheckedResolver | None = None,
    ) -> None:
        check = partial(verify, limits=images, blocked=blocked_images(fetch, images), resize=fetch.resize)
        self._visitor: Visitor[Verified] = Visitor(
            fetch,
            client=lambda: Client(fetch, fetch.max_bytes, _ACCEPT_IMAGES, allow=allow, resolver=resolver),
            check=lambda answer: check(answer.body),
            num_threads=images.decode_threads,
        )

    def fetch_all(self, links: Sequence[Link], should_stop: Callable[[], bool] | None = None) -> Iterator[Fetched]:
        """Yield exactly one result for each link of the web, as they complete."""
        urls, shares = [link.url for link in links], [link.host_shards or 1 for link in links]
        for visited in self._visitor.visit(urls, shares, should_stop):
            yield _fetched(visited)


def _fetched(visited: Visited[Verified]) -> Fetched:
    heard, error = visited.heard, visited.error
    status = None if heard is None else heard.status
    seen: dict[str, Any] = {
        "http_status": status,
        "fetch_ms": visited.elapsed_ms,
        "num_redirects": None if status is None else visited.num_redirects,
        "received_bytes": None if heard is None else heard.received_bytes,
        "etag": None if heard is None else heard.etag,
        "last_modified": None if heard is None else heard.last_modified,
    }
    if isinstance(error, BlocklistedError):
        return refused(visited.index, error)  # what else is known of it may lead to it
    if isinstance(error, ImageError):
        return replace(refused(visited.index, error), **seen)
    verified = visited.value
    if error is not None or verified is None:
        reason, detail = ("connect", "") if error is None else (error.reason, error.detail)
        return Fetched(visited.index, None, None, reason, detail=detail, **seen)
    seen |= {"image_id": verified.image_id, "stored_id": verified.stored_id}
    return Fetched(visited.index, verified.data, verified.info, None, **seen)
