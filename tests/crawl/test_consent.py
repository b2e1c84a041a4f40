import asyncio
import json
from urllib.parse import urlencode

import pytest
from multidict import CIMultiDict

from curation import crawl
from curation.config.fetch import ConsentConfig, FetchConfig
from curation.config.inputs import InputConfig
from curation.crawl.consent import Consent
from curation.crawl.inputs import read_inputs
from curation.crawl.links import Link
from curation.crawl.urls import parse
from curation.errors import LinkError

ROBOTS = "/robots.txt"
TDMREP = "/.well-known/tdmrep.json"
IMAGE = parse("https://example.com/a.jpg")


def reasons(site, config, *paths, **link):
    links = [Link(site.url + path, **link) for path in paths]
    return [result.reject_reason for result in sorted(crawl.fetch(links, config), key=lambda result: result.index)]


def tagged(*headers):
    return f"/tagged?{urlencode(headers)}"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([("X-Robots-Tag", "noai")], "opt_out_noai"),
        ([("x-robots-tag", "NoIndex, NoImageAI")], "opt_out_noimageai"),
        ([("X-Robots-Tag", "noindex"), ("X-Robots-Tag", "noml")], "opt_out_noml"),
        ([("X-Robots-Tag", "Curation: noai")], "opt_out_noai"),
        ([("X-Robots-Tag", "otherbot: noai, noml")], None),
        ([("X-Robots-Tag", "otherbot: noindex, curation: noai")], "opt_out_noai"),
        ([("X-Robots-Tag", "unavailable_after: 25 Jun 2010 15:00:00 PST, noai")], "opt_out_noai"),
        ([("X-Robots-Tag", "noindex, nofollow")], None),
        ([("TDM-Reservation", "1")], "opt_out_tdm"),
        ([("tdm-reservation", " 1 "), ("tdm-policy", "https://example.com/p.json")], "opt_out_tdm"),
        ([("TDM-Reservation", "0"), ("TDM-Reservation", "1")], "opt_out_tdm"),
        ([("TDM-Reservation", "0")], None),
        ([("TDM-Reservation", "yes")], None),
        ([("X-Robots-Tag", "noai"), ("status", "302"), ("Location", "/image/1")], "opt_out_noai"),
    ],
)
def test_what_the_headers_of_an_image_say_is_obeyed(site, settings, headers, reason):
    assert reasons(site, settings(), tagged(*headers)) == [reason]
    assert site.hits["/image/1"] == 0


def test_the_body_of_an_image_that_opts_out_is_not_read(site, settings):
    site.endless_headers = {"X-Robots-Tag": "noai"}

    (fetched,) = crawl.fetch([Link(f"{site.url}/endless")], settings(max_bytes=1000))

    assert (fetched.reject_reason, fetched.http_status, fetched.data) == ("opt_out_noai", 200, None)


def test_tdmrep_json_is_asked_once_before_any_image_and_obeyed(site, settings):
    site.tdmrep = json.dumps([{"location": "/image/1*", "tdm-reservation": 1}, {"location": "/", "tdm-reservation": 0}])

    found = reasons(site, settings(), "/image/1", "/image/2", "/image/15?x", "/to?url=/image/12")

    assert found == ["opt_out_tdm", None, "opt_out_tdm", "opt_out_tdm"]
    assert site.hits[TDMREP] == 1
    assert not [path for path in site.hits if path.startswith("/image/1")]


@pytest.mark.parametrize("tdmrep", [404, 500, "", "<html>", '{"a": 1}'])
def test_without_a_tdmrep_json_nothing_is_reserved(site, settings, tdmrep):
    site.tdmrep = tdmrep

    assert reasons(site, settings(), "/image/1") == [None]


def test_a_tdmrep_json_that_hangs_does_not_hold_up_its_images_for_long(site, settings):
    site.tdmrep_delay_s = 5

    assert reasons(site, settings(timeout_s=2.0), "/image/1") == [None]


def test_what_robots_txt_forbids_is_not_asked_about_again(site, settings):
    site.robots = "User-agent: *\nDisallow: /\n"

    assert reasons(site, settings(), "/image/1") == ["robots"]
    assert dict(site.hits) == {ROBOTS: 1}


def test_what_a_page_says_is_obeyed_before_any_request(site, settings):
    assert reasons(site, settings(), "/image/1", "/image/2", opt_out="opt_out_noml") == ["opt_out_noml"] * 2
    assert not site.hits


def test_what_the_headers_of_a_live_page_say_holds_for_its_images(site, settings):
    site.pages["/page"] = "<img src=/image/1>"
    site.page_headers = {"X-Robots-Tag": "noimageai"}
    source = InputConfig(kind="pages", urls=(f"{site.url}/page",))

    (link,) = read_inputs([source], settings(), lambda reason: None)

    assert (link.url, link.opt_out) == (f"{site.url}/image/1", "opt_out_noimageai")


@pytest.mark.parametrize(
    ("consent", "path", "link"),
    [
        ({"page": False}, "/image/1", {"opt_out": "opt_out_noai"}),
        ({"page": False}, "/image/1", {"opt_out": "opt_out_tdm"}),
        ({"tdm": False}, "/image/1", {"opt_out": "opt_out_tdm"}),
        ({"tdm": False}, tagged(("TDM-Reservation", "1")), {}),
        ({"tdm": False}, "/reserved/image", {}),
        ({"headers": False}, tagged(("X-Robots-Tag", "noai")), {}),
        ({"robots": False}, "/forbidden/image", {}),
    ],
)
def test_each_check_can_be_turned_off(site, settings, consent, path, link):
    site.robots = "User-agent: *\nDisallow: /forbidden/\n"
    site.tdmrep = json.dumps([{"location": "/reserved/", "tdm-reservation": 1}])

    (on,) = reasons(site, settings(), path, **link)
    (off,) = reasons(site, settings(consent=consent), path, **link)

    assert on is not None
    assert off in (None, "http_404")


def test_checks_that_are_off_ask_for_nothing(site, settings):
    assert reasons(site, settings(consent={"robots": False, "tdm": False}), "/image/1") == [None]
    assert dict(site.hits) == {"/image/1": 1}


def test_the_files_of_many_origins_are_forgotten_in_bounded_memory(monkeypatch):
    asked = []

    async def read(url, max_bytes):
        asked.append(url.origin)
        return b"User-agent: *\n" + b"".join(b"Disallow: /x%d\n" % number for number in range(100))

    async def visit():
        consent = Consent(FetchConfig(consent=ConsentConfig(tdm=False)), read)
        for number in [*range(10), *range(10)]:
            await consent.check(parse(f"http://h{number}.example/"))
        await consent.close()

    asyncio.run(visit())
    assert len(asked) == 10  # all are kept

    asked.clear()
    monkeypatch.setattr("curation.crawl.consent._MAX_RULES_KEPT", 500)
    asyncio.run(visit())
    assert len(asked) == 20  # four fit, and are gone when their turn comes again


def test_a_crawl_delay_is_known_once_it_was_read():
    async def read(url, max_bytes):
        return b"User-agent: *\nCrawl-delay: 3\n"

    async def visit():
        consent = Consent(FetchConfig(consent=ConsentConfig(tdm=False)), read)
        before = consent.crawl_delay_s(IMAGE)
        await consent.check(IMAGE)
        return before, consent.crawl_delay_s(IMAGE), consent.crawl_delay_s(parse("https://example.com:8443/"))

    assert asyncio.run(visit()) == (0.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("http_404", None),
        ("http_403", None),
        ("http_429", None),
        ("http_500", "robots"),
        ("http_503", "robots"),
        ("too_many_redirects", None),
        ("truncated", "robots"),
        ("policy_domain", "robots"),
        ("dns", "dns"),
        ("tls", "tls"),
    ],
)
def test_robots_txt_that_cannot_be_read_allows_or_refuses_as_rfc_9309_says(error, reason):
    async def read(url, max_bytes):
        raise LinkError(error, "x")

    async def visit():
        consent = Consent(FetchConfig(), read)
        try:
            await consent.check(IMAGE)
        except LinkError as refused:
            return refused.reason
        return None

    assert asyncio.run(visit()) == reason


def test_of_a_robots_txt_half_a_mebibyte_is_read():
    async def read(url, max_bytes):
        rules = b"User-agent: *\n" + b"#" * (max_bytes - 100) + b"\nDisallow: /a\n"
        return (rules + b"#" * 100 + b"\nDisallow: /b\n") if url.path == ROBOTS else b""

    async def visit():
        consent = Consent(FetchConfig(), read)
        await consent.check(parse("https://example.com/b"))
        with pytest.raises(LinkError):
            await consent.check(IMAGE)

    asyncio.run(visit())


def test_headers_are_read_in_any_case():
    consent = Consent(FetchConfig(user_agent="my-bot/2.0"), lambda url, max_bytes: None)

    assert consent.opt_out(CIMultiDict({"x-robots-tag": "my-bot: noai"})) == "opt_out_noai"
    assert consent.opt_out(CIMultiDict({"x-robots-tag": "curation: noai"})) is None
