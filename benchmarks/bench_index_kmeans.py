"""Spherical k-means against ``faiss.Kmeans(spherical=True)``, two Ray workers against one, and balanced sampling.

``kmeans_*``: 10^6 x 256 points of a seeded mixture (2,000 centres, 32-dimensional spread plus noise), k = 1,000; a
1280-dimensional mixture; and the efficientnet-lite0 features of every image of the data folder. Both get the same
points and threads and do the same number of iterations, that after which ours has come to rest where it is before
``--iterations``; first centroids of each its own, and what choosing them takes is timed. The points are stored float16;
Faiss gets them as float32, and that copy is not timed. Objectives are mean similarities of all points with the final
centroids, both taken by ``kmeans.assign``. Sides alternate; times are medians over ``--rounds``.

``ray_*``: a run whose pool holds only embeddings, ``cluster_fit`` with one and with two Ray workers of one core; time
of all iterations but the first, which waits for workers to start.

``balanced_*``: 30,000 points of 10, 20 and 50 groups with sizes by Zipf's law, clustered with the default settings and
``cluster.levels: [auto]``; shares of the groups in a balanced and in a flat random sample of 30 images a group, in
units of an equal share, over ``--seeds`` of each mixture: the smallest and the largest of all, of flat samples the
largest share that the rarest group ever got. ``resampled`` is the same with levels by k-means with resampling, the
paper's way.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from features import real_features

from curation import schema
from curation.config import ResourceConfig, RunConfig
from curation.config.selection import ClusterConfig
from curation.indexes import kmeans
from curation.indexes.balanced import QuotaSample, shares
from curation.indexes.hierarchy import grow
from curation.indexes.keys import Keys, hex_from_keys
from curation.indexes.vectors import Vectors
from curation.pipelines import kmeans_rounds
from curation.pipelines.context import Context
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.ray_runner import RayRunner
from curation.pipelines.units import Unit
from curation.store import Marker, Run

MIXTURES = [(20, 64), (50, 256), (10, 32)]  # groups, dimensions
SHARE = 30  # images a group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000, help="of 256 dimensions; 0: none")
    parser.add_argument("--wide-points", type=int, default=100_000, help="of 1280 dimensions; 0: none")
    parser.add_argument("--real", type=int, default=1 << 30, help="at most this many real images; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_index"), help="where features of images lie")
    parser.add_argument("--clusters", type=int, default=1_000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--ray-points", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3, help="of each mixture that is sampled")
    parser.add_argument(
        "--only", choices=["kmeans", "ray", "balanced"], nargs="*", default=["kmeans", "ray", "balanced"]
    )
    options = parser.parse_args()
    if "balanced" in options.only:
        balanced(options.seeds)
    if "kmeans" in options.only:
        for name, points in (("", options.points), ("wide_", options.wide_points)):
            if points:
                against_faiss(name, *mixture(points, 1280 if name else 256), options)
        features_ND = real_features(options.work / "features") if options.real else None
        if features_ND is not None:
            keys_N2 = np.random.default_rng(0).integers(0, 2**64, (len(features_ND), 2), dtype=np.uint64)
            against_faiss("features_", features_ND[: options.real], keys_N2[: options.real], options)
    if "ray" in options.only:
        two_workers(*mixture(options.ray_points), options.clusters, options.iterations)


def against_faiss(name: str, vectors_ND: Vectors, keys_N2: Keys, options: argparse.Namespace) -> None:
    k = options.clusters
    kmeans.fit(lambda: [(vectors_ND[:20_000], keys_N2[:20_000])], 50, 1, seed=0)  # compiles
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {side: {clock: [] for clock in clocks} for side in ("ours", "faiss")}
    singles_ND = vectors_ND.astype(np.float32)

    def timed(side: str, work: Callable[[], Any]) -> Any:
        before = {clock: read() for clock, read in clocks.items()}
        done = work()
        for clock, read in clocks.items():
            seconds[side][clock].append(round(read() - before[clock], 2))
        return done

    for _ in range(options.rounds):
        ours = timed("ours", lambda: kmeans.fit(lambda: [(vectors_ND, keys_N2)], k, options.iterations, seed=0))
        theirs = faiss.Kmeans(
            vectors_ND.shape[1],
            k,
            niter=len(ours.history),
            spherical=True,
            seed=0,
            max_points_per_centroid=len(vectors_ND),
        )
        timed("faiss", lambda theirs=theirs: theirs.train(singles_ND))
    grid_KD = (np.rint(theirs.centroids * 2.0**24) / 2.0**24).astype(np.float32)
    found = {
        side: kmeans.assign(vectors_ND, centroids) for side, centroids in (("ours", ours.vectors), ("faiss", grid_KD))
    }
    objective = {side: float(similarities.astype(np.float64).mean()) for side, (_, similarities) in found.items()}
    empty = int((np.bincount(found["ours"][0], minlength=k) == 0).sum())
    detail = {
        "points": len(vectors_ND),
        "dim": vectors_ND.shape[1],
        "k": k,
        "iterations": len(ours.history),
        "threads": faiss.omp_get_max_threads(),
        "rounds": options.rounds,
        "seconds": seconds,
        "objective": {side: round(value, 6) for side, value in objective.items()},
        "imbalance": round(ours.history[-1].imbalance, 3),
    }
    report(f"{name}kmeans_objective_vs_faiss", objective["ours"] / objective["faiss"], detail, "x", at_least=0.999)
    for clock in clocks:
        ratio = median(seconds["ours"][clock]) / median(seconds["faiss"][clock])
        report(f"{name}kmeans_{clock}_time_vs_faiss", ratio, detail, "x", at_most=1.1)
    report(f"{name}kmeans_empty_clusters", empty, detail, "clusters", at_most=0)


def two_workers(vectors_ND: Vectors, keys_N2: Keys, k: int, iterations: int) -> None:
    seconds, digests = {}, {}
    for workers in (1, 2):
        config = RunConfig(
            cluster=ClusterConfig(num_clusters=k, iterations=iterations, sample_size=None),
            resources={"cluster": ResourceConfig(workers=workers, cpus=1)},
        )
        with tempfile.TemporaryDirectory() as folder:
            context, plan = Context(planted(folder, vectors_ND, keys_N2, 10_000), config), build_plan(config)
            step, runner, states = plan.step("cluster_fit"), RayRunner(), Written(Path(folder))
            try:
                list(kmeans_rounds.run(states.watched(runner), context, plan, step, [Unit(step.name, "", None, {})]))
            finally:
                runner.close()
            seconds[workers] = round(states.times[-1] - states.times[1], 2)  # the second round has warm workers
            marker = context.run.artefact_marker(step.name)
            digests[workers] = marker.digest if marker is not None else ""
    detail = {"points": len(vectors_ND), "k": k, "rounds": len(states.times) - 2, "seconds": seconds}
    report("ray_two_workers_speedup", seconds[1] / seconds[2], detail, "x", at_least=1.6)
    report("ray_two_workers_same_bits", int(digests[1] == digests[2]), detail, "runs", at_least=1)


class Written:
    """When each round had been handed out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times: list[float] = []

    def watched(self, runner: RayRunner) -> Any:
        """Return the runner, watched."""
        times = self.times

        class Watched:
            def run(self, *arguments: Any) -> Any:
                yield from runner.run(*arguments)
                times.append(time.perf_counter())

        return Watched()


def balanced(seeds: int) -> None:
    config = ClusterConfig(levels=("auto",))
    ways: dict[str, dict[str, Any]] = {
        "balanced": {"levels": config.levels},
        "resampled": {"levels": (600, 150, 32), "method": "kmeans"},
        "flat": {"levels": ()},
    }
    shares_of: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in ways}
    for (groups, dim), seed in product(MIXTURES, range(seeds)):
        vectors_ND, label_N, keys_N2 = zipf(groups, dim, seed)
        budget = SHARE * groups

        def points(found: tuple[Vectors, Keys] = (vectors_ND, keys_N2)) -> list[tuple[Vectors, Keys]]:
            return [found]

        leaves = kmeans.fit(points, config.num_clusters, config.iterations, seed).vectors
        numbers_N, _ = kmeans.assign(vectors_ND, leaves)
        sizes = np.bincount(numbers_N, minlength=len(leaves))
        for name, way in ways.items():
            if name == "resampled" and groups != 20:
                continue
            quotas_K, clusters_N = np.array([budget]), np.zeros(len(keys_N2), np.int64)
            if name != "flat":
                tree = grow(leaves, iterations=config.iterations, seed=seed, rounds=config.resampling_rounds, **way)
                quotas_K, clusters_N = shares(sizes, tree.parents, budget, seed), numbers_N.astype(np.int64)
            sample = QuotaSample(quotas_K, seed)
            sample.add(clusters_N, keys_N2)
            chosen = {tuple(key) for key in sample.result().tolist()}
            assert len(chosen) == len(sample.result()) == budget  # all of it, and no image twice
            rows = [row for row, key in enumerate(keys_N2.tolist()) if tuple(key) in chosen]
            shares_of[name].append(np.bincount(label_N[rows], minlength=groups) / SHARE)
    for name, found in shares_of.items():
        detail = {
            "mixtures": [[20, 64]] if name == "resampled" else MIXTURES,
            "share": SHARE,
            "levels": [config.num_clusters, *ways[name]["levels"]] if name != "flat" else [],
            "seeds": seeds,
            "largest": [round(float(share.max()), 3) for share in found],
            "smallest": [round(float(share.min()), 3) for share in found],
        }
        is_ours, is_flat = name == "balanced", name == "flat"
        rarest = max(share.min() for share in found) if is_flat else min(share.min() for share in found)
        largest = max(share.max() for share in found)
        targets = {"at_least": 0.5 if is_ours else None, "at_most": 0.1 if is_flat else None}
        report(f"{name}_smallest_share", rarest, detail, "x", **targets)
        report(f"{name}_largest_share", largest, detail, "x", at_most=2.0 if is_ours else None)


def mixture(num: int, dim: int = 256, centres: int = 2000, rank: int = 32) -> tuple[Vectors, Keys]:
    rng = np.random.default_rng(0)
    middle = unit(rng.standard_normal((centres, dim), np.float32))
    basis = rng.standard_normal((rank, dim), np.float32) / np.sqrt(dim * rank)
    vectors_ND = np.empty((num, dim), np.float16)
    for start in range(0, num, 50_000):
        count = min(50_000, num - start)
        values = middle[rng.integers(0, centres, count)] + 0.5 * rng.standard_normal((count, rank), np.float32) @ basis
        values += 0.3 / np.sqrt(dim) * rng.standard_normal((count, dim), np.float32)
        vectors_ND[start : start + count] = unit(values)
    return vectors_ND, rng.integers(0, 2**64, (num, 2), dtype=np.uint64)


def zipf(groups: int, dim: int, seed: int) -> tuple[Vectors, npt.NDArray[np.int64], Keys]:
    """Return groups with sizes by Zipf's law, the rarest about 0.06 of an equal share."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, groups + 1) ** -1.6
    sizes = np.maximum(0.06 * 30_000 / groups, 30_000 * weights / weights.sum()).astype(int)
    label_N = np.repeat(np.arange(groups), sizes)
    middle = unit(rng.standard_normal((groups, dim)))
    bases = np.linalg.qr(rng.standard_normal((groups, dim, 4)))[0]
    values = middle[label_N]
    for group, size in enumerate(sizes):
        values[label_N == group] += 0.1 * rng.standard_normal((size, 4)) @ bases[group].T
    values += 0.08 / np.sqrt(dim) * rng.standard_normal(values.shape)
    return unit(values).astype(np.float16), label_N, rng.integers(0, 2**64, (len(label_N), 2), dtype=np.uint64)


def unit(values_ND: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values_ND / np.linalg.norm(values_ND, axis=1, keepdims=True)


def planted(folder: str, vectors_ND: Vectors, keys_N2: Keys, shard_rows: int) -> Run:
    """Return a run that holds what ``cluster_fit`` reads and nothing else."""
    run = Run(folder)
    said = {"fingerprint": "", "inputs": {}, "covers": "", "seconds": 0.0}
    tables: Sequence[Any] = (
        schema.CRAWL,
        schema.FETCH,
        schema.PCA_HASH_VERDICT,
        schema.NSFW_VERDICT,
        schema.FACES_VERDICT,
        schema.DEDUP,
        schema.embed(vectors_ND.shape[1]),
    )
    starts = range(0, len(keys_N2), shard_rows)
    for shard, start in enumerate(starts):
        some = vectors_ND[start : start + shard_rows]
        ids = pa.array(hex_from_keys(keys_N2[start : start + shard_rows]))
        known = {
            "image_id": ids,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), some.shape[1]),
        }
        for table in tables:
            columns = [known.get(field.name, pa.nulls(len(some), field.type)) for field in table.schema]
            run.commit("pool", table.name, shard, pa.table(columns, schema=table.schema), said)
    run.commit_artefacts("crawl.pool", {}, Marker("", "", len(keys_N2), {}, num_shards=len(starts)))
    return run


def report(
    metric: str,
    value: float,
    detail: dict[str, Any],
    unit: str,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    target = at_least if at_least is not None else at_most
    met = None if target is None else (value >= target if at_least is not None else value <= target)
    line = {"bench": "index_kmeans", "metric": metric, "value": round(float(value), 5), "unit": unit}
    print(json.dumps(line | {"target": target, "met": met if met is None else bool(met), "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
