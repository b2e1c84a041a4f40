"""What the benchmarks of training are made of is what they say."""

import io
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytestmark = pytest.mark.shared_data
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(shared_data, monkeypatch):
    """Return a function that imports a benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("CURATION_TEST_DATA", str(shared_data))

    def load(name):
        module = __import__(name)
        monkeypatch.delitem(sys.modules, name)
        return module

    yield load
    sys.modules.pop("trainer_data", None)


def images(path):
    return [row["image"]["bytes"] for row in pq.read_table(path).to_pylist()]


def test_a_manifest_of_fetched_images_holds_their_bytes(benchmark, tmp_path):
    from curation.dinov2.data import ManifestImages

    data = benchmark("trainer_data")
    rows = data.rows_of("cifar10", "train", 12)
    source = data.write_rows(tmp_path / "images.parquet", rows)
    tree = {"pool": {"inputs": [{"kind": "parquet", "path": str(source)}]}, "shards": {"rows": 5}}
    context = data.curate(tmp_path / "run", tree, "fetch", 1)

    stored = data.stored_rows(context, "fetch")
    found = ManifestImages(data.write_manifest(tmp_path / "run", "train", stored), 100_000)

    assert [row["number"] for row in stored] == list(range(12))
    assert [found.read(index) for index in range(len(found))] == [row["image"]["bytes"] for row in rows]


def test_the_pool_is_long_tailed_with_copies_and_junk_and_shares_no_image_with_other_sets(benchmark, tmp_path):
    gain = benchmark("curation_gain")
    size = replace(gain.SMOKE, largest=20, tail=0.8, copies=15, junk=8, seeds=20, arm=20, probe_train=30, probe_test=10)

    kinds = gain.build(tmp_path, size)

    counts = Counter(kinds)
    originals = sorted((count for kind, count in counts.items() if kind.startswith("original")), reverse=True)
    assert originals == [round(20 * 0.8**rank) for rank in range(10)]
    assert (counts["junk"], sum(count for kind, count in counts.items() if kind.startswith("copy"))) == (8, 15)
    sets = [images(tmp_path / f"{name}.parquet") for name in ("pool", "seeds", "clean", "labelled")]
    assert [len(part) for part in sets] == [len(kinds), 20, 20, 40]
    assert len({image for part in sets for image in part}) == sum(map(len, sets)) - (
        15 - len(set(copies(kinds, sets[0])))
    )
    assert gain.build(tmp_path, size) == kinds


def copies(kinds, pool):
    return [image for kind, image in zip(kinds, pool, strict=True) if kind.startswith("copy")]


def test_a_planted_copy_looks_like_its_original_and_has_other_bytes(benchmark):
    gain, data = benchmark("curation_gain"), benchmark("trainer_data")
    for row in data.rows_of("cifar10", "train", 5):
        copy = gain.copied(row, np.random.default_rng(0))["image"]["bytes"]
        ours, theirs = (
            np.asarray(Image.open(io.BytesIO(found)).convert("L"), float) for found in (row["image"]["bytes"], copy)
        )

        assert copy != row["image"]["bytes"]
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.8


def test_the_control_takes_as_many_of_each_cluster_after_they_were_dealt_out_anew(benchmark):
    gain = benchmark("curation_gain")
    left = [{"number": number, "image_id": f"{number}"} for number in range(300)]
    cluster = {number: number % 7 for number in range(300)}
    curated = [row for row in left if cluster[row["number"]] in (1, 4)][:60]

    control = gain.shuffled(left, cluster, curated, np.random.default_rng(0))

    assert len({row["number"] for row in control}) == 60
    assert {cluster[row["number"]] for row in control} == set(range(7))
