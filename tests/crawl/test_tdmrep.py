import json

import pytest

from curation.crawl.tdmrep import MAX_RULES, MAX_TDMREP_BYTES, parse_tdmrep
from curation.crawl.urls import parse


def reserves(rules, path):
    data = rules if isinstance(rules, bytes) else json.dumps(rules).encode()
    return parse_tdmrep(data).reserves(parse(f"https://example.com{path}"))


def rule(location, reservation=1):
    return {"location": location, "tdm-reservation": reservation}


@pytest.mark.parametrize(
    ("rules", "reserved", "free"),
    [
        ([rule("/")], ["/", "/a/b.jpg?c"], []),
        (
            [rule("/directory-a/"), rule("/directory-b/html/"), rule("/directory-b/images/*.jpg", 0)],
            ["/directory-a/x.pdf", "/directory-b/html/"],
            ["/directory-b/images/a.jpg", "/directory-b/a.jpg", "/Directory-A/x.pdf"],
        ),
        ([rule("/press/*.jpg$", 0), rule("/")], ["/press/a.jpg?x", "/a"], ["/press/a.jpg", "/press/b/c.jpg"]),
        ([rule("/"), rule("/press/", 0)], ["/press/a.jpg"], []),  # the first that matches, not the longest
        ([rule("/a%62c/%7e")], ["/abc/~x"], ["/ab"]),
        ([rule("/path/foo-%24")], ["/path/foo-%24"], ["/path/foo-"]),
        ([rule("/ä")], ["/%C3%A4.jpg", "/%c3%a4"], ["/a"]),
        ([rule("*.jpg$")], ["/x/y.jpg"], ["/x/y.png"]),
        ([rule("images/")], ["/images/a"], ["/a"]),
        ([rule("https://example.com/x/")], ["/x/a"], ["/a"]),
        ([rule("/", "1")], ["/a"], []),
        ([rule("/", 2), rule("/", "yes"), rule("/", None), {"location": "/"}, 7, rule(7), rule("/b")], ["/b"], ["/a"]),
        (rule("/"), ["/a"], []),
        ([], [], ["/a"]),
    ],
)
def test_the_first_rule_whose_location_matches_decides(rules, reserved, free):
    assert [path for path in reserved if not reserves(rules, path)] == []
    assert [path for path in free if reserves(rules, path)] == []


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", b"[", b"null", b"1", b'"x"', b"[[1]]", b"\xff\xfe", b"[" * 100_000, b"9" * 9999],
)
def test_what_is_no_list_of_rules_reserves_nothing(data):
    assert not reserves(data, "/a")


def test_a_byte_order_mark_is_passed_over():
    assert reserves(b"\xef\xbb\xbf" + json.dumps([rule("/")]).encode(), "/a")


def test_a_list_that_is_too_long_to_be_read_reserves_everything_and_a_long_page_nothing():
    assert reserves([rule("/x")] * (MAX_RULES + 1), "/a")
    assert reserves(b"[ {".ljust(MAX_TDMREP_BYTES), "/a")
    assert not reserves(b"<html>".ljust(MAX_TDMREP_BYTES), "/a")
