"""Moving a threshold makes verdicts again, and of features only what newly kept rows lack."""

import tarfile

import pytest

from curation.config import RunConfig
from curation.errors import CorruptError
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, StepStarted, Warned
from curation.pipelines.purge import purge, rejected_but_stored
from curation.pipelines.units import Done
from curation.settings import parse
from curation.store import Run

FEATURES = ("fetch", "pca_hash", "nsfw", "faces", "sscd", "embed")


def _digests(run, steps=FEATURES):
    return {step: [marker.digest for marker in Run(run).markers("pool", step).values()] for step in steps}


def _worked_on(events):
    return {event.unit.step for event in events if isinstance(event, Done)}


def _computed(events, step):
    return sum(event.num_computed for event in events if isinstance(event, Done) and event.unit.step == step)


def _reasons(run, step):
    store = Run(run)
    return [
        reason
        for shard in store.markers("pool", step)
        for reason in store.read_table("pool", step, shard, ["reject_reason"]).column(0).to_pylist()
    ]


def test_a_second_run_does_nothing(copied, bring, tree):
    events = bring(copied, tree())

    assert not [event for event in events if isinstance(event, (Done, StepStarted))]


def test_moving_the_duplicate_threshold_embeds_only_newly_kept_rows(copied, bring, tree):
    before = _digests(copied, FEATURES[:-1])
    rejected_before = _reasons(copied, "dedup").count("near_duplicate")

    events = bring(copied, tree() | {"dedup": {"threshold": 0.97}})

    newly_kept = rejected_before - _reasons(copied, "dedup").count("near_duplicate")
    assert newly_kept > 0
    assert _computed(events, "embed") == newly_kept
    assert _digests(copied, FEATURES[:-1]) == before
    assert not _worked_on(events) & {"fetch", "pca_hash", "nsfw", "faces", "sscd"}


def test_a_stricter_nsfw_score_computes_no_feature_of_rows_that_have_it(copied, bring, tree):
    store = Run(copied)
    scores = [score for score in store.read_table("pool", "nsfw", 0).column(0).to_pylist() if score is not None]
    before = _digests(copied, ("fetch", "pca_hash", "nsfw", "faces"))

    events = bring(copied, tree() | {"nsfw": {"max_score": sorted(scores)[-5]}})

    assert _reasons(copied, "nsfw_verdict").count("nsfw") == 5
    assert _digests(copied, ("fetch", "pca_hash", "nsfw", "faces")) == before
    assert "sscd" not in _worked_on(events) or _computed(events, "sscd") == 0
    manifest_ids = set(_manifest(copied).column("image_id").to_pylist())
    rejected = {
        image_id
        for image_id, reason in zip(
            store.read_table("pool", "fetch", 0, ["image_id"]).column(0).to_pylist(),
            _reasons(copied, "nsfw_verdict"),
            strict=True,
        )
        if reason
    }
    assert not manifest_ids & rejected


def test_an_image_whose_bytes_were_discarded_is_said_to_be(images, bring, tree, tmp_path):
    run = tmp_path / "run"
    bring(run, tree() | {"nsfw": {"max_score": 0.0001}}, Request("faces"))
    dropped = _reasons(run, "nsfw_verdict").count("nsfw")
    assert dropped > 0

    bring(run, tree(), Request("faces"))

    assert _reasons(run, "faces_verdict").count("discarded") == dropped


def test_protected_stages_are_kept_and_said_to_be_stale(copied, bring, tree):
    events = bring(copied, tree() | {"faces": {"scales": [1.0], "margin": 0.5}})

    assert "faces" not in _worked_on(events)
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert warnings
    assert all("--redo faces" in message for message in warnings)


def test_going_back_gives_the_first_digest_again(copied, bring, tree, digest):
    first = digest(copied)
    bring(copied, tree() | {"dedup": {"threshold": 0.97}})

    bring(copied, tree())

    assert digest(copied) == first


def _manifest(run):
    import pyarrow.parquet as pq

    return pq.read_table(run / "manifest.parquet")


def test_purge_deletes_the_bytes_of_what_is_rejected_now_and_no_feature(copied, bring, tree, digest):
    store = Run(copied)
    scores = [score for score in store.read_table("pool", "nsfw", 0, ["nsfw_score"]).column(0).to_pylist() if score]
    strict = tree() | {"nsfw": {"max_score": sorted(scores)[-5]}}
    events = bring(copied, strict)
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert any(message.startswith("5 images") and "curate purge" in message for message in warned)
    first, before = digest(copied), _digests(copied)
    context = Context(store, parse(RunConfig, strict, "test.yaml"))

    assert purge(context) == 5

    assert not list(rejected_but_stored(context))
    after = bring(copied, strict)
    assert _worked_on(after) == {"faces_verdict", "manifest_verdict"} or _worked_on(after) == {"manifest_verdict"}
    assert digest(copied) == first
    assert _digests(copied) == before
    with tarfile.open(next((copied / "pool" / "images").glob("*.tar"))) as tar:
        stored = set(tar.getnames())
    ids = store.read_table("pool", "fetch", 0, ["image_id"]).column(0).to_pylist()
    rejected = [name for name, reason in zip(ids, _reasons(copied, "nsfw_verdict"), strict=True) if reason]
    assert rejected
    assert not {name for name in stored if name.partition(".")[0] in rejected}


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"max_aspect": 19.0}},
        {"pca_hash": {"side_px": 16}},
        {"pca_hash": {"sample_size": 66}},
        {"seed": 3},
    ],
)
def test_what_was_seen_before_blurring_is_not_made_again_of_blurred_images(copied, bring, tree, digest, change):
    first = digest(copied)
    before = _digests(copied, ("pca_hash", "nsfw", "faces"))

    events = bring(copied, tree() | change)

    assert _digests(copied, ("pca_hash", "nsfw", "faces")) == before
    assert any("--redo fetch" in event.message for event in events if isinstance(event, Warned))
    bring(copied, tree())
    assert digest(copied) == first


def test_a_lost_file_is_made_again_or_said_to_be_lost(copied, bring, tree, digest):
    first = digest(copied)
    next((copied / "pool" / "sscd").glob("*.parquet")).unlink()
    cut = next((copied / "pool" / "dedup").glob("*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-20])

    bring(copied, tree())

    assert digest(copied) == first
    next((copied / "pool" / "images").glob("*.tar")).unlink()
    with pytest.raises(CorruptError, match="--redo fetch --redo faces"):
        bring(copied, tree())
