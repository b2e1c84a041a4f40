"""Figures that tell learning from collapse.

Normal: ``teacher_entropy`` well inside (0, log K), ``rank`` growing with training, many prototypes used. Collapse to
one answer for all images: Sinkhorn-Knopp then has nothing to tell rows apart and ``teacher_entropy`` reaches log K,
while ``rank``, ``koleo_distance`` and ``prototypes_used`` fall to the least possible. ``alarms.py`` says so in words.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.evaluate.spectrum import spectrum
from curation.dinov2.scores import Assignment, dot
from curation.dinov2.world import World


@torch.no_grad()
def of_teacher(assignment: Assignment, cls_parts: Sequence[Tensor], world: World) -> dict[str, Tensor]:
    """Return what the teacher's answers to the global crops of a whole step say, the same in every process.

    Args:
        assignment: Its targets for the class tokens.
        cls_parts: Class tokens of each micro-batch, crop-major.
        world: Whose processes have the other parts.

    Returns:
        ``teacher_kl``: how far the mean target is from using all prototypes alike; ``prototypes_used``; ``rank`` and
        ``alpha_req`` of the class tokens; ``koleo_distance``: mean distance of an image's unit class token to the
        nearest of another image.
    """
    scores = assignment.scores
    with torch.autocast(device_type=scores.device.type, enabled=False):
        cls_ND = world.gather(torch.cat(list(cls_parts)).float())
        first_crop_BD = world.gather(torch.cat([part.chunk(NUM_GLOBAL)[0] for part in cls_parts]).float())
        rank, alpha = spectra(cls_ND)
        mean_K = torch.zeros(scores.num_prototypes, device=scores.device)
        best = []
        for _, part_NK in scores.chunks():
            mean_K = mean_K + assignment.softmax(part_NK).sum(dim=0) / len(scores)
            best.append(part_NK.argmax(dim=1))
        figures = {
            "teacher_kl": kl_to_uniform(world.mean(mean_K)),
            "prototypes_used": prototypes_used(world.gather(torch.cat(best)), scores.num_prototypes),
            "rank": rank,
            "alpha_req": alpha,
            "koleo_distance": nearest_distance(first_crop_BD),
        }
    return {name: value.to(scores.device) for name, value in figures.items()}


@torch.no_grad()
def entropy(assignment: Assignment) -> Tensor:
    """Return the mean Shannon entropy of the rows, in nats; 0 where there are none.

    For the teacher these are its targets after temperature and centring: 0 when each row is sure of one prototype,
    log K when it says nothing.
    """
    scores = assignment.scores
    total = torch.zeros((), device=scores.device)
    for _, part_NK in scores.chunks():
        # -log p is what p lacks to its largest, whose probability is known: no logarithm for each of all prototypes.
        logits = assignment.logits(part_NK)
        p = torch.softmax(logits, dim=1)
        lacks = logits.amax(dim=1, keepdim=True) - logits
        total = total + dot(p, lacks).sum() - p.amax(dim=1).log().sum()
    return total / max(1, len(scores))


def kl_to_uniform(mean_K: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a distribution over prototypes from the uniform one, in nats.

    0 when all are used alike, log K when one takes everything. A batch of n rows that are sure of one prototype each
    cannot come below log (K / n).
    """
    divergence: Tensor = math.log(len(mean_K)) - torch.special.entr(mean_K.float()).sum()
    return divergence


def prototypes_used(best_N: Tensor, num_prototypes: int) -> Tensor:
    """Return the number of different best prototypes / the most that is possible, in (0, 1]."""
    return torch.tensor(len(torch.unique(best_N)) / min(len(best_N), num_prototypes))


def nearest_distance(x_ND: Tensor) -> Tensor:
    """Return the mean distance of each row, put to unit length, to the nearest other row, from 0 to 2."""
    with torch.autocast(x_ND.device.type, enabled=False):
        unit_ND = functional.normalize(x_ND.float(), dim=1)
        similarity_NN = unit_ND @ unit_ND.T
    similarity_NN.fill_diagonal_(-1)
    mean: Tensor = (unit_ND - unit_ND[similarity_NN.argmax(dim=1)]).norm(dim=1).mean()
    return mean


def spectra(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return RankMe and α-ReQ of the rows; not a number where they have none."""
    if not bool(torch.isfinite(x_ND).all()):
        return torch.tensor(math.nan), torch.tensor(math.nan)
    rank, alpha = spectrum(iter([x_ND]), len(x_ND))
    return torch.tensor(rank), torch.tensor(math.nan if alpha is None else alpha)
