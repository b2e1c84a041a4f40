"""A run does what is left or stale, loses nothing finished, and says in one line what stops it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import curation
from curation import lease as lease_module
from curation.config import RunConfig
from curation.errors import ConfigError, CorruptError, InputError, LeaseError, UsageError, WeightsError
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, StepStarted, Warned, bring_up, redo_cost
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.units import Done
from curation.settings import parse
from curation.stages.manifest import SUMMARY_KEY
from curation.store import Run


def worked_on(events):
    return {event.unit.step for event in events if isinstance(event, Done)}


def digests(run, collection="pool"):
    """Content digest of every table of a collection."""
    store = Run(run)
    return {
        (step.name, shard): marker.digest
        for step in build_plan(RunConfig()).steps
        for shard, marker in store.markers(collection, step.name).items()
    }


def rejected(run, step):
    reasons = Run(run).read_table("pool", step, 0, ["reject_reason"]).column(0).to_pylist()
    return [reason for reason in reasons if reason]


def raw_tars(run):
    return sorted(Path(run).glob("*/raw/*.tar")) + sorted(Path(run).glob("*/*/raw/*.tar"))


@pytest.fixture(scope="module")
def fetched_once(bring, tree, tmp_path_factory):
    run = tmp_path_factory.mktemp("fetched") / "run"
    bring(run, tree(), Request("fetch"))
    return run


@pytest.fixture
def fetched(fetched_once, tmp_path):
    """A run of one shard, brought up to fetch."""
    return Path(shutil.copytree(fetched_once, tmp_path / "run"))


def unblurred(run):
    """Raw tars of collections whose images are stored."""
    return [path for path in raw_tars(run) if "references" not in path.parts]


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_only_refuses_when_something_before_is_missing(fetched, bring, tree):
    before = digests(fetched)

    with pytest.raises(UsageError, match="--only nsfw: pca_hash is not finished"):
        bring(fetched, tree(), Request("nsfw", only=True))

    assert digests(fetched) == before


def test_only_runs_when_everything_before_is_complete(fetched, bring, tree):
    events = bring(fetched, tree(), Request("pca_hash", only=True))

    assert worked_on(events) == {"pca_hash_fit", "pca_hash", "pca_hash_verdict"}


def test_an_upstream_redone_with_unchanged_output_stops_there(copied, bring, tree, digest):
    first, before = digest(copied), digests(copied)

    events = bring(copied, tree(), Request(redo=frozenset({"dedup", "cluster"})))

    copies = {"dedup_fit", "dedup_codes", "dedup_edges", "dedup"}
    assert worked_on(events) == {*copies, "cluster_fit", "cluster", "cluster_baseline", "cluster_summary"}
    assert digests(copied) == before
    assert digest(copied) == first


def test_redoing_a_stage_computes_every_row_of_it_again(copied, bring, tree):
    had = Run(copied).read_table("pool", "sscd", 0).column(0)

    events = bring(copied, tree(), Request("sscd", redo=frozenset({"sscd"})))

    done = {(event.unit.step, event.unit.collection): event for event in events if isinstance(event, Done)}
    assert done["sscd", "pool"].num_computed >= len(had) - had.null_count


@pytest.mark.parametrize("stage", ["pca_hash", "nsfw", "faces"])
def test_redoing_what_was_seen_before_blurring_needs_the_bytes_again(copied, bring, tree, stage):
    with pytest.raises(UsageError, match="add --redo fetch"):
        bring(copied, tree(), Request(stage, redo=frozenset({stage})))


def test_redoing_a_stage_behind_the_last_is_refused(fetched, bring, tree):
    with pytest.raises(UsageError, match="--redo dedup: comes after --stage fetch"):
        bring(fetched, tree(), Request("fetch", redo=frozenset({"dedup"})))


def test_an_unknown_stage_to_redo_is_refused(fetched, bring, tree):
    with pytest.raises(UsageError, match="there is no stage 'nosuch'"):
        bring(fetched, tree(), Request(redo=frozenset({"nosuch"})))


def test_refit_fits_again_and_an_equal_fit_makes_nothing_stale(fetched, bring, tree):
    bring(fetched, tree(), Request("pca_hash"))

    events = bring(fetched, tree(), Request("pca_hash", refit=True))

    assert worked_on(events) == {"pca_hash_fit"}


def test_more_images_do_not_refit_unless_asked(fetched, bring, tree, images, tmp_path):
    bring(fetched, tree(), Request("pca_hash"))
    fit = Run(fetched).artefact_marker("pca_hash_fit")
    more = tree()
    more["pool"]["inputs"] += [{"kind": "folder", "path": str(images / "seeds")}]
    redo = frozenset({"crawl"})

    events = bring(fetched, more, Request("pca_hash", redo=redo))
    refitted = bring(fetched, more, Request("pca_hash", refit=True))

    assert "pca_hash_fit" not in worked_on(events)
    assert Run(fetched).read_table("pool", "pca_hash", 0).num_rows == 66
    assert worked_on(refitted) >= {"pca_hash_fit", "pca_hash"}
    assert Run(fetched).artefact_marker("pca_hash_fit").digest != fit.digest


def test_another_fit_makes_what_used_it_stale(copied, bring, tree):
    events = bring(copied, tree() | {"cluster": {"num_clusters": 3, "iterations": 5}})

    assert {"cluster_fit", "cluster", "manifest_verdict"} <= worked_on(events)
    assert not worked_on(events) & {"pca_hash_fit", "sscd", "embed", "dedup"}


def test_settings_of_crawl_and_fetch_do_not_make_them_again(copied, bring, tree):
    events = bring(copied, tree(rows=12) | {"fetch": {"max_bytes": 5_000_000}})

    assert not worked_on(events)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert any("--redo crawl" in message for message in warnings)
    assert any("--redo fetch" in message for message in warnings)


def test_what_a_list_of_domains_holds_besides_is_told_once(fetched, bring, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("CURATION_CACHE", str(tmp_path / "cache"))
    lists = tmp_path / "domains.txt"
    lists.write_text("a.example\n" * 20 + "http://b.example/\n")

    events = bring(fetched, tree() | {"fetch": {"policy": {"blocked_domains": [str(lists)]}}}, Request("fetch"))

    warnings = [event.message for event in events if isinstance(event, Warned) and str(lists) in event.message]
    assert warnings == [f"fetch.policy: {lists}: 1 of 21 entries name no domain and are left out, the first in line 21"]


def test_a_check_of_consent_that_was_off_when_images_came_stands_in_the_manifest(copied, bring, tree):
    manifest = Request(redo=frozenset({"manifest"}))
    bring(copied, tree() | {"fetch": {"consent": {"robots": False}}}, manifest)
    assert _consents(copied) == [(False, True)] * 2  # what the settings say

    bring(copied, tree() | {"fetch": {"consent": {"tdm": False}}}, Request("fetch", redo=frozenset({"fetch"})))
    bring(copied, tree(), manifest)
    assert _consents(copied) == [(True, False)] * 2  # what they said when images were fetched


def _consents(run):
    """Return whether robots and tdm were on, by the manifest's summary and by its metadata."""
    metadata = pq.read_metadata(run / "manifest.parquet").metadata
    summaries = [json.loads(Run(run).read_bytes("manifest.json")), json.loads(metadata[SUMMARY_KEY])]
    return [(summary["consent"]["robots"], summary["consent"]["tdm"]) for summary in summaries]


def test_the_cost_of_doing_fetch_again_names_what_is_protected_behind_it(copied, tree):
    config = parse(RunConfig, tree(), "test.yaml")

    costs = redo_cost(Context(Run(copied), config), build_plan(config), frozenset({"fetch"}))

    assert [cost.split(":")[0] for cost in costs] == ["fetch", "faces"]
    assert "requests go to the hosts again" in costs[0]


# -- bytes that are gone --------------------------------------------------------------------------------------------


def test_blurring_again_needs_the_fetched_bytes(copied, bring, tree):
    before = digests(copied)

    with pytest.raises(UsageError, match="add --redo fetch"):
        bring(copied, tree(), Request(redo=frozenset({"faces"})))

    assert digests(copied) == before


def test_fetching_and_blurring_again_gives_the_same_digest(copied, bring, tree, digest):
    first, before = digest(copied), digests(copied)
    tars = set(copied.glob("pool/images/*.tar"))

    events = bring(copied, tree(), Request(redo=frozenset({"fetch", "faces"})))

    assert worked_on(events) >= {"fetch", "faces"}
    assert digests(copied) == before
    assert digest(copied) == first
    assert not raw_tars(copied)
    assert not tars & set(copied.glob("pool/images/*.tar"))


def test_fetching_again_alone_leaves_no_fetched_bytes_behind(copied, bring, tree, digest):
    first = digest(copied)
    bring(copied, tree(), Request("fetch", redo=frozenset({"fetch"})))

    events = bring(copied, tree())

    assert not worked_on(events)
    assert not raw_tars(copied)
    assert digest(copied) == first


def test_discarded_images_come_back_when_they_are_fetched_again(fetched, bring, tree):
    bring(fetched, tree() | {"nsfw": {"max_score": 0.0005}}, Request("faces"))
    bring(fetched, tree(), Request("faces"))
    assert "discarded" in rejected(fetched, "faces_verdict")

    bring(fetched, tree(), Request("fetch", redo=frozenset({"fetch"})))
    bring(fetched, tree(), Request("faces"))

    assert "discarded" not in rejected(fetched, "faces_verdict")
    assert not unblurred(fetched)
    store = Run(fetched)
    ids = store.read_table("pool", "fetch", 0, ["image_id"]).column(0).to_pylist()
    offsets = store.read_table("pool", "faces", 0, ["tar_offset"]).column(0).to_pylist()
    assert all((image_id is None) == (offset is None) for image_id, offset in zip(ids, offsets, strict=True))


def test_other_images_are_blurred_although_faces_is_protected(fetched, bring, tree, images, tmp_path):
    """A crawl and a fetch done again and no further must not leave the tables of other images behind."""
    bring(fetched, tree(), Request("faces"))
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted((images / "pool").glob("0*.jpg"))[:40]:
        shutil.copy(path, other / path.name)
    changed = tree() | {"pool": {"inputs": [{"kind": "folder", "path": str(other)}]}}
    bring(fetched, changed, Request("crawl", redo=frozenset({"crawl"})))

    bring(fetched, changed, Request("faces"))

    store = Run(fetched)
    assert {store.read_table("pool", name, 0).num_rows for name in ("crawl", "fetch", "nsfw", "faces")} == {40}
    assert not unblurred(fetched)


def test_shards_that_are_no_more_leave_nothing_behind(bring, tree, tmp_path):
    run = tmp_path / "run"
    bring(run, tree(rows=12), Request("fetch"))
    assert len(raw_tars(run)) > 3

    bring(run, tree(rows=100), Request("fetch", redo=frozenset({"crawl"})))

    assert len(list(run.glob("pool/raw/*.tar"))) == 1
    assert set(Run(run).markers("pool", "fetch")) == {0}


# -- what is wrong is said in one line, early, and loses nothing ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"nsfw": {"weights": "nosuch"}}, WeightsError, "nosuch"),
        ({"embed": {"weights": "/nowhere/weights.pt"}}, WeightsError, "/nowhere/weights.pt"),
        ({"embed": {"model": "no_such_model"}}, WeightsError, "timm .* knows no such model"),
        ({"embed": {"features": "cls"}}, WeightsError, "has no class token"),
        ({"embed": {"model": "vit_small_patch16_224", "side_px": 100}}, WeightsError, "use 96"),
        ({"manifest": {"exclude": {"urls": ["/nowhere/list.txt"]}}}, InputError, "/nowhere/list.txt"),
        ({"pool": {"inputs": []}}, ConfigError, "pool.inputs"),
    ],
    ids=["weights name", "weights path", "encoder", "features", "side", "exclude list", "no inputs"],
)
def test_what_is_missing_is_said_before_any_work(tmp_path, bring, tree, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        bring(tmp_path / "run", tree() | changes)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "pool").exists()


def test_missing_weights_lose_nothing_finished(copied, bring, tree, digest):
    first, before = digest(copied), digests(copied)
    with pytest.raises(WeightsError):
        bring(copied, tree() | {"sscd": {"weights": "nosuch"}})

    assert digests(copied) == before
    assert not worked_on(bring(copied, tree()))
    assert digest(copied) == first


def test_an_unreadable_input_is_one_line_and_what_is_finished_stays(tmp_path, bring, tree, images):
    run = tmp_path / "run"
    missing = {"inputs": [{"kind": "folder", "path": str(tmp_path / "nowhere")}]}

    with pytest.raises(InputError, match="nowhere") as caught:
        bring(run, tree() | {"seeds": {"some": missing}}, Request("fetch"))

    assert "\n" not in str(caught.value)
    assert Run(run).markers("pool", "crawl")
    events = bring(run, tree(), Request("fetch"))
    assert ("crawl", "pool") not in {(e.unit.step, e.unit.collection) for e in events if isinstance(e, Done)}


def test_an_input_that_became_unreadable_leaves_the_finished_crawl(fetched, bring, tree, tmp_path):
    missing = {"inputs": [{"kind": "folder", "path": str(tmp_path / "nowhere")}]}
    before = digests(fetched)
    with pytest.raises(InputError):
        bring(fetched, tree() | {"pool": missing}, Request("crawl", redo=frozenset({"crawl"})))

    assert not worked_on(bring(fetched, tree(), Request("fetch")))
    assert digests(fetched) == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_raw_tar_is_corrupt_and_named_and_fetching_again_mends_it(fetched, bring, tree, damage):
    (tar,) = (fetched / "pool" / "raw").glob("*.tar")
    data = bytearray(tar.read_bytes())
    if damage == "missing":
        tar.unlink()
    else:
        data[20_000] ^= 0xFF
        tar.write_bytes(data if damage == "flipped" else data[:20_000])

    with pytest.raises(CorruptError, match=tar.name) as caught:
        bring(fetched, tree(), Request("nsfw"))

    assert "\n" not in str(caught.value)
    bring(fetched, tree(), Request("nsfw", redo=frozenset({"fetch"})))
    assert digests(fetched)["nsfw", 0]


def test_a_damaged_blurred_tar_is_corrupt_and_named(copied, bring, tree):
    (tar,) = (copied / "pool" / "images").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[20_000] ^= 0xFF
    tar.write_bytes(data)

    with pytest.raises(CorruptError, match=tar.name):
        bring(copied, tree(), Request("sscd", redo=frozenset({"sscd"})))


def test_a_crawl_with_a_lost_shard_is_done_again_and_no_row_vanishes(bring, tree, tmp_path):
    run = tmp_path / "run"
    bring(run, tree(rows=12), Request("crawl"))
    before = digests(run)
    (run / "pool" / "crawl" / "00000003.json").write_text('{"cut')

    bring(run, tree(rows=12), Request("crawl"))

    assert digests(run) == before


def test_a_crawl_that_is_a_mixture_of_two_is_done_again(bring, tree, tmp_path):
    run = tmp_path / "run"
    bring(run, tree(rows=12), Request("crawl"))
    before = digests(run)
    store = Run(run)
    marker = store.marker("pool", "crawl", 0)
    other = store.read_table("pool", "crawl", 0).slice(3)
    store.commit("pool", "crawl", 0, other, {"fingerprint": marker.fingerprint, "inputs": marker.inputs})

    bring(run, tree(rows=12), Request("crawl"))

    assert digests(run) == before


def test_a_run_on_a_full_disk_fails_in_one_line_and_goes_on(small_disk, fill, bring, tree, capsys, tmp_path):
    from curation.cli import main

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(rows=12)))
    command = ["run", "--config", str(config), "--run", str(small_disk / "run"), "--stage", "fetch", "--workers", "1"]
    assert main([*command[:-3], "crawl", *command[-2:]]) == 0
    before = digests(small_disk / "run")
    filler = fill(small_disk)
    capsys.readouterr()

    for left in (0, 40_000, 120_000):
        with filler.open("rb+") as stream:
            stream.truncate(filler.stat().st_size - left)
        assert main(command) == 1
        (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
        assert "space" in said or "are free" in said
        assert before.items() <= digests(small_disk / "run").items()
        fill(small_disk)
    filler.unlink()

    assert main(command) == 0
    assert len(Run(small_disk / "run").markers("pool", "fetch")) == 5


# -- interruptions --------------------------------------------------------------------------------------------------


def stopped(url, tree, request, after):
    """Bring a run up, but ask it to stop after a number of rows; return whether it was done before that."""
    config = parse(RunConfig, tree, "test.yaml")
    rows = []
    context = Context(Run(url), config, lambda: len(rows) > after)
    try:
        bring_up(context, build_plan(config), request, LocalRunner(2), rows.append)
    except KeyboardInterrupt:
        return False
    return True


def test_stops_in_the_middle_change_nothing(finished, tree, tmp_path):
    run = tmp_path / "run"
    num_stops = 0
    while not stopped(run, tree(), Request("faces"), after=11 + 23 * num_stops):
        num_stops += 1
        assert not list(run.glob("**/*.tmp"))
        assert num_stops < 50

    assert num_stops >= 3
    expected = {name: value for name, value in digests(finished).items() if name in digests(run)}
    assert digests(run) == expected
    assert not unblurred(run)


def test_a_reduce_stopped_between_its_tables_does_not_count_for_the_settings_before(
    copied, bring, tree, digest, monkeypatch
):
    """Stop while dedup with another threshold has written one of its tables, then go back."""
    first = digest(copied)
    config = parse(RunConfig, tree() | {"dedup": {"threshold": 0.97}}, "test.yaml")
    context = Context(Run(copied), config)
    commit = context.run.commit
    written = []

    def watched(collection, step, *rest):
        marker = commit(collection, step, *rest)
        if step == "dedup":
            written.append(collection)
        return marker

    monkeypatch.setattr(context.run, "commit", watched)
    context.should_stop = lambda: bool(written)
    with pytest.raises(KeyboardInterrupt):
        bring_up(context, build_plan(config), Request("dedup"), LocalRunner(1))
    assert len(written) == 1

    events = bring(copied, tree())

    assert "dedup" in worked_on(events)
    assert digest(copied) == first


def test_a_run_that_is_taken_over_says_so(fetched, tree, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_S", 0.02)
    config = parse(RunConfig, tree(), "test.yaml")
    context = Context(Run(fetched), config)
    other = json.dumps({"token": "other", "host": "elsewhere", "pid": 1, "expires": 9e9}).encode()

    def take_over(event):
        if isinstance(event, StepStarted):
            context.run.write_bytes("lease.json", other)
            for _ in range(200):
                if context.should_stop():
                    return
                lease_module.time.sleep(0.02)

    with pytest.raises(LeaseError, match="taken this run over"):
        bring_up(context, build_plan(config), Request("pca_hash"), LocalRunner(1), take_over)

    assert context.run.read_bytes("lease.json") == other


def test_a_comment_in_the_code_makes_nothing_stale(copied, tree, tmp_path):
    source = Path(curation.__file__).parent
    package = tmp_path / "changed" / "curation"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    for path in package.rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8") + "\n# a comment\n", encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree()))

    done = subprocess.run(
        [sys.executable, "-m", "curation.cli", "run", "--config", str(config), "--run", str(copied)],
        cwd=tmp_path / "changed",
        capture_output=True,
        text=True,
        check=True,
    )

    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {event["event"] for event in events} == {"end"}
    assert all(event["skipped"] for event in events)
