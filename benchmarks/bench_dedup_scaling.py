"""All similar pairs of 10^5 to 10^6 descriptors, and components of 10^8 edges.

Descriptors are a seeded mixture with planted copies: pairs at every cosine from 0.6 to 1, as many just above 0.6, and
crowds of copies. The approximate search is fitted and run at each size, each in a process of its own on a memory-mapped
file; the exact one at the smallest size, and extrapolated quadratically.

``python benchmarks/bench_dedup_scaling.py --max-rows 100000 --edges 1000000`` is a quick run. ``--mixture`` takes other
pools; ``--descriptors`` takes real ones, an ``.npy`` file of float16 rows, and compares with the exact search.
"""

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.indexes.components import UnionFind
from curation.indexes.pairs import Edges, ExactPairs, InvertedPairs
from curation.indexes.vectors import blocks, stored_similarities

DIM = 512
FLOOR = 0.6
SAMPLE = 10_000
BLOCK = 50_000
NUM_FILES = 10
# (rows a centre, cosine of a row with its centre): two rows of a centre have the square of that in common
MIXTURES = {"mixed": (100, 0.55), "isotropic": (1, 0.0), "clustered": (1000, 0.65)}

KINDS = ("any_cosine", "just_above_floor", "crowds")

Array = npt.NDArray[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--max-rows", type=int, default=1_000_000, help="leave out larger sizes")
    parser.add_argument("--mixture", choices=MIXTURES, default="mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--edges", type=int, default=100_000_000, help="of the union-find; 0: not run")
    parser.add_argument("--descriptors", type=Path, help=".npy of real descriptors: only these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.descriptors:
            in_process(real, options.descriptors, options.threads)
            return
        sizes = sorted(size for size in options.sizes if size <= options.max_rows)
        if sizes:
            scaling(sizes, options.mixture, options.threads, Path(folder))
        if options.edges:
            in_process(write_edges, Path(folder), options.edges)
            seconds, gib = in_process(unite, Path(folder), options.edges)
            detail = {"edges": options.edges, "rows": options.edges // 5, "files": NUM_FILES}
            report("union_find_seconds", seconds, detail, "s", 30, least=False)
            report("union_find_gib", gib, detail, "GiB", 0.5, least=False)


def scaling(sizes: Sequence[int], mixture: str, threads: int, folder: Path) -> None:
    seconds: dict[str, list[float]] = {"wall": [], "cpu": []}
    for size in sizes:
        path = folder / f"{size}.f16"
        planted = in_process(plant, path, size, mixture)
        found = in_process(approximate, path, size, threads, planted)
        for clock, values in seconds.items():
            values.append(sum(found[f"{clock}_seconds"].values()))
        detail = {"rows": size, "dim": DIM, "mixture": mixture, "threads": threads, **found}
        report(f"seconds_{size}", seconds["wall"][-1], detail, "s", None)
        edges = dict(zip(KINDS, np.bincount(planted[2]).tolist(), strict=True))
        report(f"lowest_recall_{size}", min(found["recall"].values()), {"true_edges": edges}, "share", 0.99)
        report(f"peak_gib_{size}", found["gib"], {}, "GiB", 3 if size == 1_000_000 else None, least=False)
        if size == sizes[0]:
            exact_seconds, all_recall = in_process(exact, path, size, threads)
            detail = {"rows": size, "cpu_seconds": exact_seconds["cpu"]}
            report(f"exact_seconds_{size}", exact_seconds["wall"], detail, "s", None)
            report(f"recall_of_exact_{size}", all_recall[0], {"edges": all_recall[1]}, "share", 0.99)
        path.unlink()
    steps = [(i, i + 1) for i in range(len(sizes) - 1)] + ([(0, len(sizes) - 1)] if len(sizes) > 2 else [])
    for i, j in steps:
        growth = math.log(sizes[j] / sizes[i])
        exponent = {clock: math.log(values[j] / values[i]) / growth for clock, values in seconds.items()}
        report(f"exponent_{sizes[i]}_{sizes[j]}", exponent["wall"], {"cpu": exponent["cpu"]}, "", 1.3, least=False)
    growth = (sizes[-1] / sizes[0]) ** 2
    ratio = {clock: exact_seconds[clock] * growth / values[-1] for clock, values in seconds.items()}
    detail = {"cpu": ratio["cpu"], "exact_seconds": exact_seconds["wall"] * growth}
    report(f"ratio_vs_exact_{sizes[-1]}", ratio["wall"], detail, "x", 5 if sizes[-1] >= 1_000_000 else None)


def plant(path: Path, size: int, mixture: str) -> Array:
    """Write a pool and return its true pairs and their place in ``KINDS``, (3, P)."""
    rng = np.random.default_rng(size)
    vectors = np.memmap(path, np.float16, "w+", shape=(size, DIM))
    rows_a_centre, share = MIXTURES[mixture]
    centres = unit(rng.standard_normal((max(1, size // rows_a_centre), DIM), np.float32))
    for start in range(0, size, BLOCK):
        rows = unit(rng.standard_normal((min(BLOCK, size - start), DIM), np.float32))
        of = centres[rng.integers(0, len(centres), len(rows))]
        vectors[start : start + len(rows)] = unit(share * of + math.sqrt(1 - share**2) * rows)
    order = rng.permutation(size)
    num = size // 50
    pairs = []
    # 2% of the rows get a copy at any cosine, 2% one just above the floor.
    for k, (low, high) in enumerate([(FLOOR, 1.0), (FLOOR, FLOOR + 0.02)]):
        source, copy = order[2 * k * num : (2 * k + 1) * num], order[(2 * k + 1) * num : (2 * k + 2) * num]
        copies_of(rng, vectors, source, copy, rng.uniform(low, high, num))
        pairs.append(np.stack([source, copy, np.full(num, k)]))
    # And 2% are in crowds of 2 to 200 copies of one row, some of which are closer than the floor to each other.
    place = 4 * num
    while place < 5 * num:
        members = order[place : place + int(rng.integers(3, 202))]
        place += len(members)
        copies_of(
            rng, vectors, np.full(len(members) - 1, members[0]), members[1:], rng.uniform(0.75, 1, len(members) - 1)
        )
        left, right = members[np.stack(np.triu_indices(len(members), 1))]
        pairs.append(np.stack([left, right, np.full(len(left), 2)]))
    # One image is there 5,000 times (a hundredth of smaller pools).
    same = order[place : place + min(5000, size // 100)]
    vectors[same] = vectors[same[0]]
    vectors.flush()
    true = np.concatenate(pairs, axis=1)
    true[:2].sort(axis=0)
    return true[:, stored_similarities(vectors, vectors, true[0], true[1]) > FLOOR]


def copies_of(rng: np.random.Generator, vectors: Array, source: Array, copy: Array, cosines: Array) -> None:
    rows = unit(vectors[source].astype(np.float32))
    noise = rng.standard_normal(rows.shape, np.float32)
    noise = unit(noise - np.einsum("pd,pd->p", noise, rows)[:, None] * rows)
    cosines = cosines.astype(np.float32)[:, None]
    vectors[copy] = unit(cosines * rows + np.sqrt(1 - cosines * cosines) * noise)


def approximate(path: Path, size: int, threads: int, true: Array) -> dict[str, Any]:
    vectors = np.memmap(path, np.float16, "r", shape=(size, DIM))
    warm_up(vectors[:100], threads)
    sample = vectors[np.sort(np.random.default_rng(0).choice(size, min(size, SAMPLE), replace=False))]
    times = [clocks()]
    search = InvertedPairs.fit(sample, size, [FLOOR], num_threads=threads)
    times.append(clocks())
    codes = search.encode(vectors, threads)
    times.append(clocks())
    edges = found_edges(search.self_pairs(vectors, codes, FLOOR, threads), size)
    times.append(clocks())
    wall, cpu = (
        dict(zip(("fit", "encode", "search"), part, strict=True)) for part in np.diff(times, axis=0).T.tolist()
    )
    found = np.isin(true[0] * size + true[1], edges)
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "recall": {kind: float(found[true[2] == k].mean()) for k, kind in enumerate(KINDS)},
        "edges": len(edges),
        "gib": peak_gib(),
        "fitted": search.describe(),
    }


def exact(path: Path, size: int, threads: int) -> tuple[dict[str, float], tuple[float, int]]:
    """Return seconds of the exact search, and recall of the approximate one among all its edges."""
    vectors = np.memmap(path, np.float16, "r", shape=(size, DIM))
    return compared(vectors, threads)


def real(path: Path, threads: int) -> None:
    vectors = np.load(path, allow_pickle=False)
    seconds, (recall, num_edges) = compared(vectors, threads)
    detail = {"rows": len(vectors), "edges": num_edges, "exact_seconds": seconds["wall"]}
    report("recall_of_exact_real", recall, detail, "share", 0.99)


def compared(vectors: Array, threads: int) -> tuple[dict[str, float], tuple[float, int]]:
    warm_up(vectors[:100], threads)
    size = len(vectors)
    start = clocks()
    every = found_edges(ExactPairs().self_pairs(vectors, np.empty((size, 0), np.uint8), FLOOR, threads), size)
    wall, cpu = (end - begin for begin, end in zip(start, clocks(), strict=True))
    search = InvertedPairs.fit(vectors[:: max(1, size // SAMPLE)], size, [FLOOR], num_threads=threads)
    some = found_edges(search.self_pairs(vectors, search.encode(vectors, threads), FLOOR, threads), size)
    assert np.isin(some, every).all()
    return {"wall": wall, "cpu": cpu}, (len(some) / max(1, len(every)), len(every))


def clocks() -> tuple[float, float]:
    """Return wall time and that of all threads of this process: the latter counts on a machine shared with others."""
    return time.perf_counter(), time.process_time()


def warm_up(vectors: Array, threads: int) -> None:
    """Compile what is measured."""
    search = InvertedPairs.fit(vectors, len(vectors), [FLOOR], num_threads=threads)
    for one in (search, ExactPairs()):
        found_edges(one.self_pairs(vectors, one.encode(vectors), FLOOR, threads), 1)


def found_edges(pieces: Any, size: int) -> Array:
    def numbers(edges: Edges) -> Array:
        return edges.left * size + edges.right

    return np.concatenate([np.empty(0, np.int64), *map(numbers, pieces)])


def unite(folder: Path, num_edges: int) -> tuple[float, float]:
    """Return seconds and peak memory of the components of random edges in Parquet files."""
    union = UnionFind(2)
    union.add(np.zeros(1, np.int64), np.ones(1, np.int64))
    union.labels()
    start = time.perf_counter()
    union = UnionFind(num_edges // 5)
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1 << 17, columns=["left", "right"]):
                union.add(batch["left"].to_numpy(), batch["right"].to_numpy())
    for first, last in blocks(len(union), 1 << 20):
        union.labels(first, last)
    return time.perf_counter() - start, peak_gib()


def write_edges(folder: Path, num_edges: int) -> None:
    rng = np.random.default_rng(0)
    for part in range(NUM_FILES):
        left, right = rng.integers(0, num_edges // 5, (2, num_edges // NUM_FILES))
        similarity = rng.uniform(FLOOR, 1, len(left))
        table = pa.table({"left": left, "right": right, "similarity": similarity})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=1 << 20)


def unit(rows: Array) -> Array:
    scaled: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def report(
    metric: str, value: float, detail: dict[str, Any], unit: str, target: float | None, least: bool = True
) -> None:
    met = None if target is None else (value >= target if least else value <= target)
    line = {"bench": "dedup_scaling", "metric": metric, "value": round(value, 4), "unit": unit}
    print(json.dumps(line | {"target": target, "met": met, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
