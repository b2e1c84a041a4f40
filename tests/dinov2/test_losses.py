import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from curation.dinov2 import losses, monitors
from curation.dinov2.centring import SinkhornKnopp
from curation.dinov2.scores import Assignment, Projected, Scores, dot


def scores(rows, prototypes, scale=1.0):
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(rows * prototypes)) * scale


def lazily(scores_NK, chunk_rows=5):
    return Scores(Projected(scores_NK, torch.eye(scores_NK.shape[1])), chunk_rows)


def sinkhorn_knopp(scores_NK, temperature, rounds=3):
    return SinkhornKnopp(rounds).assign(lazily(scores_NK), temperature)


@pytest.mark.parametrize(("rows", "prototypes"), [(32, 8), (8, 32), (16, 16)])
def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_equally(rows, prototypes):
    p = sinkhorn_knopp(scores(rows, prototypes), 0.5, rounds=50).rows()

    torch.testing.assert_close(p.sum(dim=1), torch.ones(rows))
    torch.testing.assert_close(p.sum(dim=0), torch.full((prototypes,), rows / prototypes), rtol=1e-3, atol=1e-3)


def test_three_rounds_leave_rows_that_sum_to_one():
    p = sinkhorn_knopp(scores(12, 40), 0.05).rows()

    torch.testing.assert_close(p.sum(dim=1), torch.ones(12))


@pytest.mark.parametrize("temperature", [1e-4, 0.04])
def test_sinkhorn_does_not_overflow(temperature):
    p = sinkhorn_knopp(scores(12, 40, scale=100.0), temperature).rows()

    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(12))


def test_equal_rows_are_assigned_to_no_prototype_in_particular():
    p = sinkhorn_knopp(scores(1, 40).repeat(12, 1), 0.04)

    torch.testing.assert_close(p.rows(), torch.full((12, 40), 1 / 40))
    assert monitors.entropy(p).item() == pytest.approx(math.log(40), rel=1e-5)


def head_rows(rows, dim=6, prototypes=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    unit, axes = torch.randn(rows, dim, generator=generator), torch.randn(prototypes, dim, generator=generator)
    return functional.normalize(unit, dim=1).requires_grad_(), axes.requires_grad_()


def plain_cross_entropy(p_NK, projected, temperature):
    return -(p_NK * functional.log_softmax(projected.scores() / temperature, dim=1)).sum(dim=1)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_class_token_loss_is_that_of_every_pair_of_crop_and_teacher_view(chunk_rows):
    teacher, student = Projected(*head_rows(8, seed=2)), Projected(*head_rows(20))  # two views, three local crops of 4
    views = SinkhornKnopp(3).assign(Scores(teacher, chunk_rows), 0.1).split([4, 4])
    loss, whole, local = losses.dino_loss(student, views, 0.1, chunk_rows)
    loss.backward()
    ours = [value.grad.clone() for value in student]
    for value in student:
        value.grad = None
    crops = student.split([4] * 5)
    pairs = [
        plain_cross_entropy(view.rows(), crop, 0.1).mean()
        for index, crop in enumerate(crops)
        for number, view in enumerate(views)
        if index != number
    ]
    (sum(pairs) / 8).backward()

    torch.testing.assert_close(loss.detach(), sum(pairs).detach() / 8)
    torch.testing.assert_close(whole, (pairs[0] + pairs[1]).detach() / 8)
    torch.testing.assert_close(local, sum(pairs[2:]).detach() / 8)
    for value, gradient in zip(student, ours, strict=True):
        torch.testing.assert_close(gradient, value.grad)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_patch_loss_in_chunks_is_that_of_all_rows_at_once(chunk_rows):
    teacher, student = Projected(*head_rows(9, seed=2)), Projected(*head_rows(9))
    weight = torch.rand(9, generator=torch.Generator().manual_seed(0))
    targets = SinkhornKnopp(3).assign(Scores(teacher, chunk_rows), 0.1)
    (3 * losses.ibot_loss(student, targets, weight, 4, 0.1, chunk_rows)).backward()
    ours = [value.grad.clone() for value in student]
    for value in student:
        value.grad = None
    whole = SinkhornKnopp(3).assign(Scores(teacher, 9), 0.1).rows()
    (3 * (weight * plain_cross_entropy(whole, student, 0.1)).sum() / 4).backward()

    for value, gradient in zip(student, ours, strict=True):
        torch.testing.assert_close(gradient, value.grad)


def test_a_part_without_masked_patches_teaches_nothing():
    teacher, student = Projected(*head_rows(0, seed=2)), Projected(*head_rows(0))
    targets = SinkhornKnopp(3).assign(Scores(teacher, 4), 0.1)
    loss = losses.ibot_loss(student, targets, torch.zeros(0), 4, 0.1, 4)
    loss.backward()

    assert loss.item() == 0
    assert student.prototypes_KD.grad.abs().max() == 0
    assert monitors.entropy(targets).item() == 0


def test_scores_in_chunks_take_the_memory_of_one():
    rows, prototypes, chunk_rows = 4096, 8192, 64
    peak = subprocess.run(
        [sys.executable, "-c", PEAK, str(rows), str(prototypes), str(chunk_rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    taken, all_scores = int(peak.stdout), rows * prototypes * 4

    assert taken < all_scores / 2


PEAK = """
import resource, sys, torch
from curation.dinov2 import losses, monitors
from curation.dinov2.centring import SinkhornKnopp
from curation.dinov2.scores import Projected, Scores

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(rows, prototypes, chunk_rows):
    unit, axes = torch.randn(rows, 8, requires_grad=True), torch.randn(prototypes, 8, requires_grad=True)
    scores = Scores(Projected(unit.detach(), axes.detach()), chunk_rows)
    targets = SinkhornKnopp(3).assign(scores, 0.1)
    monitors.entropy(targets)
    losses.ibot_loss(Projected(unit, axes), targets, torch.ones(rows), 4, 0.1, chunk_rows).backward()

step(64, 64, 32)  # what libraries take
before = peak()
step(*map(int, sys.argv[1:]))
print(peak() - before)
"""


def test_koleo_is_finite_for_equal_rows_and_lower_for_rows_further_apart():
    equal = losses.koleo_loss(torch.ones(4, 8))
    spread = losses.koleo_loss(torch.eye(4, 8))

    assert torch.isfinite(equal)
    assert spread < equal
    assert spread.item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)


def test_entropy_of_certain_rows_is_zero():
    certain = Assignment.of(lazily(1e3 * torch.eye(7)), torch.zeros(7), 0.1)

    assert monitors.entropy(certain).item() == 0


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_counts_equal_directions(rank):
    x = torch.zeros(12, 8)
    x[torch.arange(12), torch.arange(12) % rank] = 2.0

    assert monitors.spectra(x)[0].item() == pytest.approx(rank, rel=1e-4)


def test_prototypes_used_counts_different_winners():
    assert monitors.prototypes_used(torch.tensor([0, 1, 2, 3]), 8).item() == 1
    assert monitors.prototypes_used(torch.tensor([5, 5, 5, 5]), 8).item() == 0.25
    assert monitors.prototypes_used(torch.tensor([0, 1, 0, 1]), 2).item() == 1


@pytest.mark.parametrize(
    ("mean", "kl"), [([0.25] * 4, 0.0), ([1.0, 0, 0, 0], math.log(4)), ([0.5, 0.5, 0, 0], math.log(2))]
)
def test_kl_to_uniform_is_zero_for_equal_use_and_most_for_one_prototype(mean, kl):
    assert monitors.kl_to_uniform(torch.tensor(mean)).item() == pytest.approx(kl, abs=1e-6)


def test_nearest_distance_is_the_mean_to_the_nearest_other_row():
    x = torch.tensor([[1.0, 0], [2, 0], [0, 1]])

    assert monitors.nearest_distance(x).item() == pytest.approx(math.sqrt(2) / 3)
    assert monitors.nearest_distance(torch.ones(4, 8)).item() == pytest.approx(0, abs=1e-6)


def test_products_of_rows_are_not_rounded_by_autocast():
    a, b = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = dot(a, b)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (a.double() * b.double()).sum(dim=1), rtol=0, atol=1e-5)
