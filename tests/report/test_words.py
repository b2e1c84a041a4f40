from pathlib import Path

import pytest

from curation import schema
from curation.crawl.links import LINK_REASONS
from curation.report.words import counted, plain, reason_text, share, size, took


@pytest.mark.parametrize("reason", sorted(LINK_REASONS | schema.IMAGE_REASONS | schema.REASONS.keys()))
def test_every_reason_has_a_meaning(reason: str) -> None:
    assert reason_text(reason)


def test_http_reasons_are_spelled_out() -> None:
    assert reason_text("http_404") == "the server answered 404 Not Found"
    assert reason_text("http_799") == "the server answered 799"
    assert reason_text("http_<b>") == ""
    assert reason_text("nonsense") == ""


def test_text_from_data_cannot_steer_a_terminal() -> None:
    assert plain("a\x1b[2Jb\u202ec\nd\ud800") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd"
    assert plain("x" * 500, 10) == "xxxxxxxxx…"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(1234), "1.2 kB"),
        (size(999_999), "1.0 MB"),
        (size(340_000_000), "340 MB"),
        (took(0.04), "0.0 s"),
        (took(61), "61 s"),
        (took(600), "10 min"),
        (took(10_000), "2.8 h"),
        (share(0, 0), "–"),
        (share(0, 9), "0 %"),
        (share(9, 9), "100 %"),
        (share(1, 5000), "< 0.1 %"),
        (share(4999, 5000), "> 99.9 %"),
        (share(1, 3), "33.3 %"),
        (counted(1, "row"), "1 row"),
        (counted(1234, "row"), "1,234 rows"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_every_reason_of_a_link_is_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "outcomes.md").read_text(encoding="utf-8")

    assert {reason for reason in LINK_REASONS | schema.IMAGE_REASONS if f"`{reason}`" not in text} == set()
