"""One part of a distributed k-means, as a worker sees it: its points gathered once, then their sums each iteration.

Files of a fit lie in ``work/cluster_fit/<key>/`` of the run, where ``<key>`` names what the fit is made from:

    points-<group>.npz       vectors (float16) and keys of a group of shards, those of the sample
    state-<round>.npz        ``kmeans.Centroids`` before a round; written whole or not at all
    sums-<round>-<group>.npz ``kmeans.PartialSums`` of a group in a round

A file is written by one unit and read once that unit is done, so one that was cut short is never read: its unit is done
again. Nothing here depends on who does what, because sums are exact (``curation.indexes.kmeans``).
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from curation.errors import StageError, StoreError
from curation.files import disk_full_is_said
from curation.indexes import kmeans
from curation.indexes.keys import Keys
from curation.indexes.npz import reading
from curation.indexes.vectors import Vectors
from curation.pipelines.context import Context
from curation.pipelines.units import Unit
from curation.stage import ShardView
from curation.stages.cluster import ClusterFit

T = TypeVar("T")

GATHER = 0  # the round in which points are gathered; iterations count from 1
FOLDER = "work/cluster_fit"


def work(context: Context, shards: Callable[..., Iterator[ShardView]], stage: ClusterFit, unit: Unit) -> int:
    """Do one unit of a round; return the number of points.

    Raises:
        CorruptError: A file of the fit is missing or damaged.
        DimensionError: Shards disagree on the dimension.
        VectorError: An embedding is not L2-normalised.
    """
    part = unit.part
    if part is None:
        raise StageError(unit.step, unit.shard, "is a part of a fit, but was not told which")
    folder = f"{FOLDER}/{part.key}"
    points = f"{folder}/points-{unit.shard}.npz"
    if part.round == GATHER:
        found = [stage.points(view, part.limit) for view in shards("pool", part.shards)]
        vectors_ND, keys_N2 = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        put(context, points, lambda path: np.savez(path, vectors=vectors_ND, keys=keys_N2))
        return len(keys_N2)
    state = get(context, f"{folder}/state-{part.round}.npz", kmeans.Centroids.load)
    vectors_ND, keys_N2 = get(context, points, load_points)
    sums = kmeans.partial_sums(vectors_ND, keys_N2, state.vectors, stage.num_threads)
    put(context, f"{folder}/sums-{part.round}-{unit.shard}.npz", sums.save)
    return len(keys_N2)


def load_points(path: Path) -> tuple[Vectors, Keys]:
    """Read what round ``GATHER`` wrote."""
    with reading(path, "points of a fit") as found:
        return found["vectors"], found["keys"]


def put(context: Context, name: str, save: Callable[[Path], None]) -> None:
    """Write a file of the run with what writes a local one."""
    with temporary("part") as folder:
        path = folder / "part.npz"
        save(path)
        with context.run.create(name) as stream, path.open("rb") as data:
            shutil.copyfileobj(data, stream, 1 << 20)


def get(context: Context, name: str, load: Callable[[Path], T]) -> T:
    """Read a file of the run with what reads a local one."""
    with temporary("part") as folder:
        return load(context.run.local_copy(name, folder))


@contextmanager
def temporary(name: str) -> Iterator[Path]:
    """Give a folder of this machine for a while.

    Raises:
        DiskFullError: It does not hold what is written there; where the run's own storage is full, that is named.
        StoreError: Nothing can be written there, or the run's storage failed.
    """
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError as error:  # also where all of them are full
        raise StoreError(f"no folder for temporary files can be written; set TMPDIR to one: {error}") from error
    with (
        disk_full_is_said(f"{parent} (TMPDIR)"),
        tempfile.TemporaryDirectory(prefix=f"curation-{name}-", dir=parent) as folder,
    ):
        yield Path(folder)
