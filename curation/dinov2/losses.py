"""The objective: DINO on class tokens, iBOT on masked patches, KoLeo; and what makes targets of the teacher's scores.

Everything here runs in float32 whatever the model runs in. Cross-entropy is logsumexp(s/T) − ⟨p, s⟩/T: the value and
gradient of −Σ p log softmax(s/T) without a second (rows, K) tensor.
"""

import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.world import ALONE, World

KOLEO_EPS = 1e-8


@torch.no_grad()
def sinkhorn_knopp(scores_NK: Tensor, temperature: float, rounds: int = 3, world: World = ALONE) -> Tensor:
    """Return the teacher's assignment of rows to prototypes, (N, K), each row summing to 1.

    Each round makes every prototype equally used by the rows of all processes, then every row sum to one. It runs on
    logarithms, so no temperature overflows.

    Source:
        Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments"; Cuturi 2013.
    """
    log_q = scores_NK.float() / temperature
    num_rows = world.sum(torch.tensor(float(scores_NK.shape[0]), device=scores_NK.device))
    share = (num_rows / scores_NK.shape[1]).log()
    for _ in range(rounds):
        log_q = log_q - world.logsumexp(torch.logsumexp(log_q, dim=0, keepdim=True)) + share
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


@torch.no_grad()
def centred_softmax(scores_NK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Return softmax((scores − centre) / temperature) of each row, (N, K).

    Source:
        Caron et al. 2021, "Emerging properties in self-supervised vision transformers" (centring and sharpening).
    """
    return torch.softmax((scores_NK.float() - centre_K) / temperature, dim=1)


def cross_entropy(p_NK: Tensor, scores_NK: Tensor, temperature: float, mass: float = 1.0) -> Tensor:
    """Return the cross-entropy of each row, (N,).

    Args:
        p_NK: Teacher probabilities, or the sum of several views of them.
        scores_NK: Student scores before the temperature.
        temperature: The student's.
        mass: What each row of ``p_NK`` sums to.
    """
    logits = scores_NK.float() / temperature
    return mass * torch.logsumexp(logits, dim=1) - (p_NK * logits).sum(dim=1)


def dino_local_loss(p_VBK: Tensor, scores_NK: Tensor, temperature: float) -> Tensor:
    """Return Σ over local crops and teacher views of the mean cross-entropy over images.

    Args:
        p_VBK: Teacher probabilities of each of V views.
        scores_NK: Student scores of the local crops, crop-major: N = crops · B.
        temperature: The student's.
    """
    views, images, _ = p_VBK.shape
    target_NK = p_VBK.sum(dim=0).repeat(scores_NK.shape[0] // images, 1)
    return cross_entropy(target_NK, scores_NK, temperature, mass=float(views)).sum() / images


def dino_global_loss(p_NK: Tensor, scores_NK: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy row by row; the caller has swapped the teacher's views."""
    return cross_entropy(p_NK, scores_NK, temperature).mean()


def ibot_loss(p_MK: Tensor, scores_MK: Tensor, weight_M: Tensor, num_crops: int, temperature: float) -> Tensor:
    """Return the loss on masked patches: weighted by ``weight_M`` (1 / masked patches of the crop), over all crops.

    Crops without a mask count in the divisor, as in the published code.
    """
    return (weight_M * cross_entropy(p_MK, scores_MK, temperature)).sum() / num_crops


def koleo_loss(x_ND: Tensor) -> Tensor:
    """Return −mean log distance of each unit row to its nearest other row: high when features crowd together.

    Source:
        Sablayrolles et al. 2019, "Spreading vectors for similarity search".
    """
    with torch.autocast(device_type=x_ND.device.type, enabled=False):
        unit = functional.normalize(x_ND.float(), dim=-1, eps=KOLEO_EPS)
        with torch.no_grad():
            similarity = unit @ unit.T
            similarity.fill_diagonal_(-1)
            nearest = similarity.argmax(dim=1)
        distances: Tensor = torch.linalg.vector_norm(unit - unit[nearest] + KOLEO_EPS, dim=1)
        return -(distances + KOLEO_EPS).log().mean()
