"""How many directions features use: RankMe and α-ReQ. Neither needs labels."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_EPS = 1e-7
_FIRST, _LAST = 3, 100  # eigenvalues that the power law is fitted to: neither the largest few nor the noise behind
_NOISE = 1e-10  # of the largest eigenvalue: what is below is rounding
_FEWEST = 3  # eigenvalues that a line is drawn through


def spectrum(blocks: Iterator[Tensor], num: int) -> tuple[float, float | None]:
    """Return RankMe and α-ReQ of all rows.

    Memory does not grow with rows: above D of them XᵀX stands for X, in float64.

    Args:
        blocks: Rows, (n, D) each.
        num: Rows in all.
    """
    first = next(blocks).double()
    rest = (x_ND.double() for x_ND in blocks)
    if num <= first.shape[1]:
        x_ND = torch.cat([first, *rest])
        return rankme(torch.linalg.svdvals(x_ND)), alpha_req(
            torch.linalg.svdvals(x_ND - x_ND.mean(dim=0)) ** 2 / num, num
        )
    moment_DD, total_D = first.T @ first, first.sum(dim=0)
    for x_ND in rest:
        moment_DD += x_ND.T @ x_ND
        total_D += x_ND.sum(dim=0)
    mean_D = total_D / num
    covariance_DD = moment_DD / num - torch.outer(mean_D, mean_D)
    return (
        rankme(torch.linalg.eigvalsh(moment_DD).clamp(min=0).sqrt()),
        alpha_req(torch.linalg.eigvalsh(covariance_DD).flip(0), num),
    )


def rankme(singular: Tensor) -> float:
    """Return exp of the entropy of the singular values' shares, from 1 to their number.

    Source:
        Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised representations
        by their rank".
    """
    share = singular / singular.sum().clamp(min=1e-300) + _EPS
    return float(torch.exp(-(share * share.log()).sum()))


def alpha_req(eigenvalues: Tensor, num: int) -> float | None:
    """Return α where the i-th largest eigenvalue of the covariance falls as i^-α; None with too few eigenvalues.

    Near 1 is best: much above, few directions carry everything; much below, noise counts as much as content. It is a
    least-squares line through (log i, log λ) of eigenvalues 3 to 100.

    Args:
        eigenvalues: Largest first.
        num: Rows that the covariance is of: centred, they span one direction less.

    Source:
        Agrawal et al. 2022, "α-ReQ: assessing representation quality in self-supervised learning by measuring
        eigenspectrum decay".
    """
    values = eigenvalues[: min(num - 1, _LAST)].cpu().numpy()
    values = values[values > values[0] * _NOISE][_FIRST - 1 :]
    if len(values) < _FEWEST:
        return None
    slope, _ = np.polyfit(np.log(np.arange(_FIRST, _FIRST + len(values))), np.log(values), 1)
    return float(-slope)
