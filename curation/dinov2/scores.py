"""Prototype scores of many rows without all of them in memory: they are made a chunk at a time, and used at once.

Rows times prototypes is the largest tensor of training: 30,000 masked patches and 131,072 prototypes are 16 GB in
float32. What makes scores, a unit vector for each row and one matrix, is four hundred times smaller. Scores that fit
one chunk are made once and kept.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CACHED_VALUES = 1 << 18


class Projected(NamedTuple):
    """What a head makes of rows; the scores are products of the two.

    Attributes:
        unit_ND: Bottleneck of unit length.
        prototypes_KD: The prototypes.
    """

    unit_ND: Tensor
    prototypes_KD: Tensor

    def scores(self) -> Tensor:
        """Return all scores, (N, K)."""
        return functional.linear(self.unit_ND, self.prototypes_KD)

    def split(self, sizes: Sequence[int]) -> list["Projected"]:
        """Return consecutive parts of so many rows each."""
        return [Projected(part, self.prototypes_KD) for part in torch.split(self.unit_ND, list(sizes))]


class Scores:
    """Scores of N rows that need no gradient, float32.

    Args:
        projected: What they are made of.
        chunk_rows: Rows of scores in memory at a time.

    Attributes:
        num_prototypes: Scores of a row.
        device: Where scores are made.
    """

    def __init__(self, projected: Projected, chunk_rows: int) -> None:
        self._num_rows, self.num_prototypes = len(projected.unit_ND), len(projected.prototypes_KD)
        self.device = projected.unit_ND.device
        self._chunk_rows = chunk_rows
        # Scores that fit take the place of the prototypes, which are as large.
        self._held = _made(projected, slice(None)) if self._num_rows <= chunk_rows else projected

    def __len__(self) -> int:
        return self._num_rows

    def rows(self, rows: slice) -> Tensor:
        """Return the scores of some rows, (n, K); not to be written to."""
        return _made(self._held, rows) if isinstance(self._held, Projected) else self._held[rows]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their scores, (n, K), at most a chunk of them; not to be written to."""
        at_once = self._chunk_rows if isinstance(self._held, Projected) else cached_rows(self._held)
        for rows in chunked(len(self), at_once):
            yield rows, self.rows(rows)

    def mean(self) -> Tensor:
        """Return the mean score of each prototype, (K,)."""
        if not isinstance(self._held, Projected):
            return self._held.mean(dim=0)
        with torch.autocast(self.device.type, enabled=False):  # scores are linear in what they are made of
            return functional.linear(self._held.unit_ND.float().mean(dim=0), self._held.prototypes_KD.float())


@torch.no_grad()
def _made(projected: Projected, rows: slice) -> Tensor:
    return functional.linear(projected.unit_ND[rows], projected.prototypes_KD).float()


@dataclass(frozen=True)
class Assignment:
    """Soft assignment of rows to prototypes: softmax((scores − offset) / temperature), each row summing to 1.

    Attributes:
        scores: Of a whole batch.
        offset_K: What is taken off the scores of each prototype.
        temperature: Divides the rest.
        within: Which rows of ``scores`` these are.
    """

    scores: Scores
    offset_K: Tensor
    temperature: float
    within: range

    @classmethod
    def of(cls, scores: Scores, offset_K: Tensor, temperature: float) -> "Assignment":
        """Return the assignment of all rows."""
        return cls(scores, offset_K, temperature, range(len(scores)))

    def __len__(self) -> int:
        return len(self.within)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """Return the assignment of some rows, (n, K), float32."""
        part = self.within[rows]
        return self.softmax(self.scores.rows(slice(part.start, part.stop)))

    def softmax(self, scores_NK: Tensor) -> Tensor:
        """Return what scores are assigned to."""
        return torch.softmax(self.logits(scores_NK), dim=1)

    def logits(self, scores_NK: Tensor) -> Tensor:
        """Return what a softmax makes the assignment of."""
        return (scores_NK - self.offset_K).div_(self.temperature)

    def split(self, sizes: Sequence[int]) -> list["Assignment"]:
        """Return consecutive parts of so many rows each."""
        ends = itertools.accumulate(sizes, initial=0)
        parts = (self.within[first:end] for first, end in itertools.pairwise(ends))
        return [Assignment(self.scores, self.offset_K, self.temperature, part) for part in parts]


class Chunk(NamedTuple):
    """Some rows of a student, and what they should answer.

    Attributes:
        rows: Indices of the student's rows, or a slice.
        targets: Makes the targets of some of these rows, (n, K); each sums to the row's mass.
    """

    rows: Tensor | slice
    targets: Callable[[slice], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies; its gradient is made along with it, as long as a chunk's scores are there."""

    @staticmethod
    def forward(
        ctx: Any,
        unit_ND: Tensor,
        prototypes_KD: Tensor,
        chunks: Iterator[Chunk],
        mass_N: Tensor,
        weight_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        device = unit_ND.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else unit_ND.dtype
        unit, prototypes = unit_ND.to(compute), prototypes_KD.to(compute)
        unit_gradient = torch.zeros_like(unit_ND)
        prototypes_gradient: Tensor | None = None
        loss_N = torch.zeros_like(weight_N)
        for rows, targets in chunks:
            part, mass, scale = unit[rows], mass_N[rows].unsqueeze(1), (weight_N[rows] / temperature).unsqueeze(1)
            logits = functional.linear(part, prototypes).float()
            losses = torch.empty(len(logits), device=logits.device)
            for some in chunked(len(logits), cached_rows(logits)):
                p_NK, x_NK = targets(some), logits[some].div_(temperature)
                normaliser = torch.logsumexp(x_NK, dim=1, keepdim=True)
                losses[some] = (mass[some] * normaliser).squeeze(1) - dot(p_NK, x_NK)
                x_NK.sub_(normaliser).exp_().mul_(mass[some]).sub_(p_NK).mul_(scale[some])
            loss_N[rows] = losses
            gradient = logits.to(compute)
            unit_gradient[rows] = (gradient @ prototypes).to(unit_gradient.dtype)
            if prototypes_gradient is None:
                prototypes_gradient = (gradient.T @ part).to(prototypes_KD.dtype)
            elif compute == prototypes_gradient.dtype:
                prototypes_gradient.addmm_(gradient.T, part)
            else:
                prototypes_gradient += gradient.T @ part
        if prototypes_gradient is None:  # no rows
            prototypes_gradient = torch.zeros_like(prototypes_KD)
        ctx.gradients = unit_gradient, prototypes_gradient
        ctx.mark_non_differentiable(loss_N)
        return (weight_N * loss_N).sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        unit_gradient, prototypes_gradient = ctx.gradients
        del ctx.gradients  # as large as the prototypes, and not needed until the graph goes
        return unit_gradient.mul_(gradient), prototypes_gradient.mul_(gradient), None, None, None, None


def cross_entropy(
    student: Projected, chunks: Iterator[Chunk], mass_N: Tensor, weight_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · cross-entropy, with its gradient, and the cross-entropy of each row, (N,), without.

    The cross-entropy is mass · logsumexp(s/T) − ⟨p, s⟩/T: the value and gradient of −Σ p log softmax(s/T). One chunk
    of scores is in memory at a time.

    Args:
        student: Its rows.
        chunks: Covers each row once.
        mass_N: What each row of targets sums to.
        weight_N: Of each row.
        temperature: The student's.
    """
    apply: Any = _CrossEntropy.apply  # typed in some builds of PyTorch only
    result: tuple[Tensor, Tensor] = apply(*student, chunks, mass_N, weight_N, temperature)
    return result


def dot(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Return the product of each pair of rows, (N,), in their own precision: autocast would round both first."""
    with torch.autocast(a_NK.device.type, enabled=False):
        products: Tensor = torch.linalg.vecdot(a_NK, b_NK)
    return products


def chunked(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Yield slices of at most so many rows."""
    for first in range(0, num_rows, chunk_rows):
        yield slice(first, min(num_rows, first + chunk_rows))


def cached_rows(x_NK: Tensor) -> int:
    """Return how many rows to work on at a time: all on a GPU, on a CPU what fits into its cache.

    One core does the passes of a cross-entropy in a third of the time that they take over whole scores in memory.
    """
    return len(x_NK) if x_NK.is_cuda else max(1, _CACHED_VALUES // x_NK.shape[1])
