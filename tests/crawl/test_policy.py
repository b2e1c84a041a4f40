import pytest

from curation import crawl
from curation.config import RunConfig
from curation.config.fetch import FetchConfig, PolicyConfig
from curation.config.inputs import InputConfig
from curation.crawl.inputs import read_inputs
from curation.crawl.links import LINK_REASONS, Link
from curation.crawl.policy import MAX_PATTERNS, UrlPolicy, policy_settings
from curation.crawl.urls import parse
from curation.errors import InputError, LinkError


def refused(config, url):
    """Return the reason, or None."""
    try:
        UrlPolicy.load(config).check(parse(url))
    except LinkError as error:
        return error.reason if error.reason in LINK_REASONS else "undocumented"
    return None


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURATION_CACHE", str(tmp_path / "cache"))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_domains_of_a_block_list_are_refused_with_their_subdomains(tmp_path):
    config = PolicyConfig(blocked_domains=(write(tmp_path / "a.txt", "bad.example\n"),))

    assert [refused(config, f"http://{host}/x") for host in ("bad.example", "A.Bad.Example.", "verybad.example")] == [
        *("policy_domain", "policy_domain", None)
    ]


def test_only_domains_of_an_allow_list_are_visited_and_blocked_ones_among_them_are_not(tmp_path):
    allowed = write(tmp_path / "allowed.txt", "good.example\nbücher.example\n")
    config = PolicyConfig(allowed_domains=(allowed,), blocked_domains=(write(tmp_path / "b", "x.good.example"),))

    hosts = ("good.example", "www.good.example", "xn--bcher-kva.example", "x.good.example", "other.example", "1.2.3.4")
    assert [refused(config, f"http://{host}/x") for host in hosts] == [None] * 3 + ["policy_domain"] * 3


def test_an_empty_allow_list_allows_nothing(tmp_path):
    config = PolicyConfig(allowed_domains=(write(tmp_path / "allowed.txt", "# none yet\n"),))

    assert refused(config, "http://example.com/") == "policy_domain"


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("example.com/private/*", ["https://example.com/private/a.jpg", "http://EXAMPLE.com/%70rivate/a"], ["http://a.example.com/private/a"]),
        ("example.com/private/*", ["http://example.com./private/a", "http://example.com:8080/private/a"], []),
        ("example.com:8080/*", ["http://example.com:8080/a"], ["http://example.com/a"]),
        ("*.Bücher.example/ä*", ["http://a.xn--bcher-kva.example/%c3%a4b"], ["http://xn--bcher-kva.example/"]),
        ("*.example.com/*", ["http://a.example.com/b"], ["http://example.com/b"]),
        ("*/nsfw/*", ["http://a.example/x/NSFW/y.jpg"], ["http://a.example/nsfw.jpg"]),
        ("evil.com", ["http://evil.com/", "https://EVIL.com:8080/a?b", "http://evil.com./a"], ["http://a.evil.com/", "http://evil.com.example/"]),
        ("http://evil.com:80", ["http://evil.com/"], ["https://evil.com/"]),
        ("evil.com:443/a", ["https://evil.com/a", "http://evil.com:443/a"], ["http://evil.com/a"]),
        ("evil.com?q=*", ["http://evil.com/?q=1"], ["http://evil.com/a?q=1"]),
        ("evil.com/*", ["https://evil.com/"], ["http://proxy.example/http://evil.com/x"]),
        ("evil.com/to?u=http://b.example", ["http://evil.com/to?u=http://b.example"], []),
        ("bücher.example:81/*", ["http://xn--bcher-kva.example:81/a"], []),
        ("*/ÄÉ%c3%96ß/*", ["http://a.example/äéöß/b", "http://a.example/%C3%A4%c3%89Öß/"], ["http://a.example/aeo/"]),
        ("*straße*", ["http://a.example/STRAßE"], []),
        ("*/%fc*", ["http://a.example/%FCx"], []),
        ("https://*", ["https://a.example/"], ["http://a.example/"]),
        ("*?id=*&x=1", ["http://a.example/?id=7&x=1"], ["http://a.example/?id=7&x=12"]),
        ("*a*a*a*a*a*a*a*a*b", ["http://a.example/aaaaaaaaab"], ["http://a.example/" + "a" * 8000]),
    ],
)  # fmt: skip
def test_urls_that_match_a_pattern_as_a_whole_are_refused(pattern, matching, others):
    config = PolicyConfig(blocked_urls=(pattern,))

    assert {refused(config, url) for url in matching} == {"policy_pattern"}
    assert {refused(config, url) for url in others} <= {None}


def test_patterns_come_from_files_too_but_not_without_end(tmp_path):
    config = PolicyConfig(blocked_url_lists=(write(tmp_path / "p.txt", "\ufeff# one\n\n*/ads/*\n"),))
    assert refused(config, "http://a.example/ads/x") == "policy_pattern"

    config = PolicyConfig(blocked_url_lists=(write(tmp_path / "q.txt", "*/a\n" * (MAX_PATTERNS + 1)),))
    with pytest.raises(InputError, match="blocked_domains"):
        UrlPolicy.load(config)


@pytest.mark.parametrize(
    ("ports", "port", "reason"),
    [((), 443, None), ((), 8080, None), ((), 25, "policy_port"), ((80, 443), 8080, "policy_port"), ((25,), 25, None)],
)
def test_ports_of_other_services_are_refused_unless_ports_are_named(ports, port, reason):
    assert refused(PolicyConfig(ports=ports), f"http://example.com:{port}/") == reason


@pytest.mark.parametrize(
    "url",
    [
        "https://www.google-analytics.com/collect?v=1",
        "https://www.facebook.com/tr?id=1&ev=PageView&noscript=1",
        "https://pixel.wp.com/b.gif?v=noscript",
        "https://vg08.met.vgwort.de/na/0123456789abcdef",
        "https://mc.yandex.ru/watch/1234",
        "https://bat.bing.com/action/0?ti=1",
        "https://www.google-analytics.com./collect?v=1",
        "https://example.com/images/spacer.gif",
        "https://example.com/1x1.png?r=7",
        "https://example.com/i?w=1&h=1",
        "https://example.com/i?width=1&amp=1&height=1",
        "https://example.com/track?size=1x1",
    ],
)
def test_tracking_pixels_are_refused_unless_wanted(url):
    assert refused(PolicyConfig(), url) == "tracking_pixel"
    assert refused(PolicyConfig(tracking_pixels=False), url) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://www.facebook.com/travel.jpg",
        "https://example.com/beacon.jpg",
        "https://example.com/photo-1x1.jpg",
        "https://example.com/1x1/photo.jpg",
        "https://example.com/i?w=1&h=100",
        "https://example.com/i?w=10&h=1",
        "https://example.com/i?page=1&id=1",
        "https://example.com/i?" + "&".join(f"a{n}=1" for n in range(500)),
        "https://notgoogle-analytics.com/a.jpg",
        "https://example.com/pixel-art.png",
    ],
)
def test_pictures_are_not_taken_for_tracking_pixels(url):
    assert refused(PolicyConfig(), url) is None


def test_refused_links_are_rows_and_nothing_is_sent(site, settings, tmp_path):
    config = settings(policy={"blocked_domains": (write(tmp_path / "a", "127.0.0.1"),), "blocked_urls": ("*/cats/*",)})
    links = [Link(f"{site.url}/image/1"), Link("http://example.com/cats/1"), Link("http://example.com/1x1.gif")]

    results = sorted(crawl.fetch(links, config), key=lambda result: result.index)

    assert [result.reject_reason for result in results] == ["policy_domain", "policy_pattern", "tracking_pixel"]
    assert not site.hits


def test_targets_of_redirects_are_held_to_the_policy(site, settings):
    config = settings(policy={"blocked_urls": ("*/image/*",)})

    (fetched,) = crawl.fetch([Link(f"{site.url}/to?url=/image/1")], config)

    assert (fetched.reject_reason, site.hits["/image/1"]) == ("policy_pattern", 0)


def test_live_pages_are_held_to_the_policy(site, settings):
    site.pages["/page"] = "<img src=a.jpg>"
    config = settings(policy={"blocked_urls": ("*/page",)})
    seen = []

    links = list(read_inputs([InputConfig(kind="pages", urls=(f"{site.url}/page",))], config, seen.append))

    assert (links, seen, dict(site.hits)) == ([], ["page_policy_pattern"], {})


def test_what_lists_say_is_the_identity_of_a_policy_and_not_where_they_lie(tmp_path):
    first = PolicyConfig(blocked_domains=(write(tmp_path / "a", "bad.example\n"),))
    moved = PolicyConfig(blocked_domains=(write(tmp_path / "b", "bad.example\n"),))
    other = PolicyConfig(blocked_domains=(write(tmp_path / "c", "worse.example\n"),))

    assert policy_settings(first) == policy_settings(moved) != policy_settings(other)


def test_a_list_that_is_missing_is_named(tmp_path):
    config = RunConfig(fetch=FetchConfig(policy=PolicyConfig(blocked_domains=(str(tmp_path / "no.txt"),))))

    with pytest.raises(InputError, match=r"no\.txt"):
        next(iter(crawl.fetch([Link("http://example.com/")], config)))
