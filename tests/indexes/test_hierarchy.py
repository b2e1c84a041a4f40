import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError
from curation.indexes import kmeans, linkage
from curation.indexes.balanced import QuotaSample, shares
from curation.indexes.hierarchy import Tree, grow
from curation.indexes.lookup import as_bytes

GROUPS = 20


SHAPES = {
    "narrow": {},
    "wide": {"spread": 0.3, "noise": 0.05},
    "steep": {"power": 2.0, "smallest": 60},
}


def mixture(seed, power=1.6, smallest=120, spread=0.1, noise=0.01):
    """Points of groups with sizes by Zipf's law, their groups and keys."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, GROUPS + 1) ** -power
    label = np.repeat(np.arange(GROUPS), np.maximum(smallest, 30_000 * weights / weights.sum()).astype(int))
    middle = rng.standard_normal((GROUPS, 64))
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    bases = np.linalg.qr(rng.standard_normal((GROUPS, 64, 4)))[0]
    values = middle[label] + spread * np.einsum("ndr,nr->nd", bases[label], rng.standard_normal((len(label), 4)))
    values += noise * rng.standard_normal(values.shape)
    vectors = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    return vectors, label, rng.integers(0, 2**64, (len(label), 2), dtype=np.uint64)


@pytest.fixture(scope="module")
def zipf():
    return mixture(2)


@pytest.fixture(scope="module")
def leaves(zipf):
    vectors, _, keys = zipf
    return kmeans.fit(lambda: [(vectors, keys)], 1500, 10, seed=2, num_threads=1).vectors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_balanced_sampling_gives_every_group_about_its_equal_share_where_flat_sampling_does_not(shape, seed):
    vectors, label, keys = mixture(seed, **SHAPES[shape])
    leaves = kmeans.fit(lambda: [(vectors, keys)], 400, 3, seed, num_threads=1).vectors
    numbers, _ = kmeans.assign(vectors, leaves, num_threads=1)
    budget = 40 * GROUPS
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    flat = np.bincount(label) / len(label) * GROUPS
    assert flat.min() < 0.1
    assert flat.max() > 8
    for levels in (("auto",), (150, "auto"), (GROUPS,)):
        tree = grow(leaves, levels, 30, seed, rounds=10, num_threads=1)
        sample = QuotaSample(shares(np.bincount(numbers, minlength=len(leaves)), tree.parents, budget, seed), seed)
        sample.add(numbers.astype(np.int64), keys)
        chosen = sample.result()
        rows = order[np.searchsorted(as_bytes(keys[order]), as_bytes(chosen))]
        share = np.bincount(label[rows], minlength=GROUPS) / (budget / GROUPS)
        assert len(np.unique(rows)) == budget
        assert 0.5 <= share.min() <= share.max() <= 2


@pytest.mark.parametrize("seed", range(3))
def test_images_that_are_like_no_other_leave_the_shares_of_groups_equal(seed):
    vectors, label, keys = mixture(seed)
    rng = np.random.default_rng(seed + 100)
    alone = rng.standard_normal((100, 64))
    alone = (alone / np.linalg.norm(alone, axis=1, keepdims=True)).astype(np.float16)
    points, numbers = np.concatenate([vectors, alone]), np.append(label, np.full(100, GROUPS))
    more = np.concatenate([keys, rng.integers(0, 2**64, (100, 2), dtype=np.uint64)])
    leaves = kmeans.fit(lambda: [(points, more)], 600, 3, seed, num_threads=1).vectors
    clusters, _ = kmeans.assign(points, leaves, num_threads=1)
    tree = grow(leaves, ("auto",), 30, seed, rounds=10, num_threads=1)
    quotas = shares(np.bincount(clusters, minlength=len(leaves)), tree.parents, 40 * GROUPS, seed)
    sample = QuotaSample(quotas, seed)
    sample.add(clusters.astype(np.int64), more)
    chosen = {tuple(key) for key in sample.result().tolist()}
    rows = [row for row, key in enumerate(more.tolist()) if tuple(key) in chosen]
    share = np.bincount(numbers[rows], minlength=GROUPS + 1)[:GROUPS] / 40
    assert 0.5 <= share.min() <= share.max() <= 2


@pytest.mark.parametrize("method", ["average", "kmeans"])
def test_a_tree_is_the_same_bits_for_any_number_of_threads(leaves, method):
    one, two = (grow(leaves, (60, 8), 10, seed=3, rounds=2, num_threads=threads, method=method) for threads in (1, 2))
    other = grow(leaves, (60, 8), 10, seed=4, rounds=2, num_threads=1, method=method)
    for left, right in zip((*one.centroids, *one.parents), (*two.centroids, *two.parents), strict=True):
        assert left.tobytes() == right.tobytes()
    assert (one.centroids[1].tobytes() != other.centroids[1].tobytes()) == (method == "kmeans")


def test_with_k_means_every_cluster_of_every_level_has_its_nearest_parent_and_no_parent_is_without_children(leaves):
    tree = grow(leaves, (60, 8), 10, seed=0, rounds=3, per_cluster=2, num_threads=1, method="kmeans")
    for level, parents in enumerate(tree.parents):
        below, above = tree.centroids[level].astype(np.float16), tree.centroids[level + 1]
        assert np.array_equal(parents, kmeans.assign(below, above)[0])
        assert np.array_equal(np.unique(parents), np.arange(len(above)))
    assert [len(level) for level in tree.centroids[1:]] == [60, 8]


def test_resampled_clusters_lie_more_evenly_over_the_groups_than_those_of_plain_k_means(zipf, leaves):
    vectors, label, _ = zipf
    middle = np.stack([vectors[label == group].astype(np.float32).mean(axis=0) for group in range(GROUPS)])

    def imbalance(centroids):
        sizes = np.bincount((centroids @ middle.T).argmax(axis=1), minlength=GROUPS)
        return GROUPS * (sizes**2).sum() / sizes.sum() ** 2

    points, keys = leaves.astype(np.float16), np.arange(2 * len(leaves), dtype=np.uint64).reshape(-1, 2)
    plain = kmeans.fit(lambda: [(points, keys)], 60, 20, seed=0, num_threads=1).vectors
    resampled = grow(leaves, (60,), 20, seed=0, rounds=10, num_threads=1, method="kmeans").centroids[1]
    linked = grow(leaves, (60,), 20, seed=0, rounds=0, num_threads=1).centroids[1]
    assert imbalance(linked) < imbalance(resampled) < imbalance(plain)


def test_more_centroids_than_can_be_linked_are_clustered_first_and_large_levels_by_k_means(zipf, leaves, monkeypatch):
    vectors, label, _ = zipf
    monkeypatch.setattr(linkage, "MAX_POINTS", 200)
    tree = grow(leaves, (600, "auto"), 10, seed=0, rounds=3, num_threads=1)
    assert [len(level) for level in tree.centroids] == [1500, 600, GROUPS]
    assert np.array_equal(tree.parents[0], kmeans.assign(leaves.astype(np.float16), tree.centroids[1])[0])
    numbers = tree.parents[1][tree.parents[0][kmeans.assign(vectors, leaves)[0]]]
    assert len(np.unique(np.stack([numbers, label]), axis=1).T) == GROUPS


@pytest.mark.parametrize("method", ["average", "kmeans"])
@pytest.mark.parametrize("num_leaves", [0, 1, 3])
def test_levels_have_at_most_as_many_clusters_as_the_level_below(num_leaves, method):
    eye = np.eye(8, dtype=np.float32)
    tree = grow(eye[:num_leaves], (100, 50), 5, seed=0, rounds=1, num_threads=1, method=method)
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
        grow(leaves, (5,), 0, seed=0, rounds=0, method="kmeans")
    with pytest.raises(DimensionError, match="at least 1"):
        grow(leaves, (5, 0), 5, seed=0, rounds=0)
    with pytest.raises(DimensionError, match="auto"):
        grow(leaves, ("auto", 5), 5, seed=0, rounds=0)
    with pytest.raises(DimensionError, match="auto"):
        grow(leaves, ("auto",), 5, seed=0, rounds=0, method="kmeans")
