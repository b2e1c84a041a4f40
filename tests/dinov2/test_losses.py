import math

import pytest
import torch
from torch.nn import functional

from curation.dinov2 import losses, monitors


def scores(rows, prototypes, scale=1.0):
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(rows * prototypes)) * scale


@pytest.mark.parametrize(("rows", "prototypes"), [(32, 8), (8, 32), (16, 16)])
def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_equally(rows, prototypes):
    p = losses.sinkhorn_knopp(scores(rows, prototypes), 0.5, rounds=50)

    torch.testing.assert_close(p.sum(dim=1), torch.ones(rows))
    torch.testing.assert_close(p.sum(dim=0), torch.full((prototypes,), rows / prototypes), rtol=1e-3, atol=1e-3)


def test_three_rounds_leave_rows_that_sum_to_one():
    p = losses.sinkhorn_knopp(scores(12, 40), 0.05)

    torch.testing.assert_close(p.sum(dim=1), torch.ones(12))


@pytest.mark.parametrize("temperature", [1e-4, 0.04])
def test_sinkhorn_does_not_overflow(temperature):
    p = losses.sinkhorn_knopp(scores(12, 40, scale=100.0), temperature)

    assert torch.isfinite(p).all()
    torch.testing.assert_close(p.sum(dim=1), torch.ones(12))


def test_equal_rows_are_assigned_to_no_prototype_in_particular():
    p = losses.sinkhorn_knopp(scores(1, 40).repeat(12, 1), 0.04)

    torch.testing.assert_close(p, torch.full((12, 40), 1 / 40))
    assert monitors.entropy(p).item() == pytest.approx(math.log(40), rel=1e-5)


def test_cross_entropy_equals_the_log_softmax_form_and_so_does_its_gradient():
    p = functional.softmax(scores(6, 10), dim=1)
    one, other = scores(6, 10, 2.0).requires_grad_(), scores(6, 10, 2.0).requires_grad_()
    ours = losses.cross_entropy(p, one, 0.1)
    theirs = -(p * functional.log_softmax(other / 0.1, dim=1)).sum(dim=1)
    ours.sum().backward()
    theirs.sum().backward()

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(one.grad, other.grad)


def test_local_loss_sums_every_pair_of_crop_and_teacher_view():
    p = functional.softmax(scores(8, 10), dim=1).view(2, 4, 10)
    student = scores(12, 10).requires_grad_()  # three local crops of four images
    pairs = sum(losses.cross_entropy(view, crop, 0.1).mean() for crop in student.chunk(3) for view in p)

    torch.testing.assert_close(losses.dino_local_loss(p, student, 0.1), pairs)


def test_koleo_is_finite_for_equal_rows_and_lower_for_rows_further_apart():
    equal = losses.koleo_loss(torch.ones(4, 8))
    spread = losses.koleo_loss(torch.eye(4, 8))

    assert torch.isfinite(equal)
    assert spread < equal
    assert spread.item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)


def test_entropy_of_certain_rows_is_zero():
    assert monitors.entropy(torch.eye(5)).item() == 0


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
