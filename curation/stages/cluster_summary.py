"""How images lie in clusters: sizes for the report, and how far new images have drifted from those that were fitted.

``ClusterBaseline`` is made once for each fit and says what the pool looked like then; ``ClusterSummary`` is made anew
whenever anything changed, and compares: new are the shards of the pool whose assignments differ from those of all
shards that were there at the fit.

Memory: some tens of bytes a cluster for the pool and for each seed set, and one shard.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema
from curation.errors import CorruptError
from curation.indexes.vectors import PER_UNIT
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView

BASELINE_FILE = "baseline.json"
SIZES_FILE = "clusters.parquet"
DRIFT_FILE = "drift.json"


@dataclass
class Tally:
    """Images by cluster.

    Attributes:
        counts: int64 (k,), images of each cluster.
        millionths: Sum of their similarities with their centroids, in whole 1e-6: the same in any order.
    """

    counts: npt.NDArray[np.int64]
    millionths: int = 0

    @property
    def num_images(self) -> int:
        """Images in all clusters."""
        return int(self.counts.sum())

    @property
    def mean_similarity(self) -> float | None:
        """Mean cosine of an image with its centroid; None without images."""
        return self.millionths / PER_UNIT / self.num_images if self.num_images else None

    def add(self, numbers_N: npt.NDArray[np.int32], similarities_N: npt.NDArray[np.float32]) -> None:
        """Count images of given clusters."""
        if len(numbers_N):
            found = np.bincount(numbers_N, minlength=len(self.counts)).astype(np.int64)
            if len(found) > len(self.counts):
                found[: len(self.counts)] += self.counts
                self.counts = found
            else:
                self.counts += found
        self.millionths += int(np.rint(similarities_N.astype(np.float64) * PER_UNIT).astype(np.int64).sum())


class ClusterBaseline:
    """Remember how the pool lay in its clusters when they were fitted."""

    name: ClassVar[str] = "cluster_baseline"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.CLUSTER,)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (BASELINE_FILE,)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the baseline in ``scratch``; yield nothing."""
        tally, shards = Tally(np.zeros(0, np.int64)), []
        for view in inputs.shards("pool"):
            numbers_N, similarities_N = _assigned(view)
            tally.add(numbers_N, similarities_N)
            shards.append(_identity(numbers_N, similarities_N))
        content = {"counts": tally.counts.tolist(), "millionths": tally.millionths, "shards": sorted(shards)}
        (scratch / BASELINE_FILE).write_text(json.dumps(content), encoding="utf-8")
        yield from ()


class ClusterSummary:
    """Sizes of clusters, and the drift of shards that came after the fit."""

    name: ClassVar[str] = "cluster_summary"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.CLUSTER,)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (SIZES_FILE, DRIFT_FILE)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave both files in ``scratch``; yield nothing.

        Raises:
            CorruptError: The baseline is not one.
        """
        fitted, known = _baseline(inputs.artefacts(ClusterBaseline.name) / BASELINE_FILE)
        pool, new = (Tally(np.zeros(len(fitted.counts), np.int64)) for _ in range(2))
        num_new = num_shards = 0
        for view in inputs.shards("pool"):
            numbers_N, similarities_N = _assigned(view)
            num_shards += 1
            pool.add(numbers_N, similarities_N)
            if _identity(numbers_N, similarities_N) not in known:
                num_new += 1
                new.add(numbers_N, similarities_N)
        sizes = {"pool": pool}
        for collection in inputs.collections("seeds"):
            sizes[collection] = Tally(np.zeros(len(pool.counts), np.int64))
            for view in inputs.shards(collection):
                sizes[collection].add(*_assigned(view))
        pq.write_table(_sizes(sizes), scratch / SIZES_FILE)
        found = {"num_shards": num_shards, "num_new_shards": num_new} | drift(fitted, new)
        (scratch / DRIFT_FILE).write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
        yield from ()


def drift(fitted: Tally, new: Tally) -> dict[str, Any]:
    """Compare new images with those that were there when the centroids were fitted.

    Returns:
        ``num_new_images``; ``mean_similarity`` of new images with their centroids and ``fitted_mean_similarity``;
        ``share_change``, the total variation distance of the clusters' shares, in [0, 1]; and
        ``share_change_by_chance``, what as many images drawn from the fitted ones would show in the mean. None where
        there is nothing to compare.
    """
    change: float | None = None
    chance: float | None = None
    if new.num_images and fitted.num_images:
        size = max(len(fitted.counts), len(new.counts))
        before_K, after_K = (np.pad(tally.counts, (0, size - len(tally.counts))) for tally in (fitted, new))
        shares_K = before_K / fitted.num_images
        change = float(np.abs(after_K / new.num_images - shares_K).sum() / 2)
        chance = float(sum(_mean_deviation(new.num_images, share) for share in shares_K) / new.num_images / 2)
    return {
        "num_new_images": new.num_images,
        "mean_similarity": new.mean_similarity,
        "fitted_mean_similarity": fitted.mean_similarity,
        "share_change": change,
        "share_change_by_chance": chance,
    }


def _mean_deviation(n: int, p: float) -> float:
    """Return E|X - np| of a binomial X (de Moivre: 2 (m + 1) C(n, m + 1) p^(m + 1) (1 - p)^(n - m), m = floor(np))."""
    if not 0 < p < 1:
        return 0.0
    m = math.floor(n * p)
    if m >= n:
        return 0.0
    log_choose = math.lgamma(n + 1) - math.lgamma(m + 2) - math.lgamma(n - m)
    return 2 * math.exp(math.log(m + 1) + log_choose + (m + 1) * math.log(p) + (n - m) * math.log1p(-p))


def _assigned(view: ShardView) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return cluster and similarity of each image of a shard that is kept and has a cluster."""
    table = view.read(schema.CLUSTER)
    rows = pa.array(np.flatnonzero(view.kept & table.column("cluster_id").is_valid().to_numpy()))
    numbers, similarities = (table.column(name).take(rows).to_numpy() for name in ("cluster_id", "cluster_similarity"))
    return numbers.astype(np.int32, copy=False), similarities.astype(np.float32, copy=False)


def _identity(numbers_N: npt.NDArray[np.int32], similarities_N: npt.NDArray[np.float32]) -> str:
    """Return what tells a shard's assignments from others: 64 bits, hex."""
    digest = hashlib.sha256(numbers_N.astype("<i4").tobytes())
    digest.update(similarities_N.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def _baseline(path: Path) -> tuple[Tally, frozenset[str]]:
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tally = Tally(np.array(content["counts"], np.int64), int(content["millionths"]))
        return tally, frozenset(content["shards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: not a baseline of clusters: {error}; `--refit` makes a new one") from error


def _sizes(tallies: Mapping[str, Tally]) -> pa.Table:
    """Return images by cluster: a row a cluster, a column for ``pool`` and each ``seeds/<name>``."""
    size = max(len(tally.counts) for tally in tallies.values())
    columns: dict[str, Any] = {"cluster_id": np.arange(size, dtype=np.int32)}
    columns |= {name: np.pad(tally.counts, (0, size - len(tally.counts))) for name, tally in tallies.items()}
    return pa.table(columns)
