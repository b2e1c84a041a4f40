import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.errors import CorruptError
from curation.stages.cluster_summary import (
    BASELINE_FILE,
    DRIFT_FILE,
    SIZES_FILE,
    ClusterBaseline,
    ClusterSummary,
    Tally,
    _mean_deviation,
    drift,
)


def rows(image, counts, similarity, start=0):
    """Images of clusters 0, 1, ... in the given numbers, with one similarity."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    return [
        image(start + index, cluster_id=int(number), cluster_similarity=similarity)
        for index, number in enumerate(numbers)
    ]


@pytest.fixture
def summarised(reduce, in_memory, tmp_path):
    """``summarised(fitted, now, seeds={}, **sharding)``: the drift and the sizes."""

    def run(fitted, now, seeds=None, sample_size=1000, **sharding):
        (tmp_path / "made").mkdir(exist_ok=True)
        reduce(ClusterBaseline(0, sample_size), in_memory({"pool": fitted}, **sharding))
        for name in ClusterBaseline.artefacts:
            (tmp_path / "made" / name).write_bytes((reduce.scratch / name).read_bytes())
        inputs = in_memory({"pool": now, **(seeds or {})}, made={"cluster_baseline": tmp_path / "made"}, **sharding)
        reduce(ClusterSummary(0), inputs)
        return json.loads((reduce.scratch / DRIFT_FILE).read_text()), pq.read_table(reduce.scratch / SIZES_FILE)

    return run


def test_without_new_images_nothing_is_compared(image, summarised):
    pool = rows(image, [30, 20], 0.5)

    found, sizes = summarised(pool, pool)

    assert (found["num_compared"], found["num_new_images"], found["share_change"]) == (50, 0, None)
    assert found["fitted_mean_similarity"] == pytest.approx(0.5)
    assert sizes.column("pool").to_pylist() == [30, 20]


def test_new_images_are_found_in_whatever_shards_they_lie(image, summarised, sharding):
    fitted, new = rows(image, [30, 20], 0.5), rows(image, [0, 10, 40], 0.25, start=1000)

    found, sizes = summarised(fitted, [*fitted[:40], *new], **sharding)

    assert (found["is_sample"], found["num_compared"], found["num_new_images"]) == (False, 90, 50)
    assert found["mean_similarity"] == pytest.approx(0.25)
    assert sizes.column("pool").to_pylist() == [30, 20, 40]


def test_of_a_large_pool_a_sample_is_compared(image, summarised, sharding):
    fitted, new = rows(image, [600, 400], 0.5), rows(image, [500], 0.25, start=5000)

    found, _ = summarised(fitted, [*fitted, *new], sample_size=200, **sharding)

    assert found["is_sample"]
    assert found["num_compared"] - found["num_new_images"] == 200
    assert 60 < found["num_new_images"] < 140  # a half of 200
    assert found["mean_similarity"] == pytest.approx(0.25)


def test_drift_is_the_change_of_similarity_and_of_shares():
    fitted = Tally(np.array([60, 40]), 60_000_000)
    new = Tally(np.array([0, 10, 40]), 10_000_000)

    found = drift(fitted, new)

    assert found["mean_similarity"] == pytest.approx(0.2)
    assert found["fitted_mean_similarity"] == pytest.approx(0.6)
    assert found["share_change"] == pytest.approx((0.6 + 0.2 + 0.8) / 2)
    assert 0 < found["share_change_by_chance"] < 0.1


def test_rejected_images_and_those_without_cluster_do_not_count(image, summarised):
    pool = [*rows(image, [5], 0.5), image(100, cluster_id=1, cluster_similarity=0.9, kept=False), image(101)]

    _, sizes = summarised(pool, pool, {"seeds/s": rows(image, [0, 2], 0.9, start=200)})

    assert sizes.to_pydict() == {"cluster_id": [0, 1], "pool": [5, 0], "seeds/s": [0, 2]}


def test_an_empty_pool_has_no_drift(summarised):
    found, sizes = summarised([], [])

    assert found["mean_similarity"] is None
    assert sizes.num_rows == 0


def test_chance_is_what_draws_from_the_same_shares_show():
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.full(50, 0.3))
    draws = random.multinomial(200, shares, size=2000)

    expected = np.abs(draws / 200 - shares).sum(axis=1).mean() / 2

    assert sum(_mean_deviation(200, share) for share in shares) / 200 / 2 == pytest.approx(expected, rel=0.02)
    assert _mean_deviation(10, 1.0) == _mean_deviation(10, 0.0) == 0


def test_a_broken_baseline_says_what_to_do(image, in_memory, reduce, tmp_path):
    (tmp_path / BASELINE_FILE).write_text("{}")

    with pytest.raises(CorruptError, match="--refit"):
        reduce(ClusterSummary(0), in_memory({"pool": []}, made={"cluster_baseline": tmp_path}))
