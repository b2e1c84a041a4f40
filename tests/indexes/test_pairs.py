import json

import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError, UsageError, VectorError
from curation.indexes.components import UnionFind
from curation.indexes.pairs import ExactPairs, InvertedPairs

DIM = 96
FLOORS = (0.6, 0.7)


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def moved(rng, vectors, cosines):
    """Return rows at these cosines to the given ones."""
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    noise = rng.standard_normal(rows.shape)
    noise -= (noise * rows).sum(axis=1, keepdims=True) * rows
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return unit(cosines[:, None] * rows + np.sqrt(1 - cosines[:, None] ** 2) * noise)


def pool(num=1500, seed=0):
    """Return clusters, pairs at all cosines from 0.6, and a group of near-identical rows; none identical."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, DIM))
    vectors = unit(centres[rng.integers(0, 20, num)] * 0.4 + rng.standard_normal((num, DIM)))
    vectors[num // 2 : num // 2 + 200] = moved(rng, vectors[:200], rng.uniform(0.601, 1, 200))
    vectors[-40:] = moved(rng, np.repeat(vectors[:1], 40, axis=0), np.full(40, 0.97))
    return vectors


def pairs(edges):
    return {(int(i), int(j)): float(s) for piece in edges for i, j, s in zip(*piece, strict=True)}


def brute(left, right, floor):
    scores = np.round(left.astype(np.float64) @ right.astype(np.float64).T, 6)
    if left is right:
        scores = np.triu(scores, 1)
    return {(int(i), int(j)): float(scores[i, j]) for i, j in zip(*np.nonzero(scores > floor), strict=True)}


def self_pairs(search, vectors, floor=0.6, **options):
    return pairs(search.self_pairs(vectors, search.encode(vectors), floor, **options))


def cross_pairs(search, left, right, floor=0.6, **options):
    return pairs(search.cross_pairs(left, search.encode(left), right, search.encode(right), floor, **options))


@pytest.fixture(scope="module")
def inverted():
    return InvertedPairs.fit(pool(), 1500, FLOORS, 0.97)


@pytest.fixture(params=["exact", "inverted"])
def search(request, inverted):
    return ExactPairs() if request.param == "exact" else inverted


@pytest.mark.parametrize("floor", [0.6, 0.65, 0.7, 0.9])
def test_pairs_are_true_and_few_are_missed(search, floor):
    vectors = pool()
    found, wanted = self_pairs(search, vectors, floor), brute(vectors, vectors, floor)
    assert found.items() <= wanted.items()
    assert len(found) >= (0.97 if isinstance(search, InvertedPairs) else 1) * len(wanted) > 500


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_pool_cut_into_blocks_gives_the_same_pairs(search, num_threads):
    vectors = pool()
    whole = self_pairs(search, vectors)
    parts = [(start, vectors[start : start + 400]) for start in range(0, len(vectors), 400)]
    found = {}
    for number, (left, left_vectors) in enumerate(parts):
        for right, right_vectors in parts[number:]:
            some = (
                self_pairs(search, left_vectors, num_threads=num_threads)
                if left == right
                else cross_pairs(search, left_vectors, right_vectors, num_threads=num_threads)
            )
            found |= {(i + left, j + right): s for (i, j), s in some.items()}
    assert found == whole


def test_a_code_does_not_depend_on_the_batch(inverted):
    vectors = pool()
    whole = inverted.encode(vectors)
    assert whole.shape == (len(vectors), inverted.code_bytes)
    for start, stop in ((0, 1), (5, 12), (1000, 1500)):
        assert np.array_equal(inverted.encode(vectors[start:stop]), whole[start:stop])


def test_pieces_are_sorted_and_no_pair_comes_twice(search):
    vectors = pool()
    seen = set()
    for left, right, _ in search.self_pairs(vectors, search.encode(vectors), 0.6):
        assert len(left)
        assert (left < right).all()
        some = list(zip(left.tolist(), right.tolist(), strict=True))
        assert some == sorted(some)
        assert not seen.intersection(some)
        seen.update(some)


def test_the_order_of_pieces_does_not_depend_on_threads(inverted):
    vectors = pool()
    codes = inverted.encode(vectors)
    one, three = ([list(map(list, e)) for e in inverted.self_pairs(vectors, codes, 0.6, n)] for n in (1, 3))
    assert one == three


def test_identical_rows_are_a_star_and_components_are_those_of_all_pairs(search):
    vectors = pool()
    rng = np.random.default_rng(1)
    crowd = np.repeat(vectors[[3, 200]], [30, 50], axis=0)
    vectors = np.concatenate([vectors, crowd])[rng.permutation(len(vectors) + len(crowd))]
    found, wanted = self_pairs(search, vectors), brute(vectors, vectors, 0.6)
    identical = [pair for pair in wanted if np.array_equal(*vectors[list(pair)])]
    assert len(identical) == 31 * 30 // 2 + 51 * 50 // 2
    assert sum(pair in found for pair in identical) == 80
    labels = []
    for edges in (found, {pair: s for pair, s in wanted.items() if pair in found or pair in identical}):
        union = UnionFind(len(vectors))
        union.add(*np.array(list(edges)).T)
        labels.append(union.labels())
    assert np.array_equal(*labels)


def test_thousands_of_identical_rows_are_linear(search):
    vectors = np.concatenate([np.repeat(pool()[:1], 20_000, axis=0), pool()[1:50]])
    found = self_pairs(search, vectors)
    assert sum(i == 0 and j < 20_000 for i, j in found) == 19_999
    assert len(found) < 21_000


def test_each_identical_row_of_either_side_has_its_edges(search):
    left, right = pool(600), pool(600)[::-1]
    left, right = np.concatenate([left, left[:4], left[:4]]), np.concatenate([right, right[-4:]])
    found, wanted = cross_pairs(search, left, right), brute(left, right, 0.6)
    assert found.items() <= wanted.items()
    assert {i for i, _ in found} == {i for i, _ in wanted} == set(range(len(left)))
    assert {j for _, j in found} == {j for _, j in wanted} == set(range(len(right)))
    best = dict.fromkeys(range(len(left)), 0.0)
    for (i, _), similarity in found.items():
        best[i] = max(best[i], similarity)
    assert best == {i: max(s for (k, _), s in wanted.items() if k == i) for i in best}


def test_a_floor_above_the_similarity_of_identical_rows_leaves_them_alone(search):
    vectors = np.repeat(pool()[:5], 2, axis=0)
    own = np.round((vectors.astype(np.float64) ** 2).sum(axis=1), 6)
    floor = float(np.sort(own)[5])
    assert self_pairs(search, vectors, floor) == brute(vectors, vectors, floor)


@pytest.mark.parametrize(("num_left", "num_right"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_few_or_no_rows(search, num_left, num_right):
    left, right = pool()[:num_left], pool()[:num_right]
    assert self_pairs(search, left) == {}
    assert cross_pairs(search, left, right) == brute(left, right, 0.6)


def test_bad_vectors_are_refused(inverted):
    bad = pool()[:3].copy()
    bad[1] = 0
    with pytest.raises(VectorError, match="1"):
        inverted.encode(bad)
    with pytest.raises(DimensionError, match="96"):
        inverted.encode(pool()[:, :90])
    with pytest.raises(DimensionError, match="codes"):
        list(inverted.self_pairs(pool(), inverted.encode(pool())[:-1], 0.6))


def test_a_floor_below_the_fitted_ones_is_refused(inverted):
    with pytest.raises(UsageError, match=r"0\.6 and above"):
        self_pairs(inverted, pool(), 0.59)


def test_a_recall_out_of_reach_is_refused():
    with pytest.raises(UsageError, match=r"raise dedup\.edge_floor"):
        InvertedPairs.fit(pool()[:100], 1000, [0.05], 0.999)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_tiny_sample_will_do(num_rows):
    search = InvertedPairs.fit(pool()[:num_rows], 10**6, [0.8])
    vectors = pool()
    wanted = brute(vectors, vectors, 0.8)
    assert len(self_pairs(search, vectors, 0.8)) >= 0.97 * len(wanted)


def test_a_large_pool_joins_hashes_and_finds_the_same():
    search = InvertedPairs.fit(pool(), 10**8, [0.7], 0.97)
    assert search.describe()["floors"][0]["size"] > 1
    vectors = pool()
    wanted = brute(vectors, vectors, 0.7)
    assert len(self_pairs(search, vectors, 0.7)) >= 0.97 * len(wanted)


def test_a_saved_search_is_the_same(inverted, tmp_path):
    path = tmp_path / "pairs.npz"
    inverted.save(path)
    loaded = InvertedPairs.load(path)
    assert loaded.describe() == inverted.describe()
    assert self_pairs(loaded, pool()) == self_pairs(inverted, pool())
    loaded.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "pickle", "other", "more rotations", "no floors"])
def test_a_damaged_file_is_refused(inverted, tmp_path, damage):
    path = tmp_path / "pairs.npz"
    inverted.save(path)
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:500])
        case "text":
            path.write_text("{}")
        case "pickle":
            np.savez(path, version=np.array({"a": 1}, object))
        case "other":
            with np.load(path) as arrays:
                np.savez(path, **(dict(arrays) | {"signs": arrays["signs"][:-1]}))
        case "more rotations" | "no floors":
            with np.load(path) as arrays:
                kept = dict(arrays)
            about = json.loads(kept["about"].tobytes())
            if damage == "no floors":
                about["floors"] = []
            else:
                about["floors"][0]["rotations"] = 60
            np.savez(path, **(kept | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}))
    with pytest.raises(CorruptError, match="fit it again"):
        InvertedPairs.load(path)


def test_memory_maps_are_searched_as_they_are(inverted, tmp_path):
    vectors = pool()
    vectors.tofile(tmp_path / "vectors")
    inverted.encode(vectors).tofile(tmp_path / "codes")
    mapped = np.memmap(tmp_path / "vectors", np.float16, "r", shape=vectors.shape)
    codes = np.memmap(tmp_path / "codes", np.uint8, "r", shape=(len(vectors), inverted.code_bytes))
    assert pairs(inverted.self_pairs(mapped, codes, 0.6)) == self_pairs(inverted, vectors)
