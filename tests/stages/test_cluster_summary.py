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

    def run(fitted, now, seeds=None, **sharding):
        (tmp_path / "made").mkdir(exist_ok=True)
        reduce(ClusterBaseline(), in_memory({"pool": fitted}, **sharding))
        (tmp_path / "made" / BASELINE_FILE).write_bytes((reduce.scratch / BASELINE_FILE).read_bytes())
        inputs = in_memory({"pool": now, **(seeds or {})}, made={"cluster_baseline": tmp_path / "made"}, **sharding)
        reduce(ClusterSummary(), inputs)
        return json.loads((reduce.scratch / DRIFT_FILE).read_text()), pq.read_table(reduce.scratch / SIZES_FILE)

    return run


def test_without_new_images_nothing_is_compared(image, summarised):
    pool = rows(image, [30, 20], 0.5)

    found, sizes = summarised(pool, pool)

    assert (found["num_new_shards"], found["num_new_images"], found["share_change"]) == (0, 0, None)
    assert found["fitted_mean_similarity"] == pytest.approx(0.5)
    assert sizes.column("pool").to_pylist() == [30, 20]


def test_drift_is_the_change_of_similarity_and_of_shares():
    fitted = Tally(np.array([60, 40]), 60_000_000)
    new = Tally(np.array([0, 10, 40]), 10_000_000)

    found = drift(fitted, new)

    assert found["mean_similarity"] == pytest.approx(0.2)
    assert found["fitted_mean_similarity"] == pytest.approx(0.6)
    assert found["share_change"] == pytest.approx((0.6 + 0.2 + 0.8) / 2)
    assert 0 < found["share_change_by_chance"] < 0.1


def test_a_shard_that_was_there_at_the_fit_is_not_new(image, summarised):
    first, second = rows(image, [25, 25], 0.5), rows(image, [0, 10, 40], 0.25, start=1000)

    found, sizes = summarised([*first, *first], [*first, *second], num_shards=2)

    assert (found["num_shards"], found["num_new_shards"], found["num_new_images"]) == (2, 1, 50)
    assert sizes.column("pool").to_pylist() == [25, 35, 40]
    assert found["mean_similarity"] == pytest.approx(0.25)


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
        reduce(ClusterSummary(), in_memory({"pool": []}, made={"cluster_baseline": tmp_path}))
