"""Multinomial logistic regression on unit class tokens, by L-BFGS over all images in blocks."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.evaluate.config import LogisticConfig
from curation.dinov2.evaluate.features import Features
from curation.dinov2.evaluate.linear import split_off

_ROWS = 16_384
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Logistic:
    """The regression with the C that was best on held-out images, fitted again to all of them.

    Attributes:
        c: Inverse strength of the penalty: ½‖W‖² + C · Σ losses is minimised.
        holdout: Top-1 accuracy on held-out training images, of C.
        test: Top-1 accuracy on the test images.
    """

    c: float
    holdout: float
    test: float


def logistic_regression(
    train: Features, test: Features, num_classes: int, config: LogisticConfig, seed: int, device: torch.device
) -> Logistic:
    """Fit every C, each from the solution of the one before, and test the best.

    Args:
        train: To learn from; a share is held out to choose C by, and used with the rest once it is chosen.
        test: To test on.
        num_classes: Labels are below.
        config: The grid.
        seed: Of the held-out images.
        device: That computes.
    """
    learned, held = split_off(len(train), config.holdout, seed)
    weights = _zeros(train, num_classes, device)
    best = Logistic(0.0, -1.0, 0.0)
    chosen = weights
    for power in sorted(config.powers):
        weights = fit(train, learned, weights, 10.0**power, config.max_iterations)
        accuracy = _accuracy(train, held, weights)
        if accuracy > best.holdout:
            best, chosen = Logistic(10.0**power, accuracy, 0.0), weights
    chosen = fit(train, np.arange(len(train)), chosen, best.c, config.max_iterations)
    return Logistic(best.c, best.holdout, _accuracy(test, np.arange(len(test)), chosen))


def fit(features: Features, rows: npt.NDArray[np.int64], start_EC: Tensor, c: float, max_iterations: int) -> Tensor:
    """Return the weights that minimise ½‖W‖² + C · Σ cross-entropies, (D + 1, C); the bias, last, has no penalty.

    Args:
        features: Whose class tokens are put to unit length.
        rows: Images to learn from.
        start_EC: Where the search begins.
        c: C.
        max_iterations: Of L-BFGS.
    """
    weights_EC = start_EC.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights_EC],
        max_iter=max_iterations,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = weights_EC[:-1].square().sum() / (2 * c * len(rows))
        total.backward()  # type: ignore[no-untyped-call]
        for x_BE, labels_B in _blocks(features, rows, weights_EC.device):
            part = functional.cross_entropy(x_BE @ weights_EC, labels_B, reduction="sum") / len(rows)
            part.backward()  # type: ignore[no-untyped-call]
            total = total.detach() + part.detach()
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights_EC.detach()


def _zeros(train: Features, num_classes: int, device: torch.device) -> Tensor:
    return torch.zeros(train.slots_NSD.shape[2] + 1, num_classes, device=device, dtype=torch.float32)


def _blocks(features: Features, rows: npt.NDArray[np.int64], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    return [_block(features, rows[start : start + _ROWS], device) for start in range(0, len(rows), _ROWS)]


def _block(features: Features, rows: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return unit class tokens with a 1 behind them for the bias, and labels."""
    x_BD = functional.normalize(features.joined(rows, 1, pooled=False).to(device), dim=1)
    return functional.pad(x_BD, (0, 1), value=1.0), torch.from_numpy(features.label_N[rows]).to(device)


def _accuracy(features: Features, rows: npt.NDArray[np.int64], weights_EC: Tensor) -> float:
    right = 0
    for start in range(0, len(rows), _ROWS):
        x_BE, labels_B = _block(features, rows[start : start + _ROWS], weights_EC.device)
        right += int(((x_BE @ weights_EC).argmax(dim=1) == labels_B).sum())
    return right / len(rows)
