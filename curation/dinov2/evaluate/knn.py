"""The weighted k-nearest-neighbour classifier, in blocks: memory does not grow with the images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.evaluate.features import Features
from curation.errors import InputError

_QUERIES = 1024
_KEYS = 16_384


def feasible(k: Sequence[int], num_images: int) -> tuple[int, ...]:
    """Return the numbers of neighbours that so many images are enough for; where there is none, all images vote."""
    return tuple(count for count in k if count <= num_images) or (num_images,)


def knn_accuracy(
    train: Features, test: Features, num_classes: int, k: Sequence[int], temperature: float, device: torch.device
) -> dict[int, tuple[float, float]]:
    """Return top-1 and top-5 accuracy for each number of neighbours.

    A test image's neighbours are the training images whose class tokens have the highest cosine s with its own; each
    votes for its class with exp(s / temperature).

    Args:
        train: Whose classes are known.
        test: Whose classes are asked for.
        num_classes: Classes; labels are below.
        k: Numbers of neighbours.
        temperature: Of the votes.
        device: That computes.

    Raises:
        InputError: There are fewer training images than neighbours.

    Source:
        Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination".
    """
    if len(train) < max(k):
        raise InputError(f"k-NN with k = {max(k)} needs as many images to learn from, and there are {len(train)}")
    right = torch.zeros(len(k), 2, dtype=torch.int64)
    train_labels = torch.from_numpy(train.label_N).to(device)
    top = min(5, num_classes)
    for start in range(0, len(test), _QUERIES):
        similarity_QK, ids_QK = _nearest(train, _unit(test.cls(slice(start, start + _QUERIES)), device), max(k))
        labels_QK = train_labels[ids_QK]
        truth_Q = torch.from_numpy(test.label_N[start : start + _QUERIES]).to(device)
        for row, count in enumerate(k):
            # Relative to the best one: no temperature overflows.
            weight_QK = torch.exp((similarity_QK[:, :count] - similarity_QK[:, :1]) / temperature)
            votes_QC = torch.zeros(len(truth_Q), num_classes, device=device, dtype=torch.float64)
            votes_QC.scatter_add_(1, labels_QK[:, :count], weight_QK.double())
            hits_QT = votes_QC.topk(top, dim=1).indices == truth_Q.unsqueeze(1)
            right[row] += torch.stack([hits_QT[:, 0].sum(), hits_QT.any(dim=1).sum()]).cpu()
    share = (right.double() / len(test)).tolist()
    return {count: (top1, top5) for count, (top1, top5) in zip(k, share, strict=True)}


def _nearest(train: Features, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and rows of the k nearest training images, best first, both (Q, k)."""
    best_QK = torch.empty(len(queries_QD), 0, device=queries_QD.device)
    ids_QK = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for start in range(0, len(train), _KEYS):
        keys_ND = _unit(train.cls(slice(start, start + _KEYS)), queries_QD.device)
        rows_N = torch.arange(start, start + len(keys_ND), device=queries_QD.device)
        best_QK = torch.cat([best_QK, queries_QD @ keys_ND.T], dim=1)
        ids_QK = torch.cat([ids_QK, rows_N.expand(len(queries_QD), -1)], dim=1)
        best_QK, places_QK = best_QK.topk(min(k, best_QK.shape[1]), dim=1)
        ids_QK = ids_QK.gather(1, places_QK)
    return best_QK, ids_QK


def _unit(x_ND: Tensor, device: torch.device) -> Tensor:
    return functional.normalize(x_ND.to(device), dim=1)
