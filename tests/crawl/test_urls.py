import pytest

from curation.crawl.urls import MAX_URL_CHARS, normalise, parse
from curation.errors import LinkError

BASE = "https://example.com/a/b/page.html?x=1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTP://EXAMPLE.com", "http://example.com/"),
        ("http://example.com:80/a", "http://example.com/a"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("http://example.com:443/a", "http://example.com:443/a"),
        ("http://example.com:/a", "http://example.com/a"),
        ("http://example.com:000000080/a", "http://example.com/a"),
        ("http://example.com:65536/a", LinkError("bad_url")),
        ("http://example.com:٨٠/a", LinkError("bad_url")),
        ("http://example.com:0080/a", "http://example.com/a"),
        ("http://example.com/a#top", "http://example.com/a"),
        ("http://example.com/a?b#c?d", "http://example.com/a?b"),
        ("http://example.com/a?", "http://example.com/a?"),
        ("  http://example.com/a\n", "http://example.com/a"),
        ("ht\ttp://exam\nple.com/a\r\nb", "http://example.com/ab"),
        ("http://example.com/a b", "http://example.com/a%20b"),
        ("http://example.com/ä.jpg?ö=ü", "http://example.com/%C3%A4.jpg?%C3%B6=%C3%BC"),
        ("http://example.com/%c3%a4%zz", "http://example.com/%c3%a4%zz"),
        ("http://example.com/a/../b/./c/..", "http://example.com/b/"),
        ("http://example.com/../../a", "http://example.com/a"),
        ("http://example.com/a/%2E%2e/b", "http://example.com/b"),
        ("http://example.com/a//b", "http://example.com/a//b"),
        ("http:\\\\example.com\\a\\b?c\\d", "http://example.com/a/b?c\\d"),
        ("http://example.com?x", "http://example.com/?x"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://BÜCHER.example/", "http://xn--bcher-kva.example/"),
        ("http://☕.example/", "http://xn--53h.example/"),
        ("http://ＥＸＡＭＰＬＥ．com/", "http://example.com/"),
        ("http://ex\u00adample。com/", "http://example.com/"),
        ("http://％41.com/", LinkError("bad_url")),
        ("http://℀.example/", LinkError("bad_url")),
        ("http://ａ＠b.example/", LinkError("bad_url")),
        ("http://" + "ä" * 5000 + ".example/", LinkError("bad_url")),
        ("http://%zz.example/", LinkError("bad_url")),
        ("http://%ff.example/", LinkError("bad_url")),
        ("http://faß.example/", "http://xn--fa-hia.example/"),
        ("http://ex%61mple.com/", "http://example.com/"),
        ("http://my_bucket.example.com/", "http://my_bucket.example.com/"),
        ("http://[2001:DB8:0:0:0:0:0:1]:8080/", "http://[2001:db8::1]:8080/"),
        ("http://[::ffff:7f00:1]/", "http://[::ffff:7f00:1]/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://[1:0:0:2:0:0:0:3]/", "http://[1:0:0:2::3]/"),
        ("http://[1:0:2:3:4:5:6:7]/", "http://[1:0:2:3:4:5:6:7]/"),
        ("http://[::]:80/", "http://[::]/"),
        ("http://[fe80::1%25eth0]/", LinkError("bad_url")),
        ("http://[::1", LinkError("bad_url")),
        ("http://1.2.3/", "http://1.2.0.3/"),
        ("http://1.2.3.4./", "http://1.2.3.4/"),
        ("http://a.0xff/", LinkError("bad_url")),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://example.com/'\"<>`{}^|", "http://example.com/'%22%3C%3E%60%7B%7D%5E|"),
        ("http://example.com/?'\"<>", "http://example.com/?%27%22%3C%3E"),
        ("http://example.com/\udcff\ud800", "http://example.com/%EF%BF%BD%EF%BF%BD"),
        ("http://example.com/\udcff", "http://example.com/%FF"),
        ("img.jpg", "https://example.com/a/b/img.jpg"),
        ("../img.jpg", "https://example.com/a/img.jpg"),
        ("/img.jpg", "https://example.com/img.jpg"),
        ("//cdn.example/img.jpg", "https://cdn.example/img.jpg"),
        ("\\\\cdn.example\\img.jpg", "https://cdn.example/img.jpg"),
        ("?y=2", "https://example.com/a/b/page.html?y=2"),
        ("", BASE),
        ("#top", BASE),
        ("https:img.jpg", "https://example.com/a/b/img.jpg"),
        ("https:/img.jpg", "https://example.com/img.jpg"),
        ("https:\\img.jpg", "https://example.com/img.jpg"),
        ("https:/\\cdn.example/img.jpg", "https://cdn.example/img.jpg"),
        ("///cdn.example/img.jpg", "https://cdn.example/img.jpg"),
        ("http:/img.example/x", "http://img.example/x"),
        ("//", LinkError("bad_url")),
        ("http:img.example/x", "http://img.example/x"),
        ("a:b", LinkError("policy_scheme")),
        ("./a:b", "https://example.com/a/b/a:b"),
        ("data:image/png;base64,AAAA", LinkError("policy_scheme")),
        ("javascript:alert(1)", LinkError("policy_scheme")),
        ("http://", LinkError("bad_url")),
        ("http://a..b/", LinkError("bad_url")),
        ("http://exa mple.com/", LinkError("bad_url")),
        ("http://user:pass@example.com/", LinkError("policy_credentials")),
        ("http://@example.com/", LinkError("policy_credentials")),
        ("http://example.com:port/", LinkError("bad_url")),
        ("http://" + "a" * 64 + ".example/", LinkError("bad_url")),
        ("http://example.com/\u202e/", "http://example.com/%E2%80%AE/"),
        ("http://xn--a/", "http://xn--a/"),
        ("http://xn--é.example/", LinkError("bad_url")),
        ("http://é.xn--a/", LinkError("bad_url")),
        ("http://é.xn--bcher-kva/", "http://xn--9ca.xn--bcher-kva/"),
        ("http://xn--BCHER-KVA.example/", "http://xn--bcher-kva.example/"),
        ("http://a\u200d.example/", LinkError("bad_url")),
        ("http://क\u094d\u200dष.example/", "http://xn--11b2ezcw70k.example/"),
        ("http://אa.example/", LinkError("bad_url")),
        ("http://\u202e.example/", LinkError("bad_url")),
        ("http://example.com/" + "a" * MAX_URL_CHARS, LinkError("bad_url")),
    ],
)
def test_each_address_has_one_spelling(text, expected):
    if isinstance(expected, LinkError):
        with pytest.raises(LinkError) as refused:
            normalise(text, BASE)
        assert refused.value.reason == expected.reason
    else:
        assert normalise(text, BASE) == expected


def test_normalising_again_changes_nothing():
    for text in ("http://example.com/ä ?ö#x", "http://faß.example:8080/a/../b'\"", "http://0x7f.1/%zz?'"):
        once = normalise(text)

        assert normalise(once) == once


def test_a_relative_address_needs_a_page():
    with pytest.raises(LinkError, match="relative"):
        normalise("img.jpg")


def test_the_origin_has_no_default_port():
    assert parse("https://example.com:443/a?b").origin == "https://example.com"
    assert parse("https://example.com:444/a?b").origin == "https://example.com:444"
