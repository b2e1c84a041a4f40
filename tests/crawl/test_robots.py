import pytest

from curation.crawl.robots import MAX_WILDCARD_RULES, parse_rules, product_token
from curation.crawl.urls import parse
from curation.errors import LinkError


def allows(text, path, agent="curation"):
    return parse_rules(text, agent).allows(parse(f"https://example.com{path}"))


def test_the_first_word_of_the_user_agent_is_its_name_or_the_one_that_says_what_it_is():
    assert product_token("Mozilla/5.0 (compatible; my-bot/2.1; +https://example.com)") == "my-bot"
    assert product_token("Mozilla/5.0 (compatible;)") == "Mozilla"
    assert product_token("") == product_token(" ").strip() == ""
    assert product_token("curation/0.1 (+https://example.com; research)") == "curation"
    assert product_token("my-bot (x)") == "my-bot"


@pytest.mark.parametrize(
    "text",
    [
        "User-agent: *\nDisallow: /\nUser-agent: Curation\nDisallow: /private\n",
        "User-agent: curation crawler\nDisallow: /private",
        "\ufffdUser-agent: *\nDisallow: /private",
        "\ufeffuser-AGENT:curation\ndisallow:/private",
        "User-agent: other\rUser-agent: curation\rDisallow: /private\r",
        "User-agent: curation/2.0 # a crawler\n\n\nDisallow: /private # not this\n",
        "User-agent: curation\nAllow: /open\nUser-agent: x\nDisallow: /\nUser-agent: CURATION\nDisallow: /private\n",
        "User-agent: curation\nSitemap: https://example.com/s.xml\nHost: x\nUser-agent: y\nDisallow: /private\n",
        "User-agent: curation\nCrawl-delay: 5\nUser-agent: y\nDisallow: /private\n",
        "Disallow: /\nUser-agent: *\nDisallow: /private\n",
        "User-agent: cur\nDisallow: /\nUser-agent: *\nDisallow: /private\n",
        "User-agent: curations\nUser-agent: mycuration\nDisallow: /\nUser-agent: *\nDisallow: /private\n",
        "User agent: curation\nDissallow: /private\n",
        "User-agent: *\nDisallow: /a*e\nAllow: /a\nDisallow: /*ate\n",
    ],
)
def test_the_rules_of_all_groups_that_name_the_crawler_count_or_those_of_all(text):
    assert not allows(text, "/private/a.jpg")
    assert allows(text, "/public/a.jpg")


@pytest.mark.parametrize(
    ("rules", "allowed", "refused"),
    [
        ("Disallow:", ["/", "/a"], []),
        ("Disallow: /\nAllow: /$", ["/"], ["/a"]),
        ("Allow: /page/\nDisallow: /page/disallowed.gif", ["/page/"], ["/page/disallowed.gif"]),
        ("Allow: /page\nDisallow: /page", ["/page"], []),
        ("Disallow: /fish*.php", ["/Fish.php", "/fish"], ["/fish.php", "/fishheads/catfish.php?p=1"]),
        ("Disallow: /*.php$", ["/a.php?x", "/a.php5"], ["/a.php", "/b/c.php"]),
        ("Disallow: /x/page.html\nAllow: /x/", ["/x/a"], ["/x/page.html"]),
        ("Disallow: /x\nAllow: /x/", ["/x/", "/x/y"], ["/x"]),
        ("Allow: /page\nDisallow: /*.html", ["/page"], ["/page.html"]),
        ("Allow: /x/page.\nDisallow: /*.html", ["/x/page.html"], ["/x/y.html"]),
        ("Disallow: /foo/quz#qux\nAllow: /", ["/foo/bar"], ["/foo/quz"]),
        ("Disallow: /foo/bar$\nAllow: /foo/bar/qux", ["/foo/bar/baz"], ["/foo/bar"]),
        ("Disallow: /a?b=*&c", ["/a?b=1"], ["/a?b=1&c"]),
        ("Disallow: /foo/bar/%E3%83%84", [], ["/foo/bar/ツ", "/foo/bar/%e3%83%84"]),
        ("Disallow: /foo/bar/%62%61%7A", [], ["/foo/bar/baz"]),
        ("Disallow: /a%2Fb", ["/a/b"], ["/a%2fb"]),
        ("Disallow: /path/file-with-a-%2A.html", ["/path/file-with-a-x.html"], ["/path/file-with-a-*.html"]),
        ("Disallow: *", [], ["/", "/a"]),
        ("Disallow: /", ["/robots.txt"], ["/a"]),
        ("nonsense\nDisallow /x\n<html>", ["/y"], ["/x"]),
    ],
)  # fmt: skip
def test_the_longest_rule_that_matches_decides(rules, allowed, refused):
    text = f"User-agent: *\n{rules}\n"

    assert [path for path in allowed if not allows(text, path)] == []
    assert [path for path in refused if allows(text, path)] == []


def test_a_group_without_rules_allows_everything_to_those_it_names():
    assert allows("User-agent: *\nDisallow: /\n\nUser-agent: curation\n", "/a")


@pytest.mark.parametrize(("value", "seconds"), [("2.5", 2.5), ("0", 0), ("-1", 0), ("soon", 0), ("inf", 0), ("nan", 0)])
def test_the_crawl_delay_of_our_group_is_known(value, seconds):
    text = f"User-agent: *\nCrawl-delay: 9\nUser-agent: curation\nCrawl-delay: {value}\nDisallow: /x\n"

    assert parse_rules(text, "curation").crawl_delay_s == seconds


def wildcards(number):
    return "".join(f"Disallow: /*ab{n}\n" for n in range(number))


def test_a_long_url_that_many_wildcards_would_be_tried_on_is_refused():
    text = "User-agent: *\n" + wildcards(MAX_WILDCARD_RULES)

    assert allows(text, "/" + "a" * 400)
    assert not allows(text, "/" + "a" * 8000)


def test_agents_in_a_row_cost_nothing_and_rules_built_to_take_forever_are_refused():
    rules = "".join(f"Disallow: /x{number}\n" for number in range(10_000))
    many = parse_rules("User-agent: a\n" * 10_000 + "User-agent: curation\n" + rules, "curation")
    assert many.num_rules == 10_000

    with pytest.raises(LinkError) as refused:
        parse_rules("User-agent: *\n" + wildcards(MAX_WILDCARD_RULES + 1), "curation")

    assert refused.value.reason == "robots"
