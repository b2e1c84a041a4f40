"""Some of the web is hostile: every URL gets its row, in bounded time and memory, and the good ones arrive."""

import importlib.util
import itertools
import math
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.crawl.addresses import CheckedResolver
from curation.crawl.fetcher import Fetcher
from curation.crawl.links import Link

_SERVER = Path(__file__).with_name("hostile_server.py")
_ASKED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def kinds():
    spec = importlib.util.spec_from_file_location("hostile_server", _SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**module.KINDS, "rebind": "policy_address"}


@pytest.fixture(scope="module")
def port():
    server = subprocess.Popen([sys.executable, _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield int(server.stdout.readline())
    server.kill()
    server.communicate()


def rebinding(host: str) -> list[str]:
    """A name server that answers with a private address, and with a harmless one when it is asked again."""
    _ASKED[host] += 1
    return ["169.254.169.254" if _ASKED[host] % 2 else "127.0.0.1"]


def fetch(port, kinds_of_urls, **settings):
    """Return the reasons by kind, and the seconds that it took."""
    config = FetchConfig(allow_private_addresses=False, max_bytes=5_000_000, **settings)
    links = []
    for number, kind in enumerate(kinds_of_urls):
        host = f"host{number}.at{time.monotonic_ns()}.example" if kind == "rebind" else "127.0.0.1"
        links.append(Link(f"{'https' if kind == 'tls' else 'http'}://{host}:{port}/{kind}/{number}.jpg"))
    allow = lambda address: str(address) == "127.0.0.1"  # noqa: E731
    fetcher = Fetcher(config, ImagesConfig(), allow, CheckedResolver(allow, rebinding))
    started = time.monotonic()
    results = list(fetcher.fetch_all(links))
    seconds = time.monotonic() - started
    assert sorted(result.index for result in results) == list(range(len(links)))
    return Counter((kinds_of_urls[result.index], result.reject_reason) for result in results), seconds


def mixture(kinds, num_good, num_hostile):
    hostile = list(itertools.islice(itertools.cycle(kinds), num_hostile))
    return [kind for pair in itertools.zip_longest(hostile, ["good"] * num_good) for kind in pair if kind]


def check(port, kinds, num_urls, concurrency, deadline_s, slack_s):
    num_hostile = num_urls * 3 // 10
    num_good = num_urls - num_hostile
    settings = {"concurrency": concurrency, "host_concurrency": concurrency, "timeout_s": deadline_s}
    settings |= {"host_requests_per_s": None}
    alone, alone_s = fetch(port, ["good"] * num_good, **settings)
    urls = mixture(kinds, num_good, num_hostile)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    found, seconds = fetch(port, urls, **settings)

    assert alone == {("good", None): num_good}
    assert found["good", None] == num_good
    # On a busy machine a body that has no end, or a host that breaks off its handshake, may first meet a deadline.
    expected = {(kind, reason) for kind in kinds for reason in (kinds[kind], "timeout", "robots")}
    assert set(found) - {("good", None)} <= expected
    assert sum(found[kind, kinds[kind]] for kind in kinds) > num_hostile / 2
    bound_s = 1.3 * (math.ceil(num_hostile / concurrency) * deadline_s + alone_s)
    assert seconds < bound_s + slack_s, f"{seconds:.1f} s, more than {bound_s:.1f} s; good ones alone {alone_s:.1f} s"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 300 << 10


def test_hostile_servers_cost_no_more_than_their_deadlines(port, kinds):
    check(port, kinds, 130, 32, 2.0, slack_s=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [32, 64, 300])
def test_two_thousand_urls_of_which_a_third_is_hostile(port, kinds, concurrency):
    check(port, kinds, 2000, concurrency, 2.0, slack_s=0.0)
