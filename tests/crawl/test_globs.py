import fnmatch
import random
import re
import time

from curation.crawl.globs import Glob, comparable, path_glob
from curation.crawl.urls import parse


def test_globs_match_as_a_regular_expression_does():
    rng = random.Random(0)
    for _ in range(3000):
        pattern = "".join(rng.choice("ab*") for _ in range(rng.randrange(7)))
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(9)))

        expected = re.fullmatch(fnmatch.translate(pattern), text) is not None

        assert Glob(pattern).matches(text) == expected, (pattern, text)


def test_a_pattern_built_to_backtrack_takes_linear_time():
    started = time.monotonic()

    assert not Glob("*a" * 2000 + "*b").matches("a" * 8000)
    assert not Glob("*ab" * 2000).matches("a" * 8000)
    assert time.monotonic() - started < 0.5


def test_path_patterns_are_prefixes_unless_they_end_with_a_dollar():
    assert path_glob("/a").matches("/abc")
    assert path_glob("/a$").matches("/a")
    assert not path_glob("/a$").matches("/ab")
    assert path_glob("/*.jpg$").matches("/x.jpg")


def test_spellings_of_one_path_compare_equal():
    assert comparable("/%61%7e%2f%c3%a4") == comparable("/a~%2F%C3%A4") == comparable("/a~%2fä")
    assert comparable("/%2a%24%zz%") == "/%2A%24%zz%"
    assert comparable("\ud800") == "?"


def test_what_urls_never_hold_as_it_is_compares_equal_to_how_they_hold_it():
    raw = """/a b"<c>`{d}^?e f"<g>'{h}^`"""

    assert path_glob(raw + "$").matches(comparable(parse("https://a.example" + raw).path_and_query))
