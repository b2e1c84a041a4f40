import re
from dataclasses import replace
from html.parser import HTMLParser

from curation.report.data import (
    Cluster,
    Clusters,
    Component,
    Components,
    EmbeddingMap,
    Member,
    ReportData,
    SeedRow,
    SizeBin,
    WeightsUse,
)
from curation.report.html import render
from curation.report.markup import Markup, element, text
from curation.report.overview import (
    CollectionOverview,
    DriftOverview,
    FetchOverview,
    FunnelEntry,
    HostOverview,
    ManifestOverview,
    Overview,
    StageOverview,
    StepOverview,
)

ATTACK = "</style><script>alert('x')</script>\"&\x00"


def report(attack: str = "plain") -> ReportData:
    """Everything filled in, with ``attack`` wherever text comes from data or settings."""
    pool = CollectionOverview(
        "pool",
        True,
        2,
        1000,
        {attack: 3},
        (FunnelEntry("crawl", 1000, 1000), FunnelEntry("fetch", 1000, 900, {attack: 99, "timeout": 1})),
        FetchOverview(1000, 900, {attack: 99}, (HostOverview(attack, 500, 7),), exact_hosts=False),
    )
    step = StepOverview("fetch", "fetch", 1, 1, 0, 2, (attack,), False, 1000, 4.0, attack)
    overview = Overview(
        attack, "1.0", (StageOverview("fetch", (step,)),), (pool,), ManifestOverview(attack, 12, attack, current=False)
    )
    overview = replace(overview, drift=DriftOverview(False, 500, 80, 0.5, 0.6, 0.2, 0.1))
    member = Member(attack, attack, attack, attack, 0.7, b"\xff\xd8")
    return ReportData(
        attack,
        overview,
        f"seed: {attack}",
        (attack,),
        (WeightsUse(attack, ("nsfw",), attack, attack),),
        (SeedRow(attack, "sample, k = 4", 10, 40, 39, 12),),
        Components(7, (SizeBin(2, 2, 3, 6),), (Component(attack, 30, (member,)),)),
        0.6,
        Clusters(9, 2, (SizeBin(1, 1, 3, 3),), (Cluster(4, 30, ((attack, 2),), (member,), (member,)),), ()),
        EmbeddingMap(b"\x89PNG", ((attack, 7, "#d55e00"),), 0.25),
    )


class Elements(HTMLParser):
    """Collects tags and attributes, and checks that elements nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_from_data_becomes_markup() -> None:
    hostile, harmless = Elements(render(report(ATTACK))), Elements(render(report()))

    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert "script" not in hostile.tags
    assert hostile.open == []


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = render(report())

    assert not re.search(r"https?://|url\(|@import|<link|<script|<iframe", page)
    assert "default-src" in page


def test_reasons_come_with_their_meaning() -> None:
    assert "the deadline fetch.timeout_s passed" in render(report())


def test_a_page_says_what_is_outdated_incomplete_and_missing() -> None:
    page = render(report())
    bare = render(replace(report(), components=None, seeds=(), clusters=None, embedding_map=None))

    assert "The manifest is outdated" in page
    assert "lower bounds" in page
    assert "and 29 more" in page
    assert "The dedup stage is not finished" in bare
    assert "Seed sets" not in bare
    assert "The cluster stage is not finished" in bare


def test_clusters_come_with_their_drift_and_seeds() -> None:
    page = render(report())

    assert "9 centroids, 2 of them without an image of the pool" in page
    assert "80 of 500 images are newer than the centroids: mean similarity 0.500 (0.600 at the fit)" in page
    assert "shares of clusters moved by 0.200 (0.100 by chance)" in page
    assert "seed images: plain 2" in page
    assert "and 28 more" in page


def test_markup_is_not_escaped_twice_and_text_always_is() -> None:
    assert text(Markup("<b>")) == "<b>"
    assert element("p", "<b>", Markup("<i></i>"), 1234, title='"') == '<p title="&quot;">&lt;b&gt;<i></i>1,234</p>'
