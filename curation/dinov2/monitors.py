"""Figures that tell learning from collapse.

Normal: ``teacher_entropy`` well inside (0, log K), ``rank`` growing with training, many prototypes used. Collapse to
one answer for all images: Sinkhorn-Knopp then has nothing to tell rows apart and ``teacher_entropy`` reaches log K,
while ``rank`` and ``prototypes_used`` fall to the least possible.
"""

import torch
from torch import Tensor

from curation.dinov2.scores import Assignment, Scores


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
        total = total + torch.linalg.vecdot(p, lacks).sum() - p.amax(dim=1).log().sum()
    return total / max(1, len(scores))


@torch.no_grad()
def prototypes_used(scores: Scores) -> Tensor:
    """Return the number of different best prototypes / the most that is possible, in (0, 1]."""
    best = torch.cat([part_NK.argmax(dim=1) for _, part_NK in scores.chunks()])
    return torch.tensor(len(torch.unique(best)) / min(len(scores), scores.num_prototypes))


@torch.no_grad()
def effective_rank(x_ND: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values, from 1 to min(N, D).

    Source:
        Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised representations
        by their rank".
    """
    with torch.autocast(device_type=x_ND.device.type, enabled=False):
        x = x_ND.float()
        if not bool(torch.isfinite(x).all()):
            return torch.tensor(float("nan"))
        values = torch.linalg.svdvals(x)
        share = values / values.sum().clamp(min=1e-12)
        rank: Tensor = torch.special.entr(share).sum().exp()
        return rank
