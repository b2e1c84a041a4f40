"""Figures that tell learning from collapse.

Normal: ``teacher_entropy`` well inside (0, log K), ``rank`` growing with training, many prototypes used. Collapse to
one answer for all images: Sinkhorn-Knopp then has nothing to tell rows apart and ``teacher_entropy`` reaches log K,
while ``rank`` and ``prototypes_used`` fall to the least possible.
"""

import torch
from torch import Tensor


@torch.no_grad()
def entropy(p_NK: Tensor) -> Tensor:
    """Return the mean Shannon entropy of the rows, in nats.

    For the teacher these are its targets after temperature and Sinkhorn-Knopp: 0 when each row is sure of one
    prototype, log K when it says nothing.
    """
    mean: Tensor = torch.special.entr(p_NK.float()).sum(dim=1).mean()
    return mean


@torch.no_grad()
def prototypes_used(scores_NK: Tensor) -> Tensor:
    """Return the number of different best prototypes / the most that is possible, in (0, 1]."""
    rows, prototypes = scores_NK.shape
    return torch.tensor(len(torch.unique(scores_NK.argmax(dim=1))) / min(rows, prototypes))


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
