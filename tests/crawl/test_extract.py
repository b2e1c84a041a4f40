import random

import pytest

from curation.crawl.charset import decode_html
from curation.crawl.extract import extract, parse_srcset
from curation.crawl.tag_cost import MAX_OPEN_TAGS
from curation.errors import LinkError

PAGE = "https://example.com/a/page.html"
HERE = "https://example.com/a/"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<img src=x.jpg>", ["x.jpg"]),
        ("<IMG SRC='x.jpg'>", ["x.jpg"]),
        ("<img src=' \n x.jpg\t'>", ["x.jpg"]),
        ("<img src='x.jpg?a=1&amp;b=2&copy;'>", ["x.jpg?a=1&b=2%C2%A9"]),
        ("<img src=//cdn.example/x.jpg>", ["https://cdn.example/x.jpg"]),
        ("<img src=x.jpg><img src=x.jpg#2><img src='./x.jpg'>", ["x.jpg"]),
        ("<img src=b.jpg><img src=a.jpg>", ["b.jpg", "a.jpg"]),
        ("<img src=s.jpg srcset='m.jpg 400w, l.jpg 800w, s.jpg 100w'>", ["l.jpg"]),
        ("<img src=s.jpg srcset='m.jpg, l.jpg 2x'>", ["l.jpg"]),
        ("<img srcset='a,b.jpg 1x,c.jpg 3x'>", ["c.jpg"]),
        ("<img src=blank.gif data-src=real.jpg>", ["real.jpg"]),
        ("<img src=blank.gif data-original=real.jpg>", ["real.jpg"]),
        ("<img src=blank.gif data-lazy-src=real.jpg>", ["real.jpg"]),
        ("<img src=blank.gif data-lazyload=real.jpg>", ["real.jpg"]),
        ("<img src=blank.gif data-srcset='r1.jpg 1x, r2.jpg 2x'>", ["r2.jpg"]),
        ("<img srcset='data:image/gif;base64,AA 1w' data-srcset='r.jpg 9w'>", ["r.jpg"]),
        ("<img src='data:image/gif;base64,AA' data-src=real.jpg>", ["real.jpg"]),
        ("<img src=real.jpg data-src='{&quot;default&quot;:&quot;//a/b&quot;}'>", ["real.jpg"]),
        ("<picture><source srcset='w.webp 900w'><img src=f.jpg></picture>", ["w.webp"]),
        ("<picture><source srcset='w.webp 900w'><img srcset='f.jpg 1200w'></picture>", ["f.jpg"]),
        ("<picture><source type=image/svg+xml srcset=v><img src=f.jpg></picture>", ["f.jpg"]),
        (
            "<picture><source type='image/JXL' srcset=j><source type=image/avif srcset=a><img src=f.jpg></picture>",
            ["a"],
        ),
        (
            "<img data-src='//a.example/b_{width}x.jpg' src=s.jpg><img data-src='{{ url }}' src=t.jpg>",
            ["s.jpg", "t.jpg"],
        ),
        ("<img src='{B59C1A2F-0001}.jpg?a={1}'>", []),
        ("<img src='x/{B59C1A2F-0001}.jpg?a={1}'>", ["x/%7BB59C1A2F-0001%7D.jpg?a={1}"]),
        ("<picture><source data-srcset='w.webp 900w'><img src=f.jpg></picture>", ["w.webp"]),
        ("<picture><source srcset='w.webp 900w'><noscript><img src=f.jpg></noscript></picture>", ["w.webp"]),
        (
            "<picture><img src=blank.gif><noscript><img src=f.jpg></noscript></picture><img src=g.jpg>",
            ["f.jpg", "g.jpg"],
        ),
        ("<picture><img data-src=r.jpg src=b.gif><noscript><img src=f.jpg></noscript></picture>", ["r.jpg"]),
        ("<picture><source srcset=a><img src=b></picture><picture><source srcset=c><img src=d></picture>", ["a", "c"]),
        ("<video><source src=v.mp4></video>", []),
        ("<noscript><img src=x.jpg></noscript>", ["x.jpg"]),
        ("<head><noscript><img src=x.jpg></noscript></head>", ["x.jpg"]),
        ("<amp-img src=x.jpg></amp-img>", ["x.jpg"]),
        ("<base href=/other/><img src=x.jpg>", ["https://example.com/other/x.jpg"]),
        ("<base href='//cdn.example/'><base href=/no/><img src=x.jpg>", ["https://cdn.example/x.jpg"]),
        ("<base href='javascript:1'><img src=x.jpg>", ["x.jpg"]),
        ("<base target=_top><base href=b/><img src=x.jpg>", ["b/x.jpg"]),
        ("<!-- <img src=x.jpg> --><script>'<img src=y.jpg>'</script><textarea><img src=z.jpg></textarea>", []),
        ("<img src=x.jpg alt='<img src=y.jpg>'", []),
        ("<p><img src=x.jpg <b>", ["x.jpg"]),
        ("<img src=bücher.jpg>", ["b%C3%BCcher.jpg"]),
        ("<img src=http://bücher.example/>", ["http://xn--bcher-kva.example/"]),
        ("<svg><image href=x.jpg></image></svg>", []),
    ],
)
def test_images_of_a_page(html, expected):
    urls = [url if "://" in url else HERE + url for url in expected]

    assert list(extract(html, PAGE).urls) == urls


@pytest.mark.parametrize(
    ("html", "reason"),
    [
        ("<img src='data:image/gif;base64,AA'>", "data_uri"),
        ("<img src=' DATA:image/gif;base64,AA'>", "data_uri"),
        ("<img src=logo.svg>", "svg"),
        ("<img src=logo.SVGZ?x=1>", "svg"),
        ("<img src='data:image/svg+xml,x'>", "svg"),
        ("<img>", "no_source"),
        ("<img src='#'>", "no_source"),
        ("<img data-src='${image.url}'>", "bad_url"),
        ("<img src=''>", "no_source"),
        ("<img src>", "no_source"),
        ("<img src=about:blank>", "policy_scheme"),
        ("<img src=http://user:pw@example.com/x.jpg>", "policy_credentials"),
    ],
)
def test_what_is_no_image_of_the_web_is_counted(html, reason):
    images = extract(html, PAGE)

    assert (images.urls, dict(images.skipped)) == ((), {reason: 1})


def test_without_a_page_only_absolute_addresses_count():
    images = extract("<img src=x.jpg><img src=http://example.com/y.jpg>", None)

    assert (images.urls, dict(images.skipped)) == (("http://example.com/y.jpg",), {"bad_url": 1})


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * (MAX_OPEN_TAGS + 1),
        "<img " + " ".join(f"a{number}=1" for number in range(6000)) + ">",
        "<b " + "a " * 9999,
    ],
)
def test_pages_built_to_take_forever_are_refused(html):
    with pytest.raises(LinkError) as refused:
        extract(html, PAGE)

    assert refused.value.reason == "bad_page"


@pytest.mark.parametrize(
    ("srcset", "expected"),
    [
        ("", []),
        (" , ,", []),
        ("a", [("a", 0, 1)]),
        ("a, b 2x", [("a", 0, 1), ("b", 0, 2)]),
        ("a 1.5x,b 100w", [("a", 0, 1.5), ("b", 100, 1)]),
        ("a,b.jpg 100w", [("a,b.jpg", 100, 1)]),
        ("a 100w 50h, b", [("a", 100, 1), ("b", 0, 1)]),
        ("a (x,y) 3x, b", [("a", 0, 3), ("b", 0, 1)]),
        ("a nonsense, b 2x", [("a", 0, 1), ("b", 0, 2)]),
        ("data:image/png;base64,AA== 2x, b", [("data:image/png;base64,AA==", 0, 2), ("b", 0, 1)]),
        ("a 9999999999999x, b (", [("a", 0, 1), ("b", 0, 1)]),
    ],
)
def test_srcset_candidates(srcset, expected):
    assert parse_srcset(srcset) == expected


@pytest.mark.parametrize(
    ("data", "content_type", "expected"),
    [
        ("ä".encode(), "", "ä"),
        ("ä".encode("cp1252"), "", "ä"),
        ("ä".encode("cp1252"), "text/html; charset=ISO-8859-1", "ä"),
        ("€".encode("cp1252"), 'text/html; charset="latin1"', "€"),
        ("жук".encode("koi8-r"), "text/html; charset=koi8-r", "жук"),
        (b"<meta charset=shift_jis>" + "猫".encode("cp932"), "", "<meta charset=shift_jis>猫"),
        ("\u20ac".encode("cp1252"), "text/html; charset=iso8859-1", "\u20ac"),
        ("ő".encode("iso8859-2"), "text/html; charset=ISO_8859-2", "ő"),
        ("猫".encode("cp932"), "text/html; charset=Windows-31J", "猫"),
        ("猫".encode("gbk"), "text/html;charset=gb_2312-80", "猫"),
        (b"\xef\xbb\xbf" + "ä".encode(), "text/html; charset=latin1", "ä"),
        (b"\xff\xfe" + "ä".encode("utf-16-le"), "", "ä"),
        (b"<meta charset=utf-16>" + "ä".encode(), "", "<meta charset=utf-16>ä"),
        ("ä".encode(), "text/html; charset=rot13", "ä"),
        ("ä".encode(), "text/html; charset=unicode_escape", "ä"),
        (b"a" * 20_000 + "ä".encode()[:1], "", "a" * 20_000 + "\ufffd"),
    ],
)
def test_pages_are_decoded_by_what_they_say_they_are(data, content_type, expected):
    assert decode_html(data, content_type)[0] == expected


@pytest.mark.parametrize(
    ("label", "written", "sent"),
    [
        ("utf-8", "é/é?é†", "%C3%A9/%C3%A9?%C3%A9%E2%80%A0"),
        ("utf-16", "é?é", "%C3%A9?%C3%A9"),
        ("windows-1252", "é/é?é†", "%C3%A9/%C3%A9?%E9%86"),
        ("iso-8859-1", "?q=€ 猫&x=%e9", "page.html?q=%80%20%26%2329483%3B&x=%e9"),
        ("shift_jis", "?q=é&r=猫表", "page.html?q=%26%23233%3B&r=%94L%95\\"),
        ("euc-kr", "?†", "page.html?%A2%D3"),
        ("big5", "?†", "page.html?%26%238224%3B"),
        ("koi8-r", "?жук", "page.html?%D6%D5%CB"),
    ],
)  # what the standard's own tests (url/resources/percent-encoding.json) and browsers give
def test_queries_are_sent_in_the_charset_of_the_page(label, written, sent):
    text, charset = decode_html(
        f"<img src='{written}'>".encode(label, "xmlcharrefreplace"), f"text/html; charset={label}"
    )

    assert extract(text, PAGE, "", charset).urls == (HERE + sent,)


def test_mutilated_pages_give_addresses_of_the_web_and_no_error():
    drawn = random.Random(0)
    whole = (
        "<!doctype html><base href=/b/><meta name=robots content='noai'><svg><style><img src=s></style></svg>"
        "<picture><source srcset='a 1x, b 2x'><img src='c' data-src=\"d\" srcset=e></picture><script>'<img>'</script>"
        "<table><td><img src=&#x2f;x&amp;y><noscript><img src=//h/é></noscript><select><img src=f></select><!-- x -->"
    )
    for _ in range(2000):
        page = bytearray(whole.encode())
        for _ in range(drawn.randrange(1, 30)):
            place = drawn.randrange(len(page))
            page[place : place + drawn.randrange(3)] = drawn.choice(
                [b"<", b">", b"'", b'"', b"=", b"\0", b"\xff", b"&#"]
            )
        images = extract(bytes(page), PAGE)
        assert all(url.startswith(("http://", "https://")) for url in images.urls)
