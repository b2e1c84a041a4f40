"""Inputs that grow: only links that are not there yet are fetched, into new shards."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.errors import InputError, UsageError
from curation.pipelines.driver import Noted, Request, Warned
from curation.pipelines.process_runner import ProcessRunner
from curation.store import Run

EXTEND = Request("fetch", extend=True)


def committed(run):
    """Bytes of every data file of crawl and fetch, by name."""
    return {path: path.read_bytes() for step in ("crawl", "fetch") for path in (Path(run) / "pool" / step).iterdir()}


def urls_of(run):
    store = Run(run)
    return [
        url
        for shard in store.markers("pool", "crawl")
        for url in store.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
    ]


def messages(events, kind):
    return [event.message for event in events if isinstance(event, kind)]


@pytest.fixture
def first(flaky_site, images, bring, tmp_path):
    """A run of the first 20 of 40 links, which are in a file: (run, settings, paths of all, the file)."""
    paths = flaky_site.add(images / "pool")[:40]
    lines = tmp_path / "first.txt"
    lines.write_text("\n".join(flaky_site.url + path for path in paths[:20]) + "\n")
    tree = flaky_site.tree([], rows=8)
    tree["pool"] = {"inputs": [{"kind": "urls", "path": str(lines)}]}
    bring(tmp_path / "run", tree, Request("fetch"))
    flaky_site.hits.clear()
    return tmp_path / "run", tree, paths, lines


def test_a_later_list_fetches_only_what_is_new_and_leaves_old_shards_alone(first, flaky_site, bring, tmp_path):
    run, tree, paths, _ = first
    (tmp_path / "later.txt").write_text("\n".join(flaky_site.url + path for path in paths[10:]))
    tree["pool"]["inputs"].append({"kind": "urls", "path": str(tmp_path / "later.txt")})
    before = committed(run)

    events = bring(run, tree, Request("fetch"))

    assert set(flaky_site.hits) == set(paths[20:])
    assert set(flaky_site.hits.values()) == {1}
    assert before.items() <= committed(run).items()
    assert sorted(urls_of(run)) == sorted(flaky_site.url + path for path in paths)
    assert messages(events, Noted) == ["pool: 20 new links"]
    assert not messages(events, Warned)
    assert Run(run).artefact_marker("crawl.pool").skipped == {"known": 10}


def test_a_list_that_has_grown_in_place_is_read_again_when_asked(first, flaky_site, bring):
    run, tree, paths, lines = first
    lines.write_text("\n".join(flaky_site.url + path for path in reversed(paths)))

    bring(run, tree, Request("fetch"))
    assert not flaky_site.hits
    bring(run, tree, EXTEND)

    assert set(flaky_site.hits) == set(paths[20:])
    flaky_site.hits.clear()
    assert messages(bring(run, tree, EXTEND), Noted) == ["pool: 0 new links"]
    assert not flaky_site.hits


def test_an_input_that_was_read_is_not_read_again_for_another(first, flaky_site, bring, tmp_path):
    run, tree, paths, lines = first
    lines.unlink()
    (tmp_path / "later.txt").write_text("\n".join(flaky_site.url + path for path in paths[30:]))
    tree["pool"]["inputs"].insert(0, {"kind": "urls", "path": str(tmp_path / "later.txt")})

    bring(run, tree, Request("fetch"))

    assert set(flaky_site.hits) == set(paths[30:])
    with pytest.raises(InputError, match="does not exist"):
        bring(run, tree, EXTEND)


def test_other_inputs_in_place_of_those_that_were_read_are_left_to_a_choice(first, flaky_site, bring, tmp_path):
    run, tree, paths, _ = first
    (tmp_path / "other.txt").write_text(flaky_site.url + paths[25])
    tree["pool"]["inputs"] = [{"kind": "urls", "path": str(tmp_path / "other.txt")}]

    (warning,) = messages(bring(run, tree, Request("fetch")), Warned)

    assert "`--extend` adds the links that are new, `--redo crawl` makes them again" in warning
    assert not flaky_site.hits
    assert not messages(bring(run, tree, EXTEND), Warned)
    assert set(flaky_site.hits) == {paths[25]}
    assert len(urls_of(run)) == 21


def test_what_is_found_again_after_a_kill_is_added_once(first, flaky_site, bring, tmp_path):
    run, tree, paths, lines = first
    lines.write_text("\n".join(flaky_site.url + path for path in paths))
    crawled = run / "artefacts" / "crawl.pool.json"
    before = crawled.read_bytes()
    bring(run, tree, EXTEND)
    crawled.write_bytes(before)  # as if it had been killed before it counted the new shards

    bring(run, tree, EXTEND)

    assert sorted(urls_of(run)) == sorted(flaky_site.url + path for path in paths)


def test_links_that_failed_can_be_tried_again_beside_new_ones(first, flaky_site, bring, tmp_path):
    run, tree, paths, lines = first
    flaky_site.failing = {paths[20]: 502}
    lines.write_text("\n".join(flaky_site.url + path for path in paths[:21]))
    bring(run, tree, EXTEND)
    flaky_site.failing = {}
    flaky_site.hits.clear()
    lines.write_text("\n".join(flaky_site.url + path for path in paths[:22]))

    bring(run, tree, Request("fetch", extend=True, retry=("all",)))

    assert set(flaky_site.hits) == set(paths[20:22])


def test_only_refuses_inputs_that_nobody_has_read(first, flaky_site, bring, tmp_path):
    run, tree, paths, _ = first
    (tmp_path / "later.txt").write_text(flaky_site.url + paths[30])
    tree["pool"]["inputs"].append({"kind": "urls", "path": str(tmp_path / "later.txt")})

    with pytest.raises(UsageError, match="--only pca_hash: inputs were added"):
        bring(run, tree, Request("pca_hash", only=True))


@pytest.mark.slow
def test_a_run_that_grew_before_it_was_curated_says_the_same_as_one_that_had_all_at_once(
    first, flaky_site, bring, digest, tmp_path
):
    run, tree, paths, lines = first
    lines.write_text("\n".join(flaky_site.url + path for path in paths))
    bring(run, tree, EXTEND)

    bring(run, tree)
    bring(tmp_path / "at once", tree)

    assert digest(run) == digest(tmp_path / "at once")
    funnels = [json.loads((folder / "manifest.json").read_text())["funnel"] for folder in (run, tmp_path / "at once")]
    assert funnels[0] == funnels[1]
    assert pq.read_table(run / "manifest.parquet").num_rows > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_runs_grow_on_any_runner(kind, flaky_site, images, bring, tmp_path, request):
    paths = flaky_site.add(images / "pool")[:12]
    tree = flaky_site.tree(paths[:8], rows=4)
    bad = flaky_site.images[paths[3]]
    (tmp_path / "hashes.txt").write_text(hashlib.sha256(bad).hexdigest())
    tree["fetch"]["blocked_hashes"] = [str(tmp_path / "hashes.txt")]
    runner = request.getfixturevalue("ray_runner") if kind == "ray" else ProcessRunner(2)
    flaky_site.failing = dict.fromkeys(paths[2:5], 502)
    bring(tmp_path / "run", tree, Request("fetch"), runner)
    flaky_site.failing = {}
    tree["pool"]["inputs"].append({"kind": "urls", "urls": [flaky_site.url + path for path in paths]})

    bring(tmp_path / "run", tree, Request("fetch", retry=("all",)), runner)

    if kind == "processes":
        runner.close()
    # The link of the listed image is not kept: found again, it is as new, and recognised again.
    assert flaky_site.hits == dict.fromkeys(paths, 1) | dict.fromkeys(paths[2:5], 2) | {paths[3]: 3}
    assert sorted(filter(None, urls_of(tmp_path / "run"))) == sorted(
        flaky_site.url + path for path in [*paths, paths[2], paths[4]] if path != paths[3]
    )
