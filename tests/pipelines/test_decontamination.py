"""References drop what copies them, in whole components, and change nothing else: whole runs with the real model."""

import io
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from curation.demo.edits import EDITS
from curation.edits import cropped, jpeg
from curation.pipelines.driver import Request
from curation.store import Run

KEPT_APART = ("reject_reason", "duplicate_of", "similarity")


def verdicts(run):
    """Every row of ``dedup`` by the name of its file, for rows that came so far."""
    store = Run(run)
    found = {}
    for shard in store.markers("pool", "dedup"):
        urls = store.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
        rows = store.read_table("pool", "dedup", shard).to_pylist()
        found |= {url.rpartition("/")[2]: row for url, row in zip(urls, rows, strict=True)}
    return found


def audit(run):
    store = Run(run)
    marker = store.artefact_marker("dedup")
    (path,) = marker.files.values()
    return pq.read_table(io.BytesIO(store.read_bytes(path))).to_pylist()


def check(before, after, planted, records):
    """Check a run with references against the same run without.

    Args:
        before: Verdicts without references.
        after: Verdicts with references.
        planted: Names of the files that copy a reference.
        records: The audit with references.
    """
    members = defaultdict(set)
    for name, row in after.items():
        members[row["component_id"]].add(name)
    touched = {after[name]["component_id"] for name in planted}
    expected = {name for component in touched for name in members[component]}

    dropped = {name for name, row in after.items() if row["reject_reason"] == "reference_copy"}
    assert planted <= dropped, f"not found: {sorted(planted - dropped)}"
    assert dropped == expected, f"not whole components: {sorted(dropped ^ expected)}"
    for name, row in after.items():
        assert row["component_id"] == before[name]["component_id"]
        assert row["component_size"] == before[name]["component_size"]
        if name not in dropped:
            assert {key: row[key] for key in KEPT_APART} == {key: before[name][key] for key in KEPT_APART}
    pool_records = [record for record in records if record["decision"] == "reference_copy"]
    assert len(pool_records) == len(dropped), "the audit names each image that goes, and no other"


def bring_both(run, bring, tree):
    """Bring a run to ``dedup`` without its references, then with them; return verdicts of both, and the audit."""
    bring(run, {**tree, "references": {}}, Request("dedup"))
    before = verdicts(run)
    bring(run, tree, Request("dedup"))
    return before, verdicts(run), audit(run)


def test_copies_of_references_go_with_their_components_and_nothing_else_changes(copied, bring, tree):
    before, after, records = bring_both(copied, bring, tree())

    planted = {name for name in after if name.startswith("reference")}
    assert len(planted) == 2
    check(before, after, planted, records)
    assert any(row["reject_reason"] == "near_duplicate" for row in after.values()), "other components are there"


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(1800)
def test_every_mild_copy_of_a_test_split_is_found(shared_data, bring, tmp_path):
    """Half of the copies bring a copy of their own, which has to go with its component."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "test").mkdir()
    flowers = pq.read_table(shared_data / "flowers.parquet", columns=["image", "split"]).to_pylist()
    photos = pq.read_table(shared_data / "photos.parquet", columns=["image"]).column(0).to_pylist()[:300]
    for number, photo in enumerate(photos):
        (tmp_path / "pool" / f"photo{number:04d}.jpg").write_bytes(photo["bytes"])
        if number % 10 == 0:  # copies that references have nothing to do with
            image = Image.open(io.BytesIO(photo["bytes"])).convert("RGB")
            (tmp_path / "pool" / f"photo{number:04d}-copy.jpg").write_bytes(jpeg(image, 60))
    planted = set()
    test = [row["image"]["bytes"] for row in flowers if row["split"] == "test"]
    edits = list(EDITS.items())
    for number, data in enumerate(test):
        (tmp_path / "test" / f"{number:04d}.jpg").write_bytes(data)
        name, edit = edits[number % len(edits)]
        copy = edit(Image.open(io.BytesIO(data)).convert("RGB"))
        planted.add(f"flower{number:04d}-{name}.jpg")
        (tmp_path / "pool" / f"flower{number:04d}-{name}.jpg").write_bytes(copy)
        if number % 2:
            again = ImageOps.mirror(cropped(Image.open(io.BytesIO(copy)).convert("RGB"), 0.7, 0.2, 0.1))
            (tmp_path / "pool" / f"again{number:04d}.jpg").write_bytes(jpeg(again))
    tree = {
        "pool": {"inputs": [{"kind": "folder", "path": str(tmp_path / "pool")}]},
        "references": {"flowers": {"inputs": [{"kind": "folder", "path": str(tmp_path / "test")}]}},
        "dedup": {"max_dropped_fraction": 1.0},
        "shards": {"rows": 97},
    }

    before, after, records = bring_both(tmp_path / "run", bring, tree)

    in_dedup = {name for name, row in after.items() if row["component_id"] is not None}
    assert planted <= in_dedup, "an earlier stage has rejected a copy"
    check(before, after, planted, records)
    sizes = [after[name]["component_size"] for name in planted]
    assert np.mean(np.array(sizes) > 1) > 0.4, "components of several images are among what is dropped"
    kept_photos = [row for name, row in after.items() if name.startswith("photo") and row["reject_reason"] is None]
    assert len(kept_photos) > 250
