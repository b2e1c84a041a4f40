import numpy as np
import pytest

from curation.indexes.exact import nearest
from curation.indexes.flat import FlatIndex
from curation.indexes.index import train
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.parameters import choose
from curation.indexes.tuning import tune


@pytest.fixture
def pool(mixture):
    vectors, keys = mixture.vectors(3000, dim=24, centres=40, spread=0.6), mixture.keys(3000)
    index = IvfPqIndex.train(vectors[300:], choose(3000, 24, "ivf_pq"))
    index.add(vectors, keys)
    return index, vectors, keys


def test_the_recall_that_is_asked_for_is_found_on_other_queries(pool):
    index, vectors, keys = pool
    costs = []
    for recall in (0.6, 0.9, 0.99):
        index.probing = tune(index, vectors[:300], keys[:300], recall)
        found = index.search(vectors[300:600], 5).keys
        exact = nearest(vectors[300:600], [(vectors, keys)], 5).keys
        share = (exact[:, :, None] == found[:, None]).all(axis=3).any(axis=2).mean()
        assert index.probing.recall >= recall
        assert share > recall - 0.05
        costs.append(index.probing.probes * 60 + index.probing.depth * 90)
    assert costs[0] < costs[2] < index.quantizer.num_lists * 60


def test_what_is_measured_does_not_depend_on_parts(pool):
    index, vectors, keys = pool
    parts = index.empty()
    for rows in np.array_split(np.arange(3000)[::-1], 4):
        part = index.empty()
        part.add(vectors[rows], keys[rows])
        parts.merge(part)
    assert tune(parts, vectors[:200], keys[:200], 0.9) == tune(index, vectors[:200], keys[:200], 0.9)


def test_given_numbers_are_kept_and_what_cannot_be_reached_is_said(pool, caplog):
    index, vectors, keys = pool
    probing = tune(index, vectors[:200], keys[:200], 1.0, probes=1, depth=4)
    assert (probing.probes, probing.depth) == (1, 4)
    assert probing.recall < 1
    assert "1.0000 was asked for" in caplog.text


def test_where_codes_are_too_coarse_for_any_search_it_is_exact(mixture):
    vectors, keys = mixture.vectors(3000, dim=64, centres=40, spread=0.3), mixture.keys(3000)
    elsewhere = mixture.rng.standard_normal((400, 64))
    elsewhere = (elsewhere / np.linalg.norm(elsewhere, axis=1, keepdims=True)).astype(np.float16)
    index = IvfPqIndex.train(vectors, choose(3000, 64, "ivf_pq", code_bytes=1))
    index.add(vectors, keys)

    index.probing = tune(index, elsewhere[:200], mixture.keys(200), 0.999)

    found, exact = index.search(elsewhere[200:], 5), nearest(elsewhere[200:], [(vectors, keys)], 5)
    assert index.probing.recall == 1.0
    assert np.array_equal(found.keys, exact.keys)
    assert np.array_equal(found.similarities, exact.similarities)


def test_nothing_to_measure_on_is_no_special_case(pool):
    index, vectors, keys = pool
    assert tune(index.empty(), vectors[:5], keys[:5], 0.9).recall is None
    assert tune(index, vectors[:0], keys[:0], 0.9).recall is None
    one = index.empty()
    one.add(vectors[:1], keys[:1])
    assert tune(one, vectors[:1], keys[:1], 0.9).recall == 1.0  # it has no neighbour to miss


def test_a_search_for_more_takes_more_candidates(pool):
    index, vectors, keys = pool
    probing = tune(index, vectors[:200], keys[:200], 0.9)
    assert probing.for_k(4).depth == probing.depth
    assert probing.for_k(32).depth == 8 * probing.depth
    assert probing.for_k(10_000).depth >= 10_000


@pytest.mark.parametrize(
    ("num_vectors", "dim", "kind"),
    [(0, 8, "flat"), (100_000, 256, "flat"), (1_000_000, 256, "ivf_pq"), (72_000, 1280, "ivf_pq")],
)
def test_the_table_goes_by_size(num_vectors, dim, kind):
    assert choose(num_vectors, dim).kind == kind
    assert choose(num_vectors, dim, "flat").kind == "flat"


def test_entries_of_the_table_stay_within_bounds_and_can_be_overridden():
    for num_vectors in (1, 10, 5000, 10**6, 10**9, 10**12):
        for dim in (1, 2, 7, 256, 1280, 4096):
            chosen = choose(num_vectors, dim, "ivf_pq")
            assert 1 <= chosen.num_lists <= 1 << 18
            assert 1 <= chosen.code_bytes <= 43
            assert chosen.coded_dim <= min(dim, 256)
            assert chosen.sample_size <= min(num_vectors, 40 << 18)
    chosen = choose(10**6, 256, "ivf_pq", 77, 20)
    assert (chosen.num_lists, chosen.code_bytes) == (77, 20)


def test_training_gives_an_empty_index_of_the_kind(mixture):
    vectors = mixture.vectors(50)
    assert isinstance(train(vectors, choose(50, 16)), FlatIndex)
    index = train(vectors, choose(50, 16, "ivf_pq"))
    assert isinstance(index, IvfPqIndex)
    assert (len(index), index.dim) == (0, 16)
