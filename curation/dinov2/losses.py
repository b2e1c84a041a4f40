"""The objective: DINO on class tokens, iBOT on masked patches, KoLeo; and what balances the teacher's assignment.

Everything here runs in float32 whatever the model runs in, and on a chunk of prototype scores at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.scores import Assignment, Chunk, Projected, Scores, chunked, cross_entropy
from curation.dinov2.world import ALONE, World

KOLEO_EPS = 1e-8


@torch.no_grad()
def sinkhorn_offset(scores: Scores, temperature: float, rounds: int = 3, world: World = ALONE) -> Tensor:
    """Return what has to be taken off the scores of each prototype, (K,), before a softmax over prototypes.

    Each round makes every prototype equally used by the rows of all processes, then every row sum to one; the softmax
    is the last half of the last round. Offsets are logarithms, so no temperature overflows; after the first round
    what they balance is a softmax, in which no prototype can vanish.

    Source:
        Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments"; Cuturi 2013.
    """
    num_rows = world.sum(torch.full((), float(len(scores)), device=scores.device))
    share = (num_rows / scores.num_prototypes).log()
    log_used_K = torch.full((scores.num_prototypes,), -torch.inf, device=scores.device)
    for _, part_NK in scores.chunks():
        log_used_K = torch.logaddexp(log_used_K, torch.logsumexp(part_NK / temperature, dim=0))
    offset_K = world.logsumexp(log_used_K) - share
    for _ in range(rounds - 1):
        used_K = torch.zeros_like(offset_K)
        for _, part_NK in scores.chunks():
            used_K += torch.softmax((part_NK / temperature).sub_(offset_K), dim=1).sum(dim=0)
        offset_K = offset_K + world.sum(used_K).log() - share
    return offset_K * temperature


def dino_loss(
    student: Projected, views: Sequence[Assignment], temperature: float, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss on class tokens, and without gradient what its global and its local crops add to it.

    Each crop is compared with every view of the teacher, a global crop not with its own, and a mean over images taken;
    the sum is divided by the number of pairs of crop and view, those of a crop with itself included as in the
    published code's scale: views + views · local crops.

    Args:
        student: Rows of the global crops, then of the local ones, crop-major.
        views: The teacher's two global crops, B rows each.
        temperature: The student's.
        chunk_rows: Rows of scores in memory at a time.
    """
    num_views, images = len(views), len(views[0])
    crops = len(student.unit_ND) // images
    num_local = crops - num_views
    device = student.unit_ND.device
    pairs = num_views * (1 + num_local)
    mass = torch.ones(crops, images, device=device)
    mass[num_views:] = num_views
    weight = torch.full_like(mass, 1 / (pairs * images))
    places = torch.arange(crops * images, device=device).view(crops, images)

    def chunks() -> Iterator[Chunk]:
        for part in chunked(images, max(1, chunk_rows // crops)):
            made = targets(part)
            yield Chunk(places[:, part].flatten(), made.__getitem__)

    def targets(part: slice) -> Tensor:
        seen = [view.rows(part) for view in views]
        return torch.cat([*seen[::-1], *[torch.stack(seen).sum(dim=0)] * num_local])

    loss, loss_N = cross_entropy(student, chunks(), mass.flatten(), weight.flatten(), temperature)
    shares = (loss_N.view(crops, images) * weight).sum(dim=1)
    return loss, shares[:num_views].sum(), shares[num_views:].sum()


def ibot_loss(
    student: Projected, targets: Assignment, weight_M: Tensor, num_crops: int, temperature: float, chunk_rows: int
) -> Tensor:
    """Return the loss on patches: weighted by ``weight_M`` (1 / patches of the crop), over all crops.

    Crops without a mask count in the divisor, as in the published code.
    """
    parts = list(chunked(len(targets), chunk_rows))
    sizes = [part.stop - part.start for part in parts]
    chunks = (Chunk(part, own.rows) for part, own in zip(parts, targets.split(sizes), strict=True))
    loss, _ = cross_entropy(student, chunks, torch.ones_like(weight_M), weight_M / num_crops, temperature)
    return loss


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
