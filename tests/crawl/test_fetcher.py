import contextlib
import socket
import threading
import time

import pytest

from curation import crawl
from curation.config.images import ImagesConfig
from curation.crawl.addresses import CheckedResolver, is_public
from curation.crawl.client import retry_after_s
from curation.crawl.fetcher import Fetcher
from curation.crawl.links import Link

HOSTILE = {
    "/html/photo.jpg": "not_an_image",
    "/short": "truncated",
    "/cut": "truncated",
    "/announced": "too_large",
    "/endless": "too_large",
    "/bomb": "too_large",
    "/garbled": "undecodable",
    "/empty": "empty",
    "/huge": "too_many_pixels",
    "/tiny": "too_small",
    "/drip": "timeout",
    "/round": "too_many_redirects",
    "/nowhere": "bad_redirect",
    "/to?url=ftp://example.com/": "bad_redirect",
    "/to?url=http://user:pass@example.com/": "bad_redirect",
    "/status/404": "http_404",
    "/status/410": "http_410",
    "/status/429": "http_429",
    "/status/500": "http_500",
    "/status/204": "empty",
    "/status/304": "http_304",
}


def outcomes(site, config, *paths):
    links = [Link(site.url + path if path.startswith("/") else path) for path in paths]
    results = list(crawl.fetch(links, config))
    assert sorted(result.index for result in results) == list(range(len(links)))
    return [next(result for result in results if result.index == index) for index in range(len(links))]


def test_an_image_comes_with_its_bytes_and_size(site, settings, make_image):
    (fetched,) = outcomes(site, settings(), "/image/9.jpg")

    assert fetched.reject_reason is None
    assert fetched.data == make_image(9)
    assert (fetched.info.format, fetched.info.width, fetched.info.height) == ("jpeg", 48, 48)
    assert (fetched.http_status, fetched.detail) == (200, "")


def test_every_hostile_answer_has_its_reason_and_good_ones_still_arrive(site, settings):
    paths = [*HOSTILE, *(f"/image/{number}" for number in range(30))]

    results = outcomes(site, settings(timeout_s=3.0), *paths)

    assert {path: result.reject_reason for path, result in zip(paths, results, strict=True)} == {
        **HOSTILE,
        **{f"/image/{number}": None for number in range(30)},
    }
    assert all(result.data is None and result.info is None for result in results[: len(HOSTILE)])
    assert {result.http_status for result in results if (result.reject_reason or "").startswith("http_")} == {
        *(304, 404, 410, 429, 500)
    }


def test_a_compressed_image_is_decompressed(site, settings, make_image):
    (fetched,) = outcomes(site, settings(), "/gzipped")

    assert fetched.data == make_image(5)


def test_a_dripping_server_cannot_outlast_the_deadline(site, settings):
    started = time.monotonic()

    (fetched,) = outcomes(site, settings(timeout_s=0.4), "/drip")

    assert fetched.reject_reason == "timeout"
    assert time.monotonic() - started < 2


def test_redirects_are_followed(site, settings):
    (fetched,) = outcomes(site, settings(), "/to?url=/to%3Furl=//" + site.url.removeprefix("http://") + "/image/3")

    assert fetched.reject_reason is None


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/image/1",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://[::1]:{port}/image/1",
        "http://2130706434:{port}/",
        "//0x7f.2/image/1",
    ],
)
def test_a_redirect_to_a_private_address_is_refused(site, settings, target):
    config = settings(allow_private_addresses=False)
    fetcher = Fetcher(config.fetch, config.images, allow=lambda ip: str(ip) == "127.0.0.1" or is_public(ip))
    link = Link(f"{site.url}/to?url={target.format(port=site.port)}")

    (fetched,) = fetcher.fetch_all([link])

    assert fetched.reject_reason == "policy_address"
    assert "/image/1" not in site.hits


def test_loopback_is_refused_before_a_byte_is_sent(site, settings):
    config = settings(allow_private_addresses=False)

    results = outcomes(site, config, "/image/1", f"http://localhost:{site.port}/image/1")

    assert [result.reject_reason for result in results] == ["policy_address"] * 2
    assert not site.hits


def test_a_rebinding_name_gains_nothing(site, settings):
    answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
    config = settings(allow_private_addresses=False)
    allow = lambda ip: str(ip) == "127.0.0.1"  # noqa: E731
    resolver = CheckedResolver(allow, lookup=lambda host: next(answers))
    fetcher = Fetcher(config.fetch, config.images, allow, resolver)

    results = list(fetcher.fetch_all([Link(f"http://rebind.example:{site.port}/image/{n}") for n in range(8)]))

    assert {result.reject_reason for result in results} == {None}
    assert next(answers) == ["127.0.0.2"]  # only the first answer was asked for, and it was the one checked


def test_a_name_that_resolves_to_a_private_address_is_refused(site, settings):
    config = settings(allow_private_addresses=False)
    resolver = CheckedResolver(is_public, lookup=lambda host: ["127.0.0.1", "::1"])

    (fetched,) = Fetcher(config.fetch, config.images, None, resolver).fetch_all(
        [Link(f"http://a.example:{site.port}/")]
    )

    assert fetched.reject_reason == "policy_address"
    assert not site.hits


def test_names_that_do_not_exist_and_closed_ports_have_reasons(site, settings):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]

        dead, plain, bad = outcomes(
            site, settings(), f"http://127.0.0.1:{port}/", f"https://127.0.0.1:{site.port}/image/1", "ftp://x/"
        )
    config = settings()
    lookups = []

    def lookup(host):
        lookups.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    fetcher = Fetcher(config.fetch, config.images, resolver=CheckedResolver(lookup=lookup))
    unknown = list(fetcher.fetch_all([Link(f"http://no-such.example/{number}") for number in range(5)]))

    assert (dead.reject_reason, plain.reject_reason, bad.reject_reason) == ("connect", "tls", "policy_scheme")
    assert [result.reject_reason for result in unknown] == ["dns"] * 5
    assert lookups == ["no-such.example"]


@pytest.mark.parametrize(
    ("scheme", "answer", "reason"),
    [
        ("http", b"garbage\r\n\r\n", "connect"),
        ("http", b"HTTP/1.1 999999 What\r\n\r\n", "connect"),
        ("http", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "connect"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx", "connect"),
        ("http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "connect"),
        ("http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "truncated"),
        ("http", b"HTTP/1.1 200 OK\r\n\r\nno image", "not_an_image"),
        ("http", b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\n\r\n", "bad_redirect"),
        ("http", b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n", "bad_redirect"),
        ("https", b"\x16\x03\x03\x00\x7a\x02\x00", "connect|tls"),
        ("https", b"garbage", "tls"),
    ],
)
def test_servers_that_do_not_speak_http_have_reasons(settings, scheme, answer, reason):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def serve():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # the client hangs up as soon as it has seen enough
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        link = Link(f"{scheme}://127.0.0.1:{server.getsockname()[1]}/x")
        (fetched,) = crawl.fetch([link], settings(consent={"robots": False, "tdm": False}))
        thread.join()

    assert fetched.reject_reason in reason.split("|"), fetched


def test_robots_txt_is_obeyed_asked_once_and_told_who_asks(site, settings):
    site.robots = "User-agent: curation\nDisallow: /image/2\nUser-agent: *\nDisallow: /\n"

    allowed, forbidden, redirected = outcomes(site, settings(), "/image/1", "/image/2", "/to?url=/image/2")

    assert allowed.reject_reason is None
    assert (forbidden.reject_reason, redirected.reject_reason) == ("robots", "robots")
    assert site.hits["/robots.txt"] == 1
    assert "/image/2" not in site.hits
    assert site.agents == {settings().fetch.user_agent}


@pytest.mark.parametrize(("robots", "reason"), [(404, None), (403, None), (500, "robots"), (503, "robots"), ("", None)])
def test_a_missing_robots_txt_allows_and_a_broken_one_refuses(site, settings, robots, reason):
    site.robots = robots

    (fetched,) = outcomes(site, settings(), "/image/1")

    assert fetched.reject_reason == reason


def test_a_robots_txt_that_hangs_refuses(site, settings):
    site.robots_delay_s = 5

    (fetched,) = outcomes(site, settings(timeout_s=0.6), "/image/1")

    assert fetched.reject_reason == "robots"


def test_robots_txt_can_be_ignored_by_setting(site, settings):
    site.robots = "User-agent: *\nDisallow: /\n"

    (fetched,) = outcomes(site, settings(consent={"robots": False}), "/image/1")

    assert fetched.reject_reason is None
    assert "/robots.txt" not in site.hits


def test_a_busy_server_is_asked_again_after_the_time_it_names(site, settings):
    started = time.monotonic()

    (fetched,) = outcomes(site, settings(retries=1), "/busy/1")

    assert fetched.reject_reason is None
    assert time.monotonic() - started >= 1


def test_a_wait_beyond_the_deadline_ends_at_once(site, settings):
    started = time.monotonic()

    (fetched,) = outcomes(site, settings(retries=3), "/busy/60")

    assert fetched.reject_reason == "http_429"
    assert time.monotonic() - started < 2


def test_a_broken_connection_is_tried_again(site, settings):
    (fetched,) = outcomes(site, settings(retries=1), "/reset")

    assert fetched.reject_reason is None
    assert site.hits["/reset"] == 2


def test_a_host_never_sees_more_requests_than_allowed(site, settings):
    paths = [f"/slow/{number}" for number in range(20)]

    results = outcomes(site, settings(host_concurrency=3), *paths)

    assert {result.reject_reason for result in results} == {None}
    assert site.most_at_once == 3


def test_environment_proxies_are_ignored(site, settings, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    (fetched,) = outcomes(site, settings(), "/image/1")

    assert fetched.reject_reason is None


def test_a_slow_consumer_holds_back_the_fetcher(site, settings):
    config = settings(concurrency=2)
    results = crawl.fetch([Link(f"{site.url}/image/{number}") for number in range(60)], config)

    next(results)
    time.sleep(0.5)

    assert sum(count for path, count in site.hits.items() if path.startswith("/image/")) <= 2 * 2 + 2
    assert len(list(results)) == 59


def test_closing_early_ends_the_threads(site, settings):
    before = threading.active_count()
    links = [Link(f"{site.url}/drip") for _ in range(20)] + [Link(f"{site.url}/image/1")]
    results = crawl.fetch(links, settings(host_concurrency=30))

    assert next(results).index == 20
    results.close()

    time.sleep(0.1)
    assert threading.active_count() <= before


def test_stopping_ends_the_iterator(site, settings):
    started = time.monotonic()
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()

    assert list(crawl.fetch([Link(f"{site.url}/drip")], settings(), stop.is_set)) == []
    assert time.monotonic() - started < 3


def test_web_and_local_links_mix(site, settings, make_image, tmp_path):
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    local = Link((tmp_path / "a.jpg").as_uri(), (), "file", str(tmp_path / "a.jpg"))

    results = {result.index: result for result in crawl.fetch([local, Link(f"{site.url}/image/1"), local], settings())}

    assert [results[index].data for index in range(3)] == [make_image(1)] * 3
    assert [results[index].http_status for index in range(3)] == [None, 200, None]


def test_no_links_give_no_results(settings):
    assert list(crawl.fetch([], settings())) == []


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("", 0), ("7", 7), ("-7", 0), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("٣", 0), ("9" * 400, 999999999)],
)
def test_retry_after_is_read(header, seconds):
    assert retry_after_s(header) == seconds


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncation_shows_at_reduced_scale(site, settings, make_image, tmp_path, progressive, share):
    data = make_image(1, 400, progressive=progressive)
    path = tmp_path / "x.jpg"
    path.write_bytes(data[: int(len(data) * share)])

    (fetched,) = crawl.fetch([Link(path.as_uri(), (), "file", str(path))], settings())

    assert fetched.reject_reason == "truncated"
    assert ImagesConfig().min_side_px <= 400


def test_names_that_nobody_answers_for_keep_no_others_from_being_looked_up(site, settings, monkeypatch):
    look_up = socket.getaddrinfo

    def slow(host, *args, **options):
        if host.startswith("dead"):
            time.sleep(3.0)  # longer than the deadline of its link
        return look_up("127.0.0.1" if host.endswith(".example") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    names = [f"{kind}{number}" for number in range(60) for kind in ("dead", "live")]
    links = [Link(f"http://{name}.example:{site.port}/image/1.jpg") for name in names]

    found = {names[r.index]: r.reject_reason for r in crawl.fetch(links, settings(concurrency=16, timeout_s=1.6))}

    assert {reason for name, reason in found.items() if name.startswith("live")} == {None}
