"""The steps that bring links and images in."""

import json

from curation import schema
from curation.config import RunConfig
from curation.crawl.blocked import blocked_images
from curation.crawl.policy import UrlPolicy, left_out, policy_settings
from curation.crawl.robots import product_token
from curation.pipelines.context import Context
from curation.pipelines.ingest import inputs_of
from curation.pipelines.plan import Step
from curation.pipelines.step_settings import limits, plain

_ALL = ("pool", "seeds", "references")


def bring_in() -> tuple[Step, ...]:
    """Return the steps of ``crawl`` and ``fetch``."""
    return (
        Step(
            "crawl",
            "crawl",
            "crawl",
            4,
            _ALL,
            _nothing,
            writes=schema.CRAWL,
            protected=True,
            settings=lambda config, collection: {
                "inputs": [plain(entry) for entry in inputs_of(config, collection)],
                "shards": plain(config.shards),
                "crawl": plain(
                    config.crawl, "max_download_bytes", "input_attempts", "input_backoff_s", "input_timeout_s"
                ),
                "agent": product_token(config.fetch.user_agent),  # pages may address it
            },
        ),
        Step(
            "fetch",
            "fetch",
            "fetch",
            3,
            _ALL,
            _nothing,
            reads=(schema.CRAWL,),
            writes=schema.FETCH,
            protected=True,
            settings=lambda config, collection: {
                "images": limits(config),
                "max_bytes": config.fetch.max_bytes,
                "max_redirects": config.fetch.max_redirects,
                "resize": config.fetch.resize and plain(config.fetch.resize),
                "consent": plain(config.fetch.consent),
                "policy": policy_settings(config.fetch.policy),
                "allow_private_addresses": config.fetch.allow_private_addresses,
            },
            told=lambda config: {"consent": json.dumps(plain(config.fetch.consent), sort_keys=True)},
            check=_check_fetch,
            notes=lambda config: left_out(config.fetch.policy),
        ),
    )


def _nothing(context: Context) -> None:
    return None


def _check_fetch(config: RunConfig) -> None:
    """Refuse lists that cannot be read, before a request is sent; workers find those of domains sorted in the cache."""
    blocked_images(config.fetch, config.images)
    UrlPolicy.load(config.fetch.policy)
