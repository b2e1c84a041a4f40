"""Rates, pauses and trials, measured where they are felt: at the server."""

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter

import pytest

from curation import crawl
from curation.config.fetch import FetchConfig
from curation.crawl.addresses import CheckedResolver, anything
from curation.crawl.fetcher import Fetcher
from curation.crawl.links import Link
from curation.crawl.schedule import Schedule

_SHARD = """
import sys
from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.crawl.fetcher import Fetcher
from curation.crawl.links import Link
from curation.crawl.visitor import slots_of

url, shard, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
config = FetchConfig(allow_private_addresses=True, host_requests_per_s=rate, host_concurrency=8)
urls = [f"{url}/slow/{number}" for number in range(200)]
links = [Link(url, host_shards=4) for url, slot in zip(urls, slots_of(urls)) if slot % 4 == shard][:20]
print(sum(fetched.reject_reason is None for fetched in Fetcher(config, ImagesConfig()).fetch_all(links)))
"""


def images(site):
    """Return when each image was asked for."""
    return [at for path, at in site.log if path not in ("/robots.txt", "/.well-known/tdmrep.json")]


def most_in_a_second(times):
    return max(sum(start <= at < start + 1 for at in times) for start in times)


def fetched(links, config):
    results = list(crawl.fetch([Link(link) for link in links], config))
    assert sorted(result.index for result in results) == list(range(len(links)))
    return sorted(results, key=lambda result: result.index)


def test_four_workers_together_keep_a_hosts_rate_and_concurrency(site):
    rate = 20.0
    workers = [
        subprocess.Popen([sys.executable, "-c", _SHARD, site.url, str(shard), str(rate)], stdout=subprocess.PIPE)
        for shard in range(4)
    ]

    assert [int(worker.communicate()[0]) for worker in workers] == [20] * 4

    times = images(site)
    assert len(times) == 80
    assert most_in_a_second(times) <= rate + 2  # they take turns; some are a little late
    assert site.most_at_once <= 8


def test_a_rate_holds_for_redirects_and_further_attempts_too(site, settings):
    config = settings(host_requests_per_s=10.0, retries=2)

    results = fetched([f"{site.url}/to?url=/status/500", *(f"{site.url}/image/{n}" for n in range(6))], config)

    assert [result.reject_reason for result in results] == ["http_500", *[None] * 6]
    times = images(site)
    assert len(times) == 1 + 3 + 6
    assert most_in_a_second(times) <= 11


def test_a_crawl_delay_is_kept_and_waiting_is_not_in_the_deadline(site, settings):
    site.robots = "User-agent: *\nCrawl-delay: 0.5\n"

    results = fetched([f"{site.url}/image/{n}" for n in range(5)], settings(timeout_s=1.0))

    assert [result.reject_reason for result in results] == [None] * 5
    times = images(site)
    assert min(after - before for before, after in itertools.pairwise(times)) > 0.45


def test_a_host_that_asks_for_a_pause_gets_it_for_all_its_links(site, settings):
    site.busy_until = time.monotonic() + 1.0
    config = settings(retries=3, host_concurrency=2)

    results = fetched([f"{site.url}/limited/{n}" for n in range(30)], config)

    assert [result.reject_reason for result in results] == [None] * 30
    before = sum(at < site.busy_until for at in images(site))
    assert before <= 5 + 2  # so many refusals in a row, and what was under way


def test_a_host_that_asks_for_hours_is_asked_no_more(site, settings):
    site.busy_until = float("inf")

    results = fetched([f"{site.url}/limited/{n}" for n in range(40)], settings(retries=0, timeout_s=0.5))

    assert {result.reject_reason for result in results} == {"http_429", "host_busy"}
    assert len(images(site)) < 20


def test_a_dead_host_is_tried_given_up_and_holds_up_nobody(site, settings):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = [f"http://127.0.0.1:{closed.getsockname()[1]}/{n}" for n in range(300)]
        started = time.monotonic()
        results = fetched([*dead, *(f"{site.url}/image/{n}" for n in range(20))], settings(timeout_s=1.0))
        seconds = time.monotonic() - started

    reasons = Counter(result.reject_reason for result in results)
    assert reasons == {"connect": reasons["connect"], "host_down": 300 - reasons["connect"], None: 20}
    assert reasons["connect"] < 40
    assert seconds < 8


def test_a_host_that_comes_back_is_asked_again(site, settings):
    """Nobody listens at first; the trial that finds somebody brings all the links that are left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    config = settings(timeout_s=4.0, host_failures=3, host_concurrency=1, consent={"robots": False, "tdm": False})

    def come_back():
        time.sleep(0.4)
        relay = socket.create_server(("127.0.0.1", port))
        relay.settimeout(0.2)
        while not done.is_set():
            try:
                client, _ = relay.accept()
            except TimeoutError:
                continue
            client.recv(65536)
            client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            client.close()
        relay.close()

    done = threading.Event()
    thread = threading.Thread(target=come_back)
    thread.start()
    results = fetched([f"http://127.0.0.1:{port}/{n}" for n in range(30)], config)
    done.set()
    thread.join()

    reasons = Counter(result.reject_reason for result in results)
    assert set(reasons) == {"connect", "http_404"}
    assert reasons["http_404"] > 20


def test_hosts_take_turns_whatever_their_order_in_the_list(site, settings):
    """A slow host with many links does not keep the others waiting."""
    config = settings(concurrency=4, host_concurrency=2, host_requests_per_s=4.0)
    links = [Link(f"http://host{host}.example:{site.port}/image/{n}") for host in range(5) for n in range(5)]
    resolver = CheckedResolver(anything, lambda host: ["127.0.0.1"])
    started = time.monotonic()

    results = list(Fetcher(config.fetch, config.images, resolver=resolver).fetch_all(links))

    assert {result.reject_reason for result in results} == {None}
    assert time.monotonic() - started < 5 * 4 / 4.0  # one after the other would take longer


def test_a_million_links_wait_in_little_memory():
    hosts = [f"host{number % 300_000}.example" for number in range(1_000_000)]
    shares = [1] * len(hosts)
    tracemalloc.start()
    schedule = Schedule(hosts, shares, [0] * len(hosts), FetchConfig())

    async def first_turns() -> list[int]:
        turns = [await schedule.take() for _ in range(1000)]
        assert len({turn.host.name for turn in turns}) == 1000  # 20 requests a second each: the next host is opened
        for turn in turns:
            schedule.finish(turn)
        return sorted({turn.link for turn in turns})

    assert len(asyncio.run(first_turns())) == 1000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 150e6


def test_a_host_whose_pause_ends_while_it_is_looked_at_has_its_turn():
    config = FetchConfig(host_requests_per_s=None, host_failures=1, timeout_s=8)  # a pause is 1 s
    now = itertools.count(0, 0.75)  # each look at the clock takes a while
    schedule = Schedule(["host"] * 3, [1] * 3, [0] * 3, config, lambda: next(now))

    async def turns():
        first = await schedule.take()
        schedule.known(first.host, 0)  # it is in line again
        schedule.silent(first, "nobody is there")  # and only then paused
        schedule.finish(first)
        return [first.link, (await schedule.take()).link]

    assert len(set(asyncio.run(turns()))) == 2


@pytest.mark.parametrize("order", [1, -1])
def test_every_link_has_exactly_one_last_turn(order):
    hosts = [f"host{number % 7}" for number in range(50)][::order]
    schedule = Schedule(hosts, [1] * 50, [0] * 50, FetchConfig(host_requests_per_s=None, host_concurrency=2))
    seen = Counter()

    async def work():
        while (turn := await schedule.take()) is not None:
            assert turn.host.name == hosts[turn.link] or seen[turn.link]
            seen[turn.link] += 1
            await asyncio.sleep(0)
            if seen[turn.link] == 1 and turn.link % 3 == 0:
                schedule.again(turn, 0.01)
            elif seen[turn.link] == 1 and turn.link % 5 == 0:
                schedule.move(turn, "elsewhere")
            else:
                schedule.finish(turn)

    async def main():
        await asyncio.wait_for(asyncio.gather(*(work() for _ in range(8))), 20)

    asyncio.run(main())
    assert seen == {number: 2 if number % 3 == 0 or number % 5 == 0 else 1 for number in range(50)}
