import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError
from curation.indexes.components import UnionFind


def by_search(num_rows, left, right):
    """Components by repeated walks over neighbours."""
    near = [[] for _ in range(num_rows)]
    for i, j in zip(left.tolist(), right.tolist(), strict=True):
        near[i].append(j)
        near[j].append(i)
    labels = [-1] * num_rows
    for start in range(num_rows):
        todo = [start] if labels[start] < 0 else []
        while todo:
            row = todo.pop()
            if labels[row] < 0:
                labels[row] = start
                todo += near[row]
    return labels


def test_labels_are_the_smallest_rows_of_components_in_any_order_of_edges():
    rng = np.random.default_rng(1)
    left, right = rng.integers(0, 1000, (2, 600))
    wanted = by_search(1000, left, right)
    for batch in (1, 100, 600):
        order = rng.permutation(600)
        components = UnionFind(1000)
        for start in range(0, 600, batch):
            part = order[start : start + batch]
            components.add(left[part], right[part].astype(np.int32))
            components.labels()  # looking changes nothing
        assert components.labels().tolist() == wanted
        assert components.labels(300, 700).tolist() == wanted[300:700]
        assert components.labels().dtype == np.int64


def test_a_long_chain_is_one_component():
    rows = np.arange(1_000_000)
    for left, right in ((rows[:-1], rows[1:]), (rows[:0:-1], rows[-2::-1])):
        components = UnionFind(len(rows))
        components.add(left, right)
        assert not components.labels().any()


def test_memory_is_four_bytes_a_row():
    assert UnionFind(1000)._parents.nbytes == 4000


def test_rows_without_edges_stay_alone():
    components = UnionFind(4)
    components.add(np.array([], np.int64), np.array([], np.int64))
    components.add(np.array([3, 2]), np.array([3, 2]))
    assert components.labels().tolist() == [0, 1, 2, 3]
    assert UnionFind(0).labels().tolist() == []


def test_edges_outside_are_refused_and_change_nothing():
    components = UnionFind(4)
    for left, right in (([0], [4]), ([-1], [0]), ([0, 1], [1]), ([0.0], [1.0]), ([[0]], [[1]])):
        with pytest.raises(DimensionError):
            components.add(np.array(left), np.array(right))
    assert components.labels().tolist() == [0, 1, 2, 3]
    with pytest.raises(DimensionError):
        UnionFind(-1)


def test_components_go_on_from_a_checkpoint(tmp_path):
    left, right = np.random.default_rng(2).integers(0, 500, (2, 400))
    whole, half = UnionFind(500), UnionFind(500)
    whole.add(left, right)
    half.add(left[:200], right[:200])
    half.save(tmp_path / "half.npy")
    resumed = UnionFind.load(tmp_path / "half.npy", 500)
    assert np.array_equal(resumed.labels(), half.labels())
    resumed.add(left[150:], right[150:])  # some again
    assert np.array_equal(resumed.labels(), whole.labels())


@pytest.mark.parametrize("content", [None, b"", b"x" * 300, "other rows", "larger parents", "objects"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "parents.npy"
    match content:
        case "other rows":
            UnionFind(5).save(path)
        case "larger parents":
            np.save(path, np.array([1, 1, 2, 3], np.uint32))
        case "objects":
            np.save(path, np.array([None] * 4, object))
        case bytes():
            path.write_bytes(content)
    with pytest.raises(CorruptError, match="start again"):
        UnionFind.load(path, 4)
