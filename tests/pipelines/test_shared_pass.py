"""pca_hash, nsfw and faces read and decode a shard once, and commit separately."""

from collections import Counter

import pytest

from curation.pipelines import image_pass
from curation.pipelines.driver import Request
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.units import Done
from curation.store import Run

STEPS = ("pca_hash", "nsfw", "nsfw_verdict", "faces")


@pytest.fixture
def counted(monkeypatch):
    """Counts decodes and reads of the pass, by image."""
    decodes: Counter[bytes] = Counter()
    reads: Counter[tuple[str, int, int]] = Counter()
    decode, encoded = image_pass.decode, image_pass.encoded

    def counting_decode(data, *rest):
        decodes[data] += 1
        return decode(data, *rest)

    def counting_reads(context, step, collection, shard, rows):
        for row, data in encoded(context, step, collection, shard, rows):
            reads[collection, shard, row] += step.name != "pca_hash_fit"  # a sample, before the pass
            yield row, data

    monkeypatch.setattr(image_pass, "decode", counting_decode)
    monkeypatch.setattr(image_pass, "encoded", counting_reads)
    return decodes, reads


def test_each_image_is_read_and_decoded_once_for_all_three(bring, tree, tmp_path, counted):
    decodes, reads = counted
    run = tmp_path / "run"

    events = bring(run, tree(rows=30), Request("faces"), LocalRunner(1))

    store = Run(run)
    stored = store.markers("pool", "faces")
    fetched = sum(
        store.read_table(collection, "fetch", shard, ["image_id"]).column(0).is_valid().to_numpy().sum()
        for collection in ("pool", "seeds/some")
        for shard in store.markers(collection, "fetch")
    )
    assert len(stored) == 2
    assert sum(reads.values()) == fetched
    assert sum(decodes.values()) == fetched
    assert {event.unit.step for event in events if isinstance(event, Done)} >= {"pca_hash"}


def test_a_shared_pass_commits_what_separate_passes_would(bring, tree, tmp_path):
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    bring(shared, tree(), Request("faces"))
    for stage in ("pca_hash", "nsfw", "faces"):  # each brings up no more than itself
        bring(apart, tree(), Request(stage))

    for step in STEPS:
        one, other = (Run(run).markers("pool", step)[0] for run in (shared, apart))
        assert (one.digest, one.fingerprint, one.covers) == (other.digest, other.fingerprint, other.covers), step


def test_what_the_shared_pass_rejects_is_not_stored(bring, tree, tmp_path):
    run = tmp_path / "run"
    bring(run, tree() | {"nsfw": {"max_score": 0.0001}}, Request("faces"))

    store = Run(run)
    rejected = store.read_table("pool", "nsfw_verdict", 0).column(0).is_valid().to_numpy()
    stored = store.read_table("pool", "faces", 0, ["tar_offset"]).column(0).is_valid().to_numpy()
    assert rejected.sum() > 0
    assert not (rejected & stored).any()


def test_a_pass_killed_between_two_commits_goes_on(bring, tree, digest, finished, copied):
    store = Run(copied)
    for step in ("nsfw_verdict", "faces"):
        store.remove(f"pool/{step}/00000000.json")
    # The fetched bytes are gone once faces was committed: as in a kill, they must be there again.
    bring(copied, tree(), Request("manifest", redo=frozenset({"fetch"})))

    assert digest(copied) == digest(finished)
