import json

import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config.selection import ClusterConfig
from curation.errors import CorruptError, DimensionError
from curation.indexes.hierarchy import Tree
from curation.stages.cluster import CENTROIDS_FILE, HISTORY_FILE, TREE_FILE, ClusterFit, ClusterStage


@pytest.fixture(scope="session")
def pool(image):
    """200 images around 5 axes, some rejected or without an embedding."""
    random = np.random.default_rng(3)
    rows = []
    for number in range(200):
        vector = 4 * np.eye(8)[number % 5] + random.normal(size=8)
        vector = (vector / np.linalg.norm(vector)).astype(np.float16)
        rows.append(image(number, embedding=None if number % 19 == 0 else vector, kept=number % 17 != 0))
    return rows


def fitted(reduce, inputs, seed=0, **settings):
    reduce(ClusterFit(ClusterConfig(**({"num_clusters": 5} | settings)), seed), inputs)
    return np.load(reduce.scratch / CENTROIDS_FILE)


@pytest.mark.parametrize("sample_size", [1_000_000, 40])
def test_centroids_do_not_depend_on_shards_or_order(sample_size, pool, in_memory, reduce, sharding):
    expected = fitted(reduce, in_memory({"pool": pool}), sample_size=sample_size)
    history = (reduce.scratch / HISTORY_FILE).read_text()

    found = fitted(reduce, in_memory({"pool": pool}, **sharding), sample_size=sample_size)

    assert found.tobytes() == expected.tobytes()
    assert (reduce.scratch / HISTORY_FILE).read_text() == history


def test_the_sample_and_the_first_centroids_depend_on_the_seed(pool, in_memory, reduce):
    one, other = (fitted(reduce, in_memory({"pool": pool}), seed, sample_size=20, iterations=1) for seed in (1, 2))

    assert one.tobytes() != other.tobytes()


def test_rejected_images_do_not_move_the_centroids(pool, in_memory, reduce):
    kept = [row for row in pool if row["kept"]]

    assert fitted(reduce, in_memory({"pool": pool})).tobytes() == fitted(reduce, in_memory({"pool": kept})).tobytes()


def test_the_history_says_what_each_iteration_saw(pool, in_memory, reduce):
    fitted(reduce, in_memory({"pool": pool}), iterations=7)

    history = json.loads((reduce.scratch / HISTORY_FILE).read_text())
    assert 1 <= len(history) <= 7
    assert set(history[0]) == {"objective", "num_empty", "num_reseeded", "imbalance"}
    assert history[-1]["objective"] >= history[0]["objective"]


def test_more_clusters_than_different_images_are_as_many_as_there_are(image, unit, in_memory, reduce):
    rows = [image(n, embedding=unit(*np.eye(8)[n % 3])) for n in range(9)]

    centroids = fitted(reduce, in_memory({"pool": rows}), num_clusters=50)

    assert centroids.shape == (3, 8)


@pytest.mark.parametrize("rows", [[], [{"url": "a"}], [{"url": "a", "kept": False}]])
def test_an_empty_pool_has_no_centroids_and_no_image_a_cluster(rows, image, unit, in_memory, reduce, table):
    assert len(fitted(reduce, in_memory({"pool": rows}))) == 0

    found = ClusterStage(reduce.scratch)(table([image(0, embedding=unit(1))], schema.EMBED), np.ones(1, bool))

    assert found.to_pylist() == [{"cluster_id": None, "cluster_similarity": None, "cluster_ancestors": None}]


@pytest.fixture
def axes(tmp_path):
    """Three centroids along axes; the first and the last are one cluster of the level above, and all one of the top."""
    centroids = np.eye(3, 8, dtype=np.float32)
    np.save(tmp_path / CENTROIDS_FILE, centroids)
    parents = np.array([0, 1, 0], np.int32), np.zeros(2, np.int32)
    Tree((centroids, centroids[:2], centroids[:1]), parents).save(tmp_path / TREE_FILE)
    return tmp_path


def test_an_image_gets_its_nearest_centroid_and_the_cosine_with_it(axes, image, unit, table):
    rows = [image(0, embedding=unit(0, 1)), image(1, embedding=unit(0, 0.6, 0.8)), image(2, embedding=unit(1, 1))]

    found = ClusterStage(axes)(table(rows, schema.EMBED), np.ones(3, bool))

    assert found.schema == schema.CLUSTER.schema
    assert found.column("cluster_id").to_pylist() == [1, 2, 0]  # a tie goes to the smaller number
    np.testing.assert_allclose(found.column("cluster_similarity"), [1, 0.8, np.sqrt(0.5)], atol=5e-4)
    assert found.column("cluster_ancestors").to_pylist() == [[1, 0], [0, 0], [0, 0]]


def test_rejected_missing_and_broken_embeddings_get_no_cluster(axes, image, unit, table):
    rows = [
        image(0, embedding=unit(1)),
        image(1),
        image(2, embedding=np.full(8, np.nan, np.float16)),
        image(3, embedding=unit(0, 1)),
    ]

    found = ClusterStage(axes)(table(rows, schema.EMBED), np.array([False, True, True, True]))

    assert found.column("cluster_id").to_pylist() == [None, None, None, 1]
    assert found.column("cluster_similarity").null_count == found.column("cluster_ancestors").null_count == 3


def test_assignment_does_not_depend_on_chunks(axes, image, unit, table):
    rows = [image(n, embedding=unit(*np.eye(8)[n % 3])) for n in range(6)]
    whole = table(rows, schema.EMBED)
    parts = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 3), whole.slice(5)])

    assert ClusterStage(axes)(parts, np.ones(6, bool)) == ClusterStage(axes)(whole, np.ones(6, bool))


def test_an_encoder_of_another_dimension_is_refused(axes, image, unit, table):
    with pytest.raises(DimensionError, match="8"):
        ClusterStage(axes)(table([image(0, embedding=unit(*np.ones(16)))], schema.EMBED), np.ones(1, bool))


def test_a_tree_over_other_centroids_is_refused(axes):
    np.save(axes / CENTROIDS_FILE, np.eye(4, 8, dtype=np.float32))

    with pytest.raises(CorruptError, match="other centroids"):
        ClusterStage(axes)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"no array",
        b"\x93NUMPY\x01\x00v\x00{'descr': (" + b" " * 104,
        np.eye(3),
        np.ones(3, np.float32),
        np.full((2, 8), np.nan, np.float32),
    ],
    ids=["missing", "empty", "text", "header", "float64", "one axis", "nan"],
)
def test_a_file_that_holds_no_centroids_is_refused(content, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / CENTROIDS_FILE).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / CENTROIDS_FILE, content)

    with pytest.raises(CorruptError, match="not centroids"):
        ClusterStage(tmp_path)
