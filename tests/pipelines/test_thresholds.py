"""Moving a threshold makes verdicts again, and of features only what newly kept rows lack."""

from curation.pipelines.driver import Request, StepStarted, Warned
from curation.pipelines.units import Done
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
