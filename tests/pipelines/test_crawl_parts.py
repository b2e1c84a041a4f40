"""A crawl in parts gives the same shards whoever reads them, and goes on with the parts that are left."""

from collections import Counter

import pytest

from curation.config import RunConfig
from curation.errors import CorruptError
from curation.pipelines import ingest
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, bring_up
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.process_runner import ProcessRunner
from curation.settings import parse
from curation.store import Run

NUM_LISTS = 6


@pytest.fixture
def tree(tmp_path):
    """Settings: lists that repeat each other's URLs, saved pages, and images of a folder."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "images").mkdir()
    for number in range(NUM_LISTS):
        urls = [f"https://h{n % 5}.example/{n}.jpg" for n in range(number * 20, number * 20 + 40)]
        (tmp_path / f"list{number}.txt").write_text("\n".join([*urls, "nonsense"]))
    for number in range(3):
        html = f"<meta name=robots content=noai><img src=/{number}.jpg><img src=https://h0.example/0.jpg>"
        (tmp_path / "pages" / f"{number}.html").write_text(html)
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"x")
    inputs = [
        {"kind": "urls", "path": str(tmp_path / "list*.txt")},
        {"kind": "html", "path": str(tmp_path / "pages"), "base_url": "https://pages.example/"},
        {"kind": "folder", "path": str(tmp_path / "images")},
    ]
    return {"pool": {"inputs": inputs}, "shards": {"rows": 30}}


def crawl(url, tree, runner, should_stop=lambda: False):
    config = parse(RunConfig, tree, "test.yaml")
    context = Context(Run(url), config, should_stop)
    bring_up(context, build_plan(config), Request("crawl"), runner)


def shards(url):
    run = Run(url)
    marker = run.artefact_marker("crawl.pool")
    tables = [run.read_table("pool", "crawl", shard).to_pylist() for shard in run.markers("pool", "crawl")]
    return marker.digest, marker.skipped, tables


def check(found, tmp_path):
    _, skipped, tables = found
    rows = {row["url"]: row for table in tables for row in table}
    assert len(rows) == sum(map(len, tables)) == 140 + 3 + 3
    assert skipped == {"bad_url": NUM_LISTS}
    assert rows["https://h0.example/0.jpg"]["page_urls"] == [f"https://pages.example/{n}.html" for n in range(3)]
    assert rows["https://h0.example/0.jpg"]["opt_out"] == "opt_out_noai"
    locals_ = [row["url"] for table in tables for row in table if row["source_kind"] == "file"]
    assert locals_ == [f"file://{tmp_path}/images/{n}.jpg" for n in range(3)]
    where = {(row["url"].split("/")[2], shard) for shard, table in enumerate(tables) for row in table}
    spread = Counter(host for host, _ in where if host)
    assert all(row["host_shards"] >= spread[row["url"].split("/")[2]] for row in rows.values() if row["host_shards"])


def test_shards_are_the_same_for_any_number_of_workers_and_any_runner(tree, tmp_path, ray_runner):
    crawl(tmp_path / "one", tree, LocalRunner(1))
    crawl(tmp_path / "four", tree, LocalRunner(4))
    runner = ProcessRunner(2)
    try:
        crawl(tmp_path / "processes", tree, runner)
    finally:
        runner.close()
    crawl("memory://crawl-parts", tree, LocalRunner(2))
    crawl(tmp_path / "ray", tree, ray_runner)

    found = shards(tmp_path / "one")
    check(found, tmp_path)
    urls = (tmp_path / "four", tmp_path / "processes", tmp_path / "ray", "memory://crawl-parts")
    assert all(shards(url) == found for url in urls)
    assert not (tmp_path / "one" / "work" / "crawl" / "pool").exists()


def test_a_crawl_that_was_stopped_reads_only_the_parts_that_are_left(tree, tmp_path, monkeypatch):
    read, real = Counter(), ingest.read_part

    def counted(part, *rest):
        read[part.files] += 1
        return real(part, *rest)

    monkeypatch.setattr(ingest, "read_part", counted)
    with pytest.raises(KeyboardInterrupt):
        crawl(tmp_path / "run", tree, LocalRunner(1), should_stop=lambda: len(read) >= 4)
    (tmp_path / "run" / "work" / "crawl" / "pool" / "cut-short.arrow").write_bytes(b"x")
    before = dict(read)
    crawl(tmp_path / "run", tree, LocalRunner(1))

    assert 3 <= len(before) < NUM_LISTS
    assert sum(read.values()) <= NUM_LISTS + 2 + 1  # all parts once, and the one that was at work
    crawl(tmp_path / "whole", tree, LocalRunner(2))
    assert shards(tmp_path / "run") == shards(tmp_path / "whole")


def test_inputs_that_changed_since_the_crawl_was_stopped_are_read_anew(tree, tmp_path, monkeypatch):
    stopped = []
    real = ingest.cut

    def stop(*arguments):
        stopped.append(True)
        raise InterruptedError

    monkeypatch.setattr(ingest, "cut", stop)
    with pytest.raises(KeyboardInterrupt):
        crawl(tmp_path / "run", tree, LocalRunner(2), should_stop=lambda: bool(stopped))
    monkeypatch.setattr(ingest, "cut", real)
    (tmp_path / "list9.txt").write_text("https://new.example/x.jpg")
    crawl(tmp_path / "run", tree, LocalRunner(2))

    _, _, tables = shards(tmp_path / "run")
    assert "https://new.example/x.jpg" in {row["url"] for table in tables for row in table}


def test_damage_of_what_was_read_is_said_and_the_next_run_reads_it_again(tree, tmp_path, monkeypatch):
    real = ingest.cut

    def damage(*arguments):
        for path in (tmp_path / "run" / "work" / "crawl").rglob("*.arrow"):
            path.write_bytes(path.read_bytes()[:-40] + b"x" * 40)
        return real(*arguments)

    monkeypatch.setattr(ingest, "cut", damage)
    with pytest.raises(CorruptError, match="part 0 of the crawl is damaged; run again"):
        crawl(tmp_path / "run", tree, LocalRunner(2))
    monkeypatch.setattr(ingest, "cut", real)
    crawl(tmp_path / "run", tree, LocalRunner(2))

    check(shards(tmp_path / "run"), tmp_path)
