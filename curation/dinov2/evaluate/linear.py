"""The linear probe: a grid of linear classifiers on the same frozen features, trained side by side.

All learning rates of one input share each batch and one matrix product; a gradient is written down, not traced. Unlike
the published protocol, features are of the central crop, computed once, and not of random crops computed each epoch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curation.dinov2.evaluate.config import LinearConfig
from curation.dinov2.evaluate.features import Features

_INIT_STD = 0.01
_LR_BATCH = 256  # that learning rates are given for
_ROWS = 4096


@dataclass(frozen=True)
class Head:
    """One classifier of the grid.

    Attributes:
        blocks: Class tokens of so many last blocks.
        pooled: Whether the patches' mean is behind them.
        learning_rate: At a batch of 256.
        holdout: Top-1 accuracy on held-out training images; the best head is chosen by it.
        test: Top-1 accuracy on the test images.
        diverged: Whether its weights are no longer finite; both accuracies are 0 then.
    """

    blocks: int
    pooled: bool
    learning_rate: float
    holdout: float
    test: float
    diverged: bool


def split_off(num: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows to learn from and those held out, both rising and neither empty."""
    order = np.random.default_rng([seed, num]).permutation(num)
    held = min(max(1, round(num * share)), num - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def probe(
    train: Features, test: Features, num_classes: int, config: LinearConfig, seed: int, device: torch.device
) -> list[Head]:
    """Return every head of the grid, the one to report first: best on held-out images, ties to the smaller rate.

    Args:
        train: To learn from; a share is held out.
        test: To test on; nothing is chosen by it.
        num_classes: Labels are below.
        config: The grid and the schedule.
        seed: Of weights, order and held-out images.
        device: That computes.
    """
    learned, held = split_off(len(train), config.holdout, seed)
    heads = []
    for blocks, pooled in _inputs(train, config):
        weight_DHC, bias_HC = _trained(train, learned, (blocks, pooled), num_classes, config, seed, device)
        finite_H = torch.isfinite(weight_DHC).all(dim=2).all(dim=0) & torch.isfinite(bias_HC).all(dim=1)
        accuracies = []
        for features, rows in ((train, held), (test, np.arange(len(test)))):
            accuracies.append(_accuracy(features, rows, (blocks, pooled), weight_DHC, bias_HC) * finite_H.cpu())
        for row, rate in enumerate(config.learning_rates):
            holdout, tested = (float(accuracy_H[row]) for accuracy_H in accuracies)
            heads.append(Head(blocks, pooled, rate, holdout, tested, not bool(finite_H[row])))
    return sorted(heads, key=lambda head: -head.holdout)  # stable: the first of equals is the earlier of the grid


def _inputs(train: Features, config: LinearConfig) -> Iterator[tuple[int, bool]]:
    """Yield the inputs of the grid that there are: fewer blocks than asked for, or no patches, make fewer."""
    seen = set()
    for blocks in config.blocks:
        for pooled in config.pooled:
            found = (min(blocks, train.num_blocks), pooled and train.has_patches)
            if found not in seen:
                seen.add(found)
                yield found


def _trained(
    train: Features,
    rows: npt.NDArray[np.int64],
    shape: tuple[int, bool],
    num_classes: int,
    config: LinearConfig,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return weights (D, H, C) and biases (H, C) after SGD with momentum and a cosine schedule, one head a rate."""
    generator = torch.Generator().manual_seed(seed)
    blocks, pooled = shape
    dim = train.joined(rows[:1], blocks, pooled=pooled).shape[1]
    num_heads = len(config.learning_rates)
    start_DC = _INIT_STD * torch.randn(dim, num_classes, generator=generator)
    weight_DHC = start_DC.unsqueeze(1).repeat(1, num_heads, 1).to(device)
    bias_HC = torch.zeros(num_heads, num_classes, device=device)
    speeds = [torch.zeros_like(weight_DHC), torch.zeros_like(bias_HC)]
    rates_H = torch.tensor(config.learning_rates, device=device) * config.batch_size / _LR_BATCH
    steps_an_epoch = math.ceil(len(rows) / config.batch_size)
    num_steps = steps_an_epoch * config.epochs
    for step, batch in enumerate(_batches(rows, config, seed)):
        x_BD = train.joined(batch, blocks, pooled=pooled).to(device)
        labels_B = torch.from_numpy(train.label_N[batch]).to(device)
        slope_BHC = (torch.einsum("bd,dhc->bhc", x_BD, weight_DHC) + bias_HC).softmax(dim=2)
        slope_BHC[torch.arange(len(batch), device=device), :, labels_B] -= 1
        slope_BHC /= len(batch)
        gradients = (torch.einsum("bd,bhc->dhc", x_BD, slope_BHC), slope_BHC.sum(dim=0))
        now_H1 = (rates_H * 0.5 * (1 + math.cos(math.pi * step / num_steps))).unsqueeze(1)
        for value, speed, gradient in zip((weight_DHC, bias_HC), speeds, gradients, strict=True):
            speed.mul_(config.momentum).add_(gradient)
            value.sub_(now_H1 * speed)
    return weight_DHC, bias_HC


def _batches(rows: npt.NDArray[np.int64], config: LinearConfig, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    for epoch in range(config.epochs):
        order = rows[np.random.default_rng([seed, epoch]).permutation(len(rows))]
        for start in range(0, len(rows), config.batch_size):
            yield np.sort(order[start : start + config.batch_size])  # rising: files are read forwards


def _accuracy(
    features: Features, rows: npt.NDArray[np.int64], shape: tuple[int, bool], weight_DHC: Tensor, bias_HC: Tensor
) -> Tensor:
    right_H = torch.zeros(len(bias_HC), dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        x_BD = features.joined(part, shape[0], pooled=shape[1]).to(weight_DHC.device)
        answers_BH = (torch.einsum("bd,dhc->bhc", x_BD, weight_DHC) + bias_HC).argmax(dim=2)
        labels_B1 = torch.from_numpy(features.label_N[part]).to(weight_DHC.device).unsqueeze(1)
        right_H += (answers_BH == labels_B1).sum(dim=0).cpu()
    return right_H / len(rows)
