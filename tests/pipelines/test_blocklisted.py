"""Images on a list: discarded unseen, whenever they come to be listed; nothing in the run leads to them any more."""

import hashlib
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from curation import schema
from curation.cli import main
from curation.config import RunConfig
from curation.errors import InputError, StoreError
from curation.pipelines.context import Context
from curation.pipelines.discard import UNFINISHED, discard
from curation.pipelines.driver import Request
from curation.pipelines.freshness import assess
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.units import Done
from curation.settings import parse
from curation.store import Run


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def everything(run):
    """All that a run holds, as bytes: files as they are, and tables as text."""
    found = {}
    for path in Path(run).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += json.dumps(pq.read_table(path).to_pylist(), default=repr).encode()
                data += repr(pq.read_metadata(path).metadata).encode()
            found[path.relative_to(run)] = data
    return found


def places(run, *secrets, but=("run.yaml",)):
    """Return the files of a run that hold one of some texts or bytes."""
    wanted = [secret if isinstance(secret, bytes) else secret.encode() for secret in secrets]
    return [
        str(path) for path, data in everything(run).items() if str(path) not in but and any(s in data for s in wanted)
    ]


def reasons(run, collection="pool"):
    store = Run(run)
    shards = store.markers(collection, "fetch")
    return [
        why
        for shard in shards
        for why in store.read_table(collection, "fetch", shard, ["reject_reason"]).column(0).to_pylist()
    ]


def records(run, collection="pool"):
    store = Run(run)
    tables = [store.read_table(collection, "blocklisted", shard) for shard in store.markers(collection, "blocklisted")]
    return {(row["sha256"], row["list"]) for table in tables for row in table.to_pylist()}


@pytest.fixture
def block(tmp_path):
    """``block(tree, *images)`` returns settings with a list of the images."""

    def write(tree, *images):
        path = tmp_path / "hashes.txt"
        path.write_text("".join(f"{sha256(image)}\n" for image in images))
        return {**tree, "fetch": {**tree.get("fetch", {}), "blocked_hashes": [str(path)]}}

    return write


@pytest.fixture
def listed_urls(flaky_site, images, tmp_path):
    """Settings of a run of 24 URLs in a file, in 3 shards, and the paths."""
    paths = flaky_site.add(images / "pool")[:24]
    tree = flaky_site.tree(paths, rows=8)
    (tmp_path / "urls.txt").write_text("\n".join(flaky_site.url + path for path in paths))
    tree["pool"] = {"inputs": [{"kind": "urls", "path": str(tmp_path / "urls.txt")}]}
    return tree, paths


def test_of_a_listed_image_only_hash_time_and_list_are_recorded(flaky_site, listed_urls, block, bring, tmp_path):
    tree, paths = listed_urls
    bad = [paths[3], paths[17]]
    run = tmp_path / "run"

    bring(run, block(tree, *(flaky_site.images[path] for path in bad)), Request("fetch"))

    assert reasons(run).count("blocklisted") == 2
    assert len(reasons(run)) == 24
    assert records(run) == {(sha256(flaky_site.images[path]), "hashes.txt") for path in bad}
    assert places(run, *bad, *(flaky_site.images[path][-300:-200] for path in bad)) == []
    assert places(run, sha256(flaky_site.images[bad[0]])[:32], but=()) == [
        name for name in places(run, sha256(flaky_site.images[bad[0]])) if "blocklisted" in name
    ]


def test_rows_around_a_listed_image_stay_fresh_and_are_not_fetched_again(
    flaky_site, listed_urls, block, bring, tmp_path
):
    tree, paths = listed_urls
    settings = block(tree, flaky_site.images[paths[3]])
    bring(tmp_path / "run", settings, Request("fetch"))
    flaky_site.hits.clear()

    events = bring(tmp_path / "run", settings, Request("fetch"))

    assert not any(isinstance(event, Done) for event in events)
    bring(tmp_path / "run", settings, Request("fetch", redo=frozenset({"fetch"})))
    assert paths[3] not in flaky_site.hits
    assert reasons(tmp_path / "run").count("blocklisted") == 1


def test_a_listed_image_that_does_not_decode_is_known_by_its_bytes_all_the_same(bring, block, flaky_site, tmp_path):
    flaky_site.images["/secret.jpg"] = b"no image at all"
    run = tmp_path / "run"

    bring(run, block(flaky_site.tree(["/secret.jpg", "/other.jpg"]), b"no image at all"), Request("fetch"))

    assert sorted(reasons(run)) == ["blocklisted", "http_404"]
    assert places(run, "secret") == []


def test_a_listed_file_of_a_local_set_loses_its_name_and_stays_where_it_is(bring, block, tree, images, tmp_path):
    settings, run = tree(), tmp_path / "run"
    names = {"pool": "005.jpg", "seeds": "2.jpg", "references": "1.jpg"}
    data = {kind: (images / kind / name).read_bytes() for kind, name in names.items()}

    bring(run, block(settings, *data.values()), Request("fetch"))

    for kind, name in names.items():
        assert places(run, f"{kind}/{name}") == []
        assert (images / kind / name).exists()
    for collection in ("pool", "seeds/some", "references/test"):
        assert "blocklisted" in reasons(run, collection)


def test_links_that_failed_before_are_redacted_when_a_retry_finds_them_listed(
    flaky_site, listed_urls, block, bring, tmp_path
):
    tree, paths = listed_urls
    run, settings = tmp_path / "run", block(tree, flaky_site.images[paths[3]])
    flaky_site.failing = {paths[3]: 502, paths[4]: 502}
    bring(run, settings, Request("fetch"))
    bring(run, settings, Request("fetch", retry=("http_502",)))  # fails once more
    assert places(run, paths[3]) != []
    flaky_site.failing = {}

    bring(run, settings, Request("fetch", retry=("http_502",)))

    assert places(run, paths[3]) == []
    assert places(run, paths[4]) != []
    for _ in range(2):
        assert reasons(run).count("http_502") == 4
        assert reasons(run).count("blocklisted") == 1
        bring(run, settings, Request("fetch", redo=frozenset({"fetch"})))


def test_a_link_that_a_killed_process_left_behind_is_redacted_by_the_next(
    flaky_site, listed_urls, block, bring, tmp_path, monkeypatch
):
    tree, paths = listed_urls
    run, settings = tmp_path / "run", block(tree, flaky_site.images[paths[3]])
    flaky_site.failing = {paths[3]: 502}
    bring(run, settings, Request("fetch"))
    flaky_site.failing = {}
    with monkeypatch.context() as patch:  # as if it had died before
        patch.setattr("curation.pipelines.driver.redact_retried", lambda *place: None)
        patch.setattr("curation.pipelines.upkeep.redact_all_retried", lambda *place: None)
        bring(run, settings, Request("fetch", retry=("http_502",)))
    assert places(run, paths[3]) != []

    bring(run, settings, Request("fetch"))

    assert places(run, paths[3]) == []


def test_a_broken_list_stops_a_run_before_it_asks_for_anything(flaky_site, listed_urls, bring, tmp_path):
    tree, _ = listed_urls
    (tmp_path / "hashes.txt").write_text("oops\n")
    tree["fetch"]["blocked_hashes"] = [str(tmp_path / "hashes.txt")]

    with pytest.raises(InputError, match="line 1 is no sha256"):
        bring(tmp_path / "run", tree, Request("fetch"))

    assert not flaky_site.hits


# -- listed later ---------------------------------------------------------------------------------------------------


@pytest.fixture
def listed_later(copied, tree, images, block):
    """A finished run, one of whose kept images is on a list by now: (run, settings, file, its bytes)."""
    manifest = pq.read_table(copied / "manifest.parquet").to_pylist()
    row = next(row for row in manifest if row["collection"] == "pool" and len(row["urls"]) == 1)
    path = Path(row["url"].removeprefix("file://"))
    return copied, block(tree(), path.read_bytes()), path, row


def test_an_image_that_is_listed_later_is_in_no_manifest(listed_later, bring):
    run, settings, _, row = listed_later

    bring(run, settings)

    manifest = pq.read_table(run / "manifest.parquet")
    assert row["image_id"] not in manifest.column("image_id").to_pylist()
    (entry,) = [
        e for e in json.loads((run / "manifest.json").read_text())["funnel"]["pool"] if e["stage"] == "manifest"
    ]
    assert entry["rejected"] == {"blocklisted": 1}


def test_purge_leaves_nothing_of_an_image_that_is_listed_later(listed_later, tmp_path, capsys):
    run, settings, path, row = listed_later
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    stored = Run(run).read_table("pool", "faces", 0, ["stored_id"]).column(0).to_pylist()
    offset, size = row["tar_offset"], row["stored_bytes"]
    data = (run / row["tar"]).read_bytes()[offset : offset + size]
    hashes = settings["fetch"]["blocked_hashes"]

    assert main(["report", "--run", str(run)]) == 0
    assert main(["purge", "--run", str(run), "--yes", "--set", f"fetch.blocked_hashes={json.dumps(hashes)}"]) == 0

    assert "purged 1 images" in capsys.readouterr().out
    assert places(run, f"pool/{path.name}", data[-300:-200], but=()) == []
    assert not (run / "report.html").exists()
    assert row["stored_id"] in stored
    kept = [name for name in places(run, row["image_id"], row["stored_id"], but=()) if "/blocklisted/" not in name]
    assert kept == []
    assert records(run) == {(sha256(path.read_bytes()), "hashes.txt")}
    assert reasons(run).count("blocklisted") == 1


def test_what_purge_leaves_is_fresh_and_can_be_read(listed_later, bring, block, images, tmp_path):
    run, settings, path, row = listed_later
    others = [images / "seeds" / "3.jpg", images / "references" / "0.jpg"]
    settings = block(settings, *(each.read_bytes() for each in (path, *others)))
    config = parse(RunConfig, settings, "test.yaml")
    context, plan = Context(Run(run), config), build_plan(config)
    with context.run.lease():
        assert discard(context, plan) == 3
        assert discard(context, plan) == 0
    assert places(run, "seeds/3.jpg", "references/0.jpg") == []

    looking = [step for step in plan.steps if step.kind in ("fetch", "images")]
    states = {
        (step.name, found.unit.collection): found.state for step in looking for found in assess(context, plan, step)
    }
    assert set(states.values()) <= {"done", "uncovered"}
    events = bring(run, settings)

    computed = {event.unit.step: event.num_computed for event in events if isinstance(event, Done)}
    assert not {"fetch", "pca_hash", "nsfw", "faces"} & computed.keys()
    manifest = pq.read_table(run / "manifest.parquet").to_pylist()
    for each in manifest:
        with (run / each["tar"]).open("rb") as tar:
            tar.seek(each["tar_offset"])
            assert sha256(tar.read(each["stored_bytes"]))[:32] == each["stored_id"]
    with tarfile.open(run / manifest[0]["tar"]) as tar:
        assert not [name for name in tar.getnames() if row["image_id"] in name]


def test_a_purge_that_was_killed_is_finished_before_anything_else(listed_later, bring):
    run, settings, *_ = listed_later
    (run / UNFINISHED).write_text("{}")

    with pytest.raises(StoreError, match="run it again first"):
        bring(run, settings)


def test_fetched_bytes_that_are_not_blurred_yet_go_too(flaky_site, listed_urls, block, bring, tmp_path):
    tree, paths = listed_urls
    run = tmp_path / "run"
    bring(run, tree, Request("fetch"))
    settings = block(tree, flaky_site.images[paths[5]])
    config = parse(RunConfig, settings, "test.yaml")

    with Run(run).lease():
        assert discard(Context(Run(run), config), build_plan(config)) == 1

    assert places(run, paths[5], flaky_site.images[paths[5]][-300:-200]) == []
    bring(run, settings, Request("faces"))
    assert reasons(run).count("blocklisted") == 1
    store = Run(run)
    faces = [store.read_table("pool", schema.FACES.name, shard, ["tar_offset"]).column(0) for shard in range(3)]
    assert sum(len(column) - column.null_count for column in faces) > 15
