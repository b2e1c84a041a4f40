"""How many copies and how many different images lie above each threshold, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.calibrate.describe import Described

Counts = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]

_BLOCK_ROWS = 512
_DECIMALS = 6
_DRAWS = 1000
_Z = 1.959964  # of a two-sided interval of 95 %
THRESHOLDS = {
    "cosine": np.round(np.arange(0.05, 0.995, 0.01), 2),
    "normalised": np.round(np.arange(-0.5, 0.995, 0.01), 2),
}


@dataclass(frozen=True)
class Measured:
    """Counts of the copies of one edit, image by image.

    Attributes:
        found_NT: Whether the copy of image n scores above threshold t with it.
        wrong_NT: Images that show something else and score above it with the copy.
        doubtful_NT: The same, of images whose originals are similar: they may be true copies.
        num_wrong_N: Pairs that ``wrong_NT`` counts among.
        num_doubtful_N: Pairs that ``doubtful_NT`` counts among.
    """

    found_NT: Counts
    wrong_NT: Counts
    doubtful_NT: Counts
    num_wrong_N: Counts
    num_doubtful_N: Counts


@dataclass(frozen=True)
class Similar:
    """Pairs of originals that are similar already; left < right."""

    left: Counts
    right: Counts
    cosine: Scores


def similar_originals(originals: Described, above: float) -> Similar:
    """Return the pairs of originals whose cosine is above a threshold, most similar first."""
    parts = []
    for start, score_BN in _blocks(originals, originals):
        left, right = np.nonzero(score_BN > above)
        keep = left + start < right
        parts.append((left[keep] + start, right[keep], score_BN[left[keep], right[keep]]))
    left, right, cosine = (np.concatenate([part[column] for part in parts]) for column in range(3))
    order = np.lexsort((right, left, -cosine))
    return Similar(left[order], right[order], cosine[order])


def measure(
    originals: Described, copies: Described, others_NK: Counts, similar: Similar, score: str = "cosine"
) -> Measured:
    """Compare each copy with every original.

    Args:
        originals: N images.
        copies: One copy of each, in their order.
        others_NK: Other images that are to be seen in a copy: neither right nor wrong.
        similar: Pairs of originals that are similar already.
        score: ``cosine``, or ``normalised``: minus the copy's bias.
    """
    grid = THRESHOLDS[score]
    size = len(originals.good_N)
    names = ("found", "wrong", "doubtful")
    above = {name: np.zeros((size, len(grid)), np.int64) for name in names}
    number = {name: np.zeros(size, np.int64) for name in names}
    for start, score_BN in _blocks(copies, originals):
        rows = np.arange(len(score_BN))
        if score == "normalised":
            score_BN = np.round(score_BN - copies.bias_N[start : start + len(rows), None], _DECIMALS)
        kind_BN = np.ones(score_BN.shape, np.int8)  # 0 found, 1 wrong, 2 doubtful, 3 not counted
        for left, right in ((similar.left, similar.right), (similar.right, similar.left)):
            mine = (left >= start) & (left < start + len(rows))
            kind_BN[left[mine] - start, right[mine]] = 2
        for column in others_NK[start : start + len(rows)].T:
            kind_BN[rows[column >= 0], column[column >= 0]] = 3
        kind_BN[rows, rows + start] = 0
        # A copy without a descriptor is not found; what has none can be nobody's false copy.
        kind_BN[:, ~originals.good_N] = 3
        for code, name in enumerate(names):
            of_kind = kind_BN == code
            above[name][start : start + len(rows)] = _above(np.where(of_kind, score_BN, -np.inf), grid)
            number[name][start : start + len(rows)] = of_kind.sum(axis=1)
    return Measured(above["found"], above["wrong"], above["doubtful"], number["wrong"], number["doubtful"])


def _blocks(left: Described, right: Described) -> Any:
    """Yield the first row of a block and its rounded cosines with all rows; -inf where one has no descriptor."""
    right_ND = right.vectors_ND.astype(np.float64)
    for start in range(0, len(left.good_N), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        score_BN = np.round(left.vectors_ND[part].astype(np.float64) @ right_ND.T, _DECIMALS)
        score_BN[~left.good_N[part]] = -np.inf
        score_BN[:, ~right.good_N] = -np.inf
        yield start, score_BN


def _above(score_BN: Scores, grid: Scores) -> Counts:
    """Return how many scores of each row are above each threshold, (B, T)."""
    place_BN = np.searchsorted(grid, score_BN, side="left")  # thresholds that lie below
    width = len(grid) + 1
    flat = (np.arange(len(score_BN))[:, None] * width + place_BN).ravel()
    counts_BT = np.bincount(flat, minlength=len(score_BN) * width).reshape(len(score_BN), width)
    return np.asarray(counts_BT[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:])


def table_of(
    score: str, edit: str, strength: float | None, parts: Sequence[tuple[Measured, npt.NDArray[np.bool_]]]
) -> list[dict[str, Any]]:
    """Return a row a threshold for some rows of some edits.

    Args:
        score: See ``measure``.
        edit: Name of the edit, or ``all``.
        strength: Its strength; None: all of them.
        parts: Counts and which images' copies are meant.
    """
    found_T, wrong_T, doubtful_T = (
        np.sum([getattr(one, name)[rows].sum(axis=0) for one, rows in parts], axis=0)
        for name in ("found_NT", "wrong_NT", "doubtful_NT")
    )
    num_copies = sum(int(rows.sum()) for _, rows in parts)
    num_wrong = sum(int(one.num_wrong_N[rows].sum()) for one, rows in parts)
    num_doubtful = sum(int(one.num_doubtful_N[rows].sum()) for one, rows in parts)
    lines = []
    for place, threshold in enumerate(THRESHOLDS[score]):
        found, wrong, doubtful = int(found_T[place]), int(wrong_T[place]), int(doubtful_T[place])
        lines.append(
            {
                "score": score,
                "edit": edit,
                "strength": strength,
                "threshold": float(threshold),
                "copies": num_copies,
                "found": found,
                "recall": found / num_copies if num_copies else None,
                "different_pairs": num_wrong,
                "wrong": wrong,
                "precision": found / (found + wrong) if found + wrong else None,
                "wrong_pair_rate": wrong / num_wrong if num_wrong else None,
                "similar_pairs": num_doubtful,
                "similar_above": doubtful,
                "precision_similar_wrong": found / (found + wrong + doubtful) if found + wrong + doubtful else None,
            }
        )
    return lines


@dataclass(frozen=True)
class Interval:
    """Of all copies, for each threshold, (T,): precision in a pool, and lower and upper ends of 95 % intervals."""

    precision: Scores
    precision_low: Scores
    precision_high: Scores
    recall_low: Scores
    recall_high: Scores
    wrong_high: Scores


def intervals(parts: Sequence[Measured], pool_size: int, seed: int) -> Interval:
    """Return precision in a pool, and 95 % intervals of precision and recall, over all copies.

    In a pool each copy meets ``pool_size - 1`` other images and not those of the sample alone, so what is wrong is
    multiplied by their ratio. The intervals are a bootstrap over images:
    Copies of one image share their fate, so images are drawn and not pairs. Where hardly any pair is wrong a bootstrap
    sees none either: the number of wrong pairs is taken at least as large as the upper end of a Poisson interval
    (Byar's approximation; 3.7 where none was seen).
    """
    found_NT = np.sum([part.found_NT for part in parts], axis=0)
    wrong_NT = np.sum([part.wrong_NT for part in parts], axis=0)
    size, total = len(found_NT), len(found_NT) * len(parts)
    scale = max(1, pool_size - 1) / max(1, size - 1)
    weights_RN = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), _DRAWS)
    found_RT, wrong_RT = weights_RN @ found_NT, weights_RN @ wrong_NT
    seen_T = wrong_NT.sum(axis=0)
    more_T = seen_T + 1.0
    poisson_T = more_T * (1 - 1 / (9 * more_T) + _Z / (3 * np.sqrt(more_T))) ** 3
    wrong_high_T = np.maximum(np.quantile(wrong_RT, 0.975, axis=0), poisson_T)
    found_low_T = np.quantile(found_RT, 0.025, axis=0)
    found_T = found_NT.sum(axis=0)
    return Interval(
        _share(found_T, seen_T * scale),
        _share(found_low_T, wrong_high_T * scale),
        np.quantile(_share(found_RT, wrong_RT * scale), 0.975, axis=0),
        found_low_T / total,
        np.quantile(found_RT, 0.975, axis=0) / total,
        wrong_high_T,
    )


def _share(found: npt.NDArray[Any], wrong: npt.NDArray[Any]) -> Scores:
    """Return the share that is right, 1 where nothing was found: nothing is wrong then."""
    share: Scores = np.ones(np.shape(found))
    np.divide(found, found + wrong, out=share, where=found + wrong > 0)
    return share
