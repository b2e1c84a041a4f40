import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError
from curation.indexes import kmeans
from curation.indexes.balanced import QuotaSample, shares
from curation.indexes.hierarchy import Tree, grow

GROUPS = 20


@pytest.fixture(scope="module")
def zipf():
    """Points of 20 groups, the largest 120 times the smallest, their groups and keys."""
    rng = np.random.default_rng(2)
    sizes = np.maximum(120, 30_000 * np.arange(1, GROUPS + 1) ** -1.6 / 2.1).astype(int)
    label = np.repeat(np.arange(GROUPS), sizes)
    middle = rng.standard_normal((GROUPS, 64))
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    bases = np.linalg.qr(rng.standard_normal((GROUPS, 64, 4)))[0]
    values = middle[label] + 0.1 * np.einsum("ndr,nr->nd", bases[label], rng.standard_normal((len(label), 4)))
    values += 0.01 * rng.standard_normal(values.shape)
    vectors = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    return vectors, label, rng.integers(0, 2**64, (len(label), 2), dtype=np.uint64)


@pytest.fixture(scope="module")
def leaves(zipf):
    vectors, _, keys = zipf
    return kmeans.fit(lambda: [(vectors, keys)], 1500, 10, seed=2, num_threads=1).vectors


def test_balanced_sampling_gives_every_group_about_its_equal_share_where_flat_sampling_does_not(zipf, leaves):
    vectors, label, keys = zipf
    tree = grow(leaves, (600, 150, 32), 30, seed=2, rounds=20, num_threads=1)
    numbers, _ = kmeans.assign(vectors, leaves, num_threads=1)
    budget = 40 * GROUPS
    sample = QuotaSample(shares(np.bincount(numbers, minlength=len(leaves)), tree.parents, budget, seed=2), seed=2)
    sample.add(numbers.astype(np.int64), keys)
    chosen = sample.result()
    place = {tuple(key): row for row, key in enumerate(keys.tolist())}
    share = np.bincount(label[[place[tuple(key)] for key in chosen.tolist()]], minlength=GROUPS) / (budget / GROUPS)
    flat = np.bincount(label) / len(label) * GROUPS
    assert len(np.unique(chosen, axis=0)) == budget
    assert flat.min() < 0.1
    assert flat.max() > 8
    assert 0.5 <= share.min() <= share.max() <= 2


def test_a_tree_is_the_same_bits_for_any_number_of_threads(leaves):
    one, two = (grow(leaves, (60, 8), 10, seed=3, rounds=2, num_threads=threads) for threads in (1, 2))
    other = grow(leaves, (60, 8), 10, seed=4, rounds=2, num_threads=1)
    for left, right in zip((*one.centroids, *one.parents), (*two.centroids, *two.parents), strict=True):
        assert left.tobytes() == right.tobytes()
    assert one.centroids[1].tobytes() != other.centroids[1].tobytes()


def test_every_cluster_of_every_level_has_its_nearest_parent_and_no_parent_is_without_children(leaves):
    tree = grow(leaves, (60, 8), 10, seed=0, rounds=3, per_cluster=2, num_threads=1)
    for level, parents in enumerate(tree.parents):
        below, above = tree.centroids[level].astype(np.float16), tree.centroids[level + 1]
        assert np.array_equal(parents, kmeans.assign(below, above)[0])
        assert np.array_equal(np.unique(parents), np.arange(len(above)))
    assert [len(level) for level in tree.centroids[1:]] == [60, 8]


def test_clusters_lie_more_evenly_over_the_groups_than_those_of_plain_k_means(zipf, leaves):
    vectors, label, _ = zipf
    middle = np.stack([vectors[label == group].astype(np.float32).mean(axis=0) for group in range(GROUPS)])

    def imbalance(centroids):
        sizes = np.bincount((centroids @ middle.T).argmax(axis=1), minlength=GROUPS)
        return GROUPS * (sizes**2).sum() / sizes.sum() ** 2

    points, keys = leaves.astype(np.float16), np.arange(2 * len(leaves), dtype=np.uint64).reshape(-1, 2)
    plain = kmeans.fit(lambda: [(points, keys)], 60, 20, seed=0, num_threads=1).vectors
    resampled = grow(leaves, (60,), 20, seed=0, rounds=10, num_threads=1).centroids[1]
    assert imbalance(resampled) < imbalance(plain)


@pytest.mark.parametrize("num_leaves", [0, 1, 3])
def test_levels_have_at_most_as_many_clusters_as_the_level_below(num_leaves):
    tree = grow(np.eye(8, dtype=np.float32)[:num_leaves], (100, 50), 5, seed=0, rounds=1, num_threads=1)
    assert {len(level) for level in tree.centroids} == {num_leaves}


def test_a_tree_survives_a_file_and_a_damaged_file_is_refused(leaves, tmp_path):
    path = tmp_path / "tree.npz"
    tree = grow(leaves, (60, 8), 3, seed=0, rounds=0, num_threads=1)
    tree.save(path)
    loaded = Tree.load(path)
    for left, right in zip((*tree.centroids, *tree.parents), (*loaded.centroids, *loaded.parents), strict=True):
        assert np.array_equal(left, right)
    data = path.read_bytes()
    for content in (b"", b"text", data[:-50], data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="not a tree"):
            Tree.load(path)
    np.savez(path, centroids_0=np.eye(3, dtype=np.float32), centroids_1=np.eye(3, dtype=np.float32)[:1])
    with pytest.raises(CorruptError, match="parents"):
        Tree.load(path)


def test_levels_that_do_not_fit_together_and_bad_numbers_are_refused(leaves):
    with pytest.raises(DimensionError, match="parents"):
        Tree((leaves, leaves[:5]), (np.full(len(leaves), 5, np.int32),))
    with pytest.raises(DimensionError, match="rounds"):
        grow(leaves, (5,), 5, seed=0, rounds=-1)
    with pytest.raises(DimensionError, match="iterations"):
        grow(leaves, (5,), 0, seed=0, rounds=0)
