"""Links that failed are tried again in new shards; what was committed stays, and every link counts once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from curation import schema
from curation.cli import main
from curation.config import RunConfig
from curation.errors import CorruptError, UsageError
from curation.pipelines.context import Context
from curation.pipelines.driver import Noted, Request
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.overview import overview
from curation.settings import parse
from curation.store import Run

RETRY = Request("fetch", retry=("http_5xx",))


def committed(run, shards=range(1000)):
    """Bytes of every file of crawl and fetch, by name, of some shards."""
    files = [path for step in ("crawl", "fetch", "raw") for path in (Path(run) / "pool" / step).iterdir()]
    return {path: path.read_bytes() for path in files if int(path.name[:8]) in shards}


def outcomes(run):
    """Reason of each row by path of its URL, newest last."""
    store, found = Run(run), {}
    for shard in store.markers("pool", "fetch"):
        urls = store.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
        reasons = store.read_table("pool", "fetch", shard, ["reject_reason"]).column(0).to_pylist()
        for url, why in zip(urls, reasons, strict=True):
            found.setdefault("/" + url.rpartition("/")[2], []).append(why)
    return found


def pool_of(run, tree):
    config = parse(RunConfig, tree, "test.yaml")
    return overview(Context(Run(run), config), build_plan(config)).collections[0]


def notes(events):
    return [event.message for event in events if isinstance(event, Noted)]


@pytest.fixture
def half_failed(flaky_site, images, bring, tmp_path):
    """A run of 48 links in 4 shards, of which 11 failed with a 502, one with a 500 and one with a 404."""
    paths = flaky_site.add(images / "pool")[:48]
    flaky_site.failing = dict.fromkeys(paths[5:27:2], 502) | {paths[0]: 500, paths[1]: 404}
    tree = flaky_site.tree(paths, rows=12)
    bring(tmp_path / "run", tree, Request("fetch"))
    return tmp_path / "run", tree


def test_only_the_links_that_failed_so_are_asked_for_again_and_old_shards_keep_their_bytes(
    half_failed, flaky_site, bring
):
    run, tree = half_failed
    before = committed(run)
    flaky_site.hits.clear()
    failed = {path for path, status in flaky_site.failing.items() if status >= 500}
    flaky_site.failing = {}

    bring(run, tree, RETRY)

    assert set(flaky_site.hits) == failed
    assert set(flaky_site.hits.values()) == {1}
    assert committed(run, range(4)) == before
    assert {path: found for path, found in outcomes(run).items() if len(found) > 1}.keys() == failed


def test_a_link_counts_once_as_what_became_of_it_in_the_end(half_failed, flaky_site, bring):
    run, tree = half_failed
    flaky_site.failing = dict.fromkeys(list(flaky_site.failing)[:2], 502)

    bring(run, tree, RETRY)

    pool = pool_of(run, tree)
    assert (pool.num_rows, pool.fetch.num_rows) == (48, 48)
    assert (pool.fetch.num_retried, pool.fetch.num_recovered) == (12, 10)
    assert pool.fetch.rejected["http_502"] == 2
    assert pool.fetch.rejected["http_404"] == 1
    assert "http_500" not in pool.fetch.rejected
    crawl, fetch = pool.funnel
    assert (crawl.num_in, fetch.num_in, fetch.num_out) == (48, 48, pool.fetch.num_kept)
    assert fetch.rejected == pool.fetch.rejected
    (host,) = pool.fetch.failing
    assert (host.num_rows, host.num_failed, host.rejected) == (48, 48 - fetch.num_out, fetch.rejected)


@pytest.mark.slow
def test_a_run_says_the_same_whether_links_came_at_once_or_on_the_third_try(
    flaky_site, images, bring, digest, tmp_path
):
    paths = flaky_site.add(images / "pool")[:24]
    run, tree = tmp_path / "run", flaky_site.tree(paths, rows=10)
    flaky_site.failing = dict.fromkeys(paths[:9], 502) | {paths[9]: 404}
    bring(run, tree, Request("fetch"))
    flaky_site.failing = dict.fromkeys(paths[:4], 502) | {paths[9]: 404}
    bring(run, tree, RETRY)
    flaky_site.failing = {}
    bring(run, tree, Request("fetch", retry=("http_502",)))

    bring(run, tree, Request(retry=("http_404",)))
    bring(tmp_path / "at once", tree)

    assert digest(run) == digest(tmp_path / "at once")
    summaries = [json.loads(Run(each).read_bytes("manifest.json")) for each in (run, tmp_path / "at once")]
    assert summaries[0]["funnel"] == summaries[1]["funnel"]


def test_nothing_to_try_again_is_said_and_adds_nothing(half_failed, flaky_site, bring):
    run, tree = half_failed
    flaky_site.failing = {}
    bring(run, tree, RETRY)
    before = committed(run)

    events = bring(run, tree, RETRY)

    assert notes(events) == ["pool: nothing to try again: no link failed for http_5xx"]
    assert committed(run) == before


def test_an_interrupted_retry_is_finished_by_the_same_command_and_not_begun_again(half_failed, flaky_site, bring):
    run, tree = half_failed
    tree["shards"]["rows"] = 4
    bring(run, tree, RETRY)
    (run / "pool" / "fetch" / "00000005.json").unlink()  # as if it had been killed before its last shards
    (run / "pool" / "fetch" / "00000006.json").unlink()
    flaky_site.failing, shards = {}, set(Run(run).markers("pool", "crawl"))
    flaky_site.hits.clear()

    events = bring(run, tree, RETRY)

    assert set(Run(run).markers("pool", "fetch")) == shards == set(range(7))
    assert sum(flaky_site.hits.values()) == 8
    assert "had not come to its end" in notes(events)[0]


@pytest.mark.slow
def test_a_retry_that_is_killed_fetches_only_unfinished_shards_again(half_failed, flaky_site, tmp_path):
    run, tree = half_failed
    tree["shards"]["rows"] = 4
    tree["fetch"]["host_concurrency"] = 1
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = ["run", "--config", str(tmp_path / "c.yaml"), "--run", str(run), "--stage", "fetch", "--workers", "1"]
    flaky_site.failing, flaky_site.delay_s = {}, 0.2
    flaky_site.hits.clear()
    shell = [sys.executable, "-m", "curation.cli", *command, "--retry", "http_5xx"]
    process = subprocess.Popen(shell, stderr=subprocess.PIPE)
    first = run / "pool" / "fetch" / "00000004.json"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert first.exists()
    urls = Run(run).read_table("pool", "crawl", 4, ["url"]).column(0).to_pylist()
    time.sleep(0.5)  # what was asked for is answered
    flaky_site.delay_s = 0.0

    assert subprocess.run(shell, stderr=subprocess.PIPE).returncode == 0

    assert {flaky_site.hits[url.removeprefix(flaky_site.url)] for url in urls} == {1}
    assert max(flaky_site.hits.values()) <= 2
    assert set(Run(run).markers("pool", "fetch")) == set(range(7))
    twice = sorted(found[0] for found in outcomes(run).values() if found[1:] == [None])
    assert twice == ["http_500", *["http_502"] * 11]


def test_new_shards_that_nobody_counts_yet_are_as_if_they_were_not_there(half_failed, bring):
    run, tree = half_failed
    crawled = run / "artefacts" / "crawl.pool.json"
    before = crawled.read_bytes()
    bring(run, tree, RETRY)
    crawled.write_bytes(before)  # as if it had been killed before the last thing that it wrote

    bring(run, tree, Request("fetch"))

    assert set(Run(run).markers("pool", "fetch")) == set(range(4))
    assert not (run / "pool" / "retry" / "00000004.json").exists()


def test_fetching_everything_anew_leaves_links_to_the_shards_that_tried_them_last(half_failed, flaky_site, bring):
    run, tree = half_failed
    flaky_site.failing = {}
    bring(run, tree, RETRY)
    flaky_site.hits.clear()

    bring(run, tree, Request("fetch", redo=frozenset({"fetch"})))

    assert set(flaky_site.hits.values()) == {1}
    assert len(flaky_site.hits) == 48
    pool = pool_of(run, tree)
    assert pool.fetch.num_rows == 48
    assert "http_502" not in pool.fetch.rejected


def test_a_host_lies_in_no_more_new_shards_than_it_says(half_failed, bring):
    run, tree = half_failed

    bring(run, tree, RETRY)

    table = Run(run).read_table("pool", "crawl", 4)
    assert set(table.column("host_shards").to_pylist()) <= {None, 1}
    assert table.schema == schema.CRAWL.schema


def test_lost_knowledge_of_what_was_tried_again_is_an_error(half_failed, bring):
    run, tree = half_failed
    bring(run, tree, RETRY)
    next((run / "pool" / "retry").glob("*.parquet")).unlink()

    with pytest.raises(CorruptError, match="--redo crawl"):
        bring(run, tree, RETRY)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("fetch", retry=("nosuch",)), "--retry nosuch: is no reason"),
        (Request("fetch", retry=("blocklisted",)), "is no reason"),
        (Request("crawl", retry=("all",)), "ends before fetch"),
        (Request("nsfw", only=True, retry=("all",)), "leave out --only"),
        (Request("fetch", retry=("all",), redo=frozenset({"fetch"})), "choose one of them"),
    ],
)
def test_what_cannot_be_retried_is_refused(bring, tree, request_, message):
    with pytest.raises(UsageError, match=message):
        bring("memory://refused", tree(), request_)


def test_the_command_line_retries_families_and_says_what_it_does(half_failed, flaky_site, tmp_path, capfd):
    run, tree = half_failed
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = [
        "run",
        "--config",
        str(tmp_path / "c.yaml"),
        "--run",
        str(run),
        "--stage",
        "fetch",
        "--runner",
        "threads",
    ]

    assert main([*command, "--retry", "timeout,http_4xx"]) == 0

    assert "1 links are tried again (http_404 1)" in capfd.readouterr().err
    assert main(["status", "--run", str(run)]) == 0
    said = capfd.readouterr().out
    assert "tried again: 1, of which 0 became images" in said
    assert "http_502" in said
    assert "127.0.0.1" in said
