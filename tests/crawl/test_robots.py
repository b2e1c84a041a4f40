import pytest

from curation.crawl.robots import parse_rules, product_token
from curation.errors import LinkError


def test_the_first_word_of_the_user_agent_is_its_name():
    assert product_token("curation/0.1 (+https://example.com; research)") == "curation"
    assert product_token("my-bot (x)") == "my-bot"


def test_the_group_that_names_the_crawler_wins():
    rules = parse_rules("User-agent: *\nDisallow: /\nUser-agent: Curation\nDisallow: /private\n")

    assert rules.can_fetch("https://example.com/a.jpg", "curation")
    assert not rules.can_fetch("https://example.com/private/a.jpg", "curation")


def test_rules_built_to_take_forever_are_refused():
    text = "User-agent: a\n" * 10_000 + "Disallow: /x\n" * 10_000

    with pytest.raises(LinkError) as refused:
        parse_rules(text)

    assert refused.value.reason == "robots"
