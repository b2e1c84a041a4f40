"""How images lie in clusters: sizes for the report, and how far new images have drifted from those that were fitted.

``ClusterBaseline`` is made once for each fit and says what the pool looked like then; ``ClusterSummary`` is made anew
whenever anything changed, and compares. Which images are new is looked at in a sample that any sharding leaves the
same: the baseline remembers the smallest hashes of (seed, image id), and an image with a hash up to the largest of them
was there at the fit if, and only if, its own is remembered.

Memory: some tens of bytes a cluster for the pool and for each seed set, some tens of bytes an image of the sample, and
one shard.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema
from curation.errors import CorruptError
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.lookup import among
from curation.indexes.sampling import HashSample, Ranks, hash_keys
from curation.indexes.vectors import PER_UNIT
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView

BASELINE_FILE = "baseline.json"
KNOWN_FILE = "baseline_images.npy"
SIZES_FILE = "clusters.parquet"
DRIFT_FILE = "drift.json"
SAMPLE_SIZE = 1_000_000


class _Assigned(NamedTuple):
    """Images that have a cluster."""

    keys: Keys  # (N, 2)
    numbers: npt.NDArray[np.int32]  # (N,)
    similarities: npt.NDArray[np.float32]  # (N,)

    def take(self, chosen_N: npt.NDArray[np.bool_]) -> "_Assigned":
        """Return some of them."""
        return _Assigned(self.keys[chosen_N], self.numbers[chosen_N], self.similarities[chosen_N])


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

    def add(self, images: _Assigned) -> None:
        """Count images."""
        if len(images.numbers):
            found = np.bincount(images.numbers, minlength=len(self.counts)).astype(np.int64)
            found[: len(self.counts)] += self.counts
            self.counts = found
        self.millionths += int(np.rint(images.similarities.astype(np.float64) * PER_UNIT).astype(np.int64).sum())


class ClusterBaseline:
    """Remember how the pool lay in its clusters when they were fitted."""

    name: ClassVar[str] = "cluster_baseline"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.CLUSTER)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (BASELINE_FILE, KNOWN_FILE)

    def __init__(self, seed: int, sample_size: int = SAMPLE_SIZE) -> None:
        self.seed = seed
        self.sample_size = sample_size

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the baseline in ``scratch``; yield nothing."""
        tally = Tally(np.zeros(0, np.int64))
        sample = HashSample(self.seed, self.sample_size)
        for view in inputs.shards("pool"):
            found = _assigned(view)
            tally.add(found)
            sample.add(found.keys, np.zeros((len(found.keys), 0), np.uint8))
        ranks = sample.result().ranks
        content = {
            "counts": tally.counts.tolist(),
            "millionths": tally.millionths,
            "is_sample": tally.num_images > len(ranks),
        }
        (scratch / BASELINE_FILE).write_text(json.dumps(content), encoding="utf-8")
        np.save(scratch / KNOWN_FILE, ranks, allow_pickle=False)
        yield from ()


class ClusterSummary:
    """Sizes of clusters, and the drift of images that came after the fit."""

    name: ClassVar[str] = "cluster_summary"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.CLUSTER)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (SIZES_FILE, DRIFT_FILE)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave both files in ``scratch``; yield nothing.

        Raises:
            CorruptError: The baseline is not one.
        """
        fitted, known, is_sample = _baseline(inputs.artefacts(ClusterBaseline.name))
        pool, new = (Tally(np.zeros(len(fitted.counts), np.int64)) for _ in range(2))
        num_compared = 0
        for view in inputs.shards("pool"):
            found = _assigned(view)
            pool.add(found)
            ranks_N = hash_keys(found.keys, self.seed)
            compared_N = ranks_N <= known[-1] if is_sample else np.ones(len(ranks_N), bool)
            num_compared += int(compared_N.sum())
            new.add(found.take(compared_N & ~among(known, ranks_N)))
        sizes = {"pool": pool}
        for collection in inputs.collections("seeds"):
            sizes[collection] = Tally(np.zeros(len(pool.counts), np.int64))
            for view in inputs.shards(collection):
                sizes[collection].add(_assigned(view))
        pq.write_table(_sizes(sizes), scratch / SIZES_FILE)
        content = {"is_sample": is_sample, "num_compared": num_compared} | drift(fitted, new)
        (scratch / DRIFT_FILE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
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


def _assigned(view: ShardView) -> _Assigned:
    """Return the images of a shard that are kept and have a cluster."""
    table = view.read(schema.CLUSTER)
    rows = pa.array(np.flatnonzero(view.kept & table.column("cluster_id").is_valid().to_numpy()))
    numbers, similarities = (table.column(name).take(rows).to_numpy() for name in ("cluster_id", "cluster_similarity"))
    ids = view.read(schema.FETCH, ["image_id"]).column(0).take(rows).to_pylist()
    return _Assigned(keys_from_hex(ids), numbers, similarities)


def _baseline(folder: Path) -> tuple[Tally, Ranks, bool]:
    """Return what the pool looked like at the fit, the sorted hashes of images, and whether these are a sample."""
    try:
        content: Mapping[str, Any] = json.loads((folder / BASELINE_FILE).read_text(encoding="utf-8"))
        tally = Tally(np.array(content["counts"], np.int64), int(content["millionths"]))
        known: Ranks = np.load(folder / KNOWN_FILE, allow_pickle=False).astype(np.uint64, casting="no")
        return tally, known, bool(content["is_sample"]) and len(known) > 0
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CorruptError(f"{folder}: not a baseline of clusters: {error}; `--refit` makes a new one") from error


def _sizes(tallies: Mapping[str, Tally]) -> pa.Table:
    """Return images by cluster: a row a cluster, a column for ``pool`` and each ``seeds/<name>``."""
    size = max(len(tally.counts) for tally in tallies.values())
    columns: dict[str, Any] = {"cluster_id": np.arange(size, dtype=np.int32)}
    columns |= {name: np.pad(tally.counts, (0, size - len(tally.counts))) for name, tally in tallies.items()}
    return pa.table(columns)
