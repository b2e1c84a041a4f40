"""Each measure against the same figure computed another way."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from curation.dinov2.evaluate import linear
from curation.dinov2.evaluate.config import LinearConfig, LogisticConfig
from curation.dinov2.evaluate.knn import knn_accuracy
from curation.dinov2.evaluate.linear import probe, split_off
from curation.dinov2.evaluate.logistic import fit, logistic_regression
from curation.dinov2.evaluate.spectrum import spectrum
from curation.errors import InputError

CPU = torch.device("cpu")


def test_knn_is_the_vote_counted_one_image_at_a_time(monkeypatch, clouds):
    monkeypatch.setattr("curation.dinov2.evaluate.knn._QUERIES", 7)
    monkeypatch.setattr("curation.dinov2.evaluate.knn._KEYS", 13)
    train, test = clouds(90, 6, 5, spread=1.5), clouds(40, 6, 5, seed=1, spread=1.5)
    found = knn_accuracy(train, test, 6, (1, 4, 80), 0.5, CPU)

    last = train.num_blocks - 1
    keys, queries = (part.slots_NSD[:, last] / np.linalg.norm(part.slots_NSD[:, last], axis=1, keepdims=True)
                     for part in (train, test))  # fmt: skip
    for k, (top1, top5) in found.items():
        first = five = 0
        for query, truth in zip(queries, test.label_N, strict=True):
            cosines = keys @ query
            votes = np.zeros(6)
            for row in np.argsort(-cosines)[:k]:
                votes[train.label_N[row]] += math.exp(cosines[row] / 0.5)
            order = np.argsort(-votes)
            first += order[0] == truth
            five += truth in order[:5]
        assert top1 == first / 40
        if k == 80:  # fewer neighbours may leave classes without a vote, any of which may be among the five
            assert top5 == five / 40


def test_knn_with_more_neighbours_than_images_says_so(clouds):
    with pytest.raises(InputError, match=r"k = 20 needs as many images to learn from, and there are 10"):
        knn_accuracy(clouds(10, 2, 4), clouds(5, 2, 4), 2, (5, 20), 0.07, CPU)


def test_the_probe_is_sgd_of_one_linear_layer_at_a_time(clouds):
    train, test = clouds(70, 3, 6), clouds(50, 3, 6, seed=1)
    config = LinearConfig(learning_rates=(0.02, 0.5), blocks=(1, 2), epochs=3, batch_size=16)
    grid = {(head.blocks, head.pooled, head.learning_rate): head for head in probe(train, test, 3, config, 5, CPU)}
    learned, held = split_off(70, config.holdout, 5)
    assert len(grid) == 8

    for (blocks, pooled, rate), head in grid.items():
        layer = nn.Linear(train.joined(learned[:1], blocks, pooled=pooled).shape[1], 3)
        with torch.no_grad():
            start = 0.01 * torch.randn(layer.in_features, 3, generator=torch.Generator().manual_seed(5))
            layer.weight.copy_(start.T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 16 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * math.ceil(63 / 16))
        for rows in linear._batches(learned, config, 5):
            x, labels = train.joined(rows, blocks, pooled=pooled), torch.from_numpy(train.label_N[rows])
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x), labels).backward()
            optimizer.step()
            schedule.step()
        for features, rows, accuracy in ((train, held, head.holdout), (test, np.arange(50), head.test)):
            answers = layer(features.joined(rows, blocks, pooled=pooled)).argmax(dim=1).numpy()
            assert accuracy == pytest.approx((answers == features.label_N[rows]).mean())


def test_the_probe_reports_the_head_that_held_out_images_choose_first(clouds):
    heads = probe(
        clouds(80, 3, 16, spread=0.5), clouds(50, 3, 16, seed=1, spread=0.5), 3, LinearConfig(epochs=2), 0, CPU
    )

    assert len(heads) == 13 * 2 * 2
    assert heads[0].holdout == max(head.holdout for head in heads)
    assert heads[0].test > 0.8


def test_a_head_that_diverges_counts_as_nothing_and_says_so(clouds):
    train = clouds(40, 2, 4)
    config = LinearConfig(learning_rates=(0.1, 1e38), blocks=(1,), pooled=(False,), epochs=5)
    good, bad = probe(train, clouds(20, 2, 4, seed=1), 2, config, 0, CPU)

    assert (good.diverged, good.learning_rate) == (False, 0.1)
    assert (bad.diverged, bad.holdout, bad.test) == (True, 0.0, 0.0)


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_regression_agrees_with_scikit_learn(c, clouds):
    sklearn = pytest.importorskip("sklearn.linear_model")
    train = clouds(60, 3, 5, spread=1.5)
    x = torch.nn.functional.normalize(train.joined(np.arange(60), 1, pooled=False), dim=1).numpy()

    weights = fit(train, np.arange(60), torch.zeros(6, 3), c, 300).numpy()

    theirs = sklearn.LogisticRegression(C=c, tol=1e-8, max_iter=2000).fit(x, train.label_N)
    np.testing.assert_allclose(weights[:-1], theirs.coef_.T, atol=2e-3 * max(1, abs(theirs.coef_).max()))


def test_logistic_regression_chooses_c_by_held_out_images(clouds):
    train, test = clouds(80, 3, 16, spread=0.5), clouds(50, 3, 16, seed=1, spread=0.5)

    found = logistic_regression(train, test, 3, LogisticConfig(powers=(-6.0, 0.0, 3.0)), 0, CPU)

    assert (found.holdout, found.c) == (1, 1e-6)  # of equals the strongest penalty
    assert found.test > 0.95


@pytest.mark.parametrize("num", [50, 5])  # more rows than features, and fewer
def test_rankme_is_its_definition(num):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 9)
    singular = torch.linalg.svdvals(x[:num].double())
    share = singular / singular.sum() + 1e-7

    found, _ = spectrum(iter(x[:num].split(11)), num)

    assert found == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_power_of_a_planted_spectrum(alpha):
    rng = np.random.default_rng(0)
    directions, _ = np.linalg.qr(rng.normal(size=(500, 40)))
    directions -= directions.mean(axis=0)
    directions, _ = np.linalg.qr(directions)
    x = torch.from_numpy(directions * np.arange(1.0, 41) ** (-alpha / 2) + 3.0)

    assert spectrum(iter(x.split(70)), 500)[1] == pytest.approx(alpha, rel=0.01)


def test_alpha_req_of_too_few_images_is_none():
    assert spectrum(iter([torch.randn(3, 8)]), 3)[1] is None
