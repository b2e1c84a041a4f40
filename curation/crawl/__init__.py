"""From pages, lists and image sets to links, and from links to checked images.

``read_inputs`` yields what the inputs of a run hold; ``fetch`` turns links into bytes that decode, or a reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from curation.config import RunConfig
from curation.crawl.consent import refuse_opt_out
from curation.crawl.fetcher import Fetcher
from curation.crawl.inputs import read_inputs
from curation.crawl.links import Fetched, Link
from curation.crawl.local import load_local
from curation.crawl.policy import UrlPolicy
from curation.crawl.urls import parse
from curation.errors import LinkError

__all__ = ["Fetched", "Link", "fetch", "read_inputs"]


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
