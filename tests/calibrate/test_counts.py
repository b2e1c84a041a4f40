"""Counts against a plain count, pair by pair."""

import numpy as np
import pytest

from curation.calibrate.counts import THRESHOLDS, Similar, intervals, measure, similar_originals, table_of
from curation.calibrate.describe import Described, plan_copies
from curation.edits import EDITS

SIZE, DIM = 40, 6
NONE = np.empty((SIZE, 0), np.int64)
NOBODY = Similar(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


def described(seed, like=None, noise=0.5):
    rng = np.random.default_rng(seed)
    x_ND = rng.standard_normal((SIZE, DIM))
    x_ND = x_ND if like is None else like.vectors_ND.astype(np.float64) + noise * x_ND
    unit_ND = (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float16)
    return Described(unit_ND, rng.uniform(0, 0.3, SIZE), np.ones(SIZE, bool))


@pytest.fixture(scope="module")
def originals():
    return described(0)


@pytest.fixture(scope="module")
def copies(originals):
    return described(1, originals)


@pytest.mark.parametrize("score", ["cosine", "normalised"])
def test_counts_are_those_of_every_pair(score, originals, copies):
    copies.good_N[3] = originals.good_N[5] = False
    others_NK = np.full((SIZE, 2), -1)
    others_NK[7] = [8, 9]
    similar = Similar(np.array([1, 10]), np.array([2, 30]), np.array([0.9, 0.8]))
    doubtful = {(1, 2), (2, 1), (10, 30), (30, 10)}

    found = measure(originals, copies, others_NK, similar, score)

    for place, threshold in enumerate(THRESHOLDS[score]):
        right, wrong, doubt = (np.zeros(SIZE, int) for _ in range(3))
        for i in range(SIZE):
            for j in range(SIZE):
                if i == 3 or j == 5 or j in others_NK[i]:
                    continue
                cosine = copies.vectors_ND[i].astype(np.float64) @ originals.vectors_ND[j].astype(np.float64)
                value = round(round(cosine, 6) - (copies.bias_N[i] if score == "normalised" else 0), 6)
                counter = right if i == j else doubt if (i, j) in doubtful else wrong
                counter[i] += value > threshold
        assert (found.found_NT[:, place] == right).all()
        assert (found.wrong_NT[:, place] == wrong).all()
        assert (found.doubtful_NT[:, place] == doubt).all()
    copies.good_N[3] = originals.good_N[5] = True


def test_pairs_that_do_not_count_are_not_in_the_number_of_pairs(originals, copies):
    others_NK = np.full((SIZE, 1), -1)
    others_NK[7] = 8
    found = measure(originals, copies, others_NK, Similar(np.array([1]), np.array([2]), np.array([0.9])))

    assert found.num_wrong_N.sum() == SIZE * (SIZE - 1) - 1 - 2
    assert found.num_doubtful_N.sum() == 2


def test_similar_originals_are_each_pair_once_most_similar_first(originals):
    found = similar_originals(originals, 0.5)
    x_ND = originals.vectors_ND.astype(np.float64)

    expected = {(i, j) for i in range(SIZE) for j in range(i + 1, SIZE) if round(x_ND[i] @ x_ND[j], 6) > 0.5}
    assert set(zip(found.left.tolist(), found.right.tolist(), strict=True)) == expected
    assert (np.diff(found.cosine) <= 0).all()


def test_a_row_of_the_table_adds_up(originals, copies):
    found = measure(originals, copies, NONE, NOBODY)
    row = table_of("cosine", "all", None, [(found, np.ones(SIZE, bool))] * 2)[50]

    assert row["copies"] == 2 * SIZE
    assert row["different_pairs"] == 2 * SIZE * (SIZE - 1)
    assert row["found"] == 2 * found.found_NT[:, 50].sum()
    assert row["precision"] == row["found"] / (row["found"] + row["wrong"])


def test_an_interval_holds_what_was_seen_and_is_narrower_with_more_images():
    def interval(times):
        found = np.tile(np.array([[1], [1], [1], [0]]), (times, 1))
        wrong = np.tile(np.array([[0], [0], [0], [1]]), (times, 1))
        part = measure_of(found, wrong)
        return intervals([part], len(found), 0)

    few, many = interval(10), interval(200)
    for one in (few, many):
        assert one.recall_low[0] < 0.75 < one.recall_high[0]
        assert one.precision_low[0] < one.precision[0] == 0.75 < one.precision_high[0]
    assert many.recall_high[0] - many.recall_low[0] < 0.3 * (few.recall_high[0] - few.recall_low[0])


def measure_of(found_NT, wrong_NT):
    from curation.calibrate.counts import Measured

    none = np.zeros(len(found_NT), np.int64)
    return Measured(found_NT, wrong_NT, np.zeros_like(wrong_NT), none, none)


def test_no_wrong_pair_among_few_does_not_prove_precision():
    few = intervals([measure_of(np.ones((20, 1), int), np.zeros((20, 1), int))], 20, 0)
    many = intervals([measure_of(np.ones((2000, 1), int), np.zeros((2000, 1), int))], 2000, 0)

    assert few.precision[0] == many.precision[0] == 1
    assert few.precision_low[0] < 0.9
    assert many.precision_low[0] > 0.99


def test_a_larger_pool_makes_the_same_wrong_pairs_count_for_more():
    part = measure_of(np.ones((101, 1), int), np.eye(101, 1, dtype=int))

    assert intervals([part], 101, 0).precision[0] == pytest.approx(101 / 102)
    assert intervals([part], 10_001, 0).precision[0] == pytest.approx(101 / 201)


def test_every_image_gets_each_edit_and_strengths_come_by_turns():
    plans = plan_copies(EDITS, 31, seed=5)

    assert [plan.edit.name for plan in plans] == [edit.name for edit in EDITS]
    for plan in plans:
        counts = np.bincount(plan.strength_N, minlength=len(plan.edit.strengths))
        assert counts.max() - counts.min() <= 1
        for image, (place, others) in enumerate(zip(plan.strength_N, plan.others_NK, strict=True)):
            real = [other for other in others.tolist() if other >= 0]
            assert len(real) == len(set(real)) == plan.edit.num_others(plan.edit.strengths[place])
            assert image not in real
