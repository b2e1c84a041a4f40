"""The index that the table chooses against exact search: recall@4, speed, bytes a vector.

Mixture: seeded vectors of 256 dimensions around 2,000 centres, each with a 32-dimensional spread of its own and noise
in all dimensions. Real: efficientnet-lite0 features of every image of the data folder, 72,000 x 1280, made once and
kept in ``--work``. Queries are drawn like the vectors and are not among them; those of the real features are 1,024 of
the images, which are then left out of the index.

``*_of_other_queries``: random directions, which lie nowhere near the vectors, after how much is searched was measured
on others of them, as ``retrieve`` does for each seed set.

The index is trained, filled, measured and saved as the ``index`` stage does it, and searched from its files. Sides
alternate; a ratio is that of medians over ``--rounds``, on ``--threads`` threads each.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from features import real_features

from curation.indexes.exact import Neighbours
from curation.indexes.flat import FlatIndex
from curation.indexes.index_header import HEADER_FILE, KEYS_FILE, LISTS_FILE
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.parameters import choose
from curation.indexes.preselect import threads
from curation.indexes.tuning import tune

DIM, CENTRES, SPREAD = 256, 2000, 32
K = 4
QUERIES = 1024
HELD_OUT = 500
RECALL = 0.98  # the default of index.recall
BATCH = 1 << 16

Halves = npt.NDArray[np.float16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="of the mixture; 0: none")
    parser.add_argument("--scale", type=float, default=0.7, help="norm of the spread; a centre has norm 1")
    parser.add_argument("--noise", type=float, default=0.2, help="norm of the noise")
    parser.add_argument("--real", type=int, default=1 << 30, help="at most this many real images; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--code-bytes", type=int, help="another entry of the table")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_index"), help="where features and indexes lie")
    options = parser.parse_args()
    if options.vectors:
        found = mixture(options.vectors + QUERIES, options.scale, options.noise)
        measure("mixture", found, 20, options)
    features = real_features(options.work / "features", options.threads) if options.real else None
    if features is not None:
        measure("features", features[: options.real], 5, options)


def measure(name: str, vectors: Halves, target: float, options: argparse.Namespace) -> None:
    queries_QD, vectors_ND = vectors[:QUERIES], vectors[QUERIES:]
    keys_N2 = np.random.default_rng(1).integers(0, 2**63, (len(vectors_ND), 2)).astype(np.uint64)
    flat = FlatIndex(vectors_ND.shape[1])
    flat.add(vectors_ND, keys_N2)
    folder = options.work / name
    seconds = build(vectors_ND, keys_N2, folder, options)
    index = IvfPqIndex.load(folder, verify=False)
    sides: dict[str, Callable[[], Neighbours]] = {
        "flat": lambda: flat.search(queries_QD, K, num_threads=options.threads),
        "ivf_pq": lambda: index.search(queries_QD, K, num_threads=options.threads),
    }
    index.search(queries_QD[:8], K, num_threads=options.threads)  # compiles
    times: dict[str, list[float]] = {side: [] for side in sides}
    found: dict[str, Neighbours] = {}
    for _ in range(options.rounds):
        for side, search in sides.items():
            start = time.perf_counter()
            found[side] = search()
            times[side].append((time.perf_counter() - start) / len(queries_QD) * 1e3)
    ms = {side: median(values) for side, values in times.items()}
    detail = {
        "vectors": len(vectors_ND),
        "dim": index.dim,
        "queries": len(queries_QD),
        "threads": options.threads,
        "rounds": options.rounds,
        "ms_a_query": {side: round(value, 4) for side, value in ms.items()},
        "spread": {side: [round(min(values), 4), round(max(values), 4)] for side, values in times.items()},
        "lists": index.quantizer.num_lists,
        "code_bytes": index.quantizer.code_bytes,
        "probes": index.probing.probes,
        "depth": index.probing.depth,
        "recall_at_training": index.probing.recall,
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
    }
    report(f"{name}_recall_at_4", recall(found["flat"], found["ivf_pq"]), "share", 0.97, detail)
    report(f"{name}_speed_vs_exact", ms["flat"] / ms["ivf_pq"], "x", target, detail)
    num_bytes = {
        file: (folder / file).stat().st_size / len(vectors_ND) for file in (LISTS_FILE, HEADER_FILE, KEYS_FILE)
    }
    limit = 80 if name == "mixture" else None
    report(f"{name}_bytes_a_vector", sum(num_bytes.values()), "bytes", limit, detail | {"files": num_bytes}, less=True)
    elsewhere(name, flat, index, options.threads)


def elsewhere(name: str, flat: FlatIndex, index: IvfPqIndex, num_threads: int) -> None:
    values = np.random.default_rng(2).standard_normal((HELD_OUT + QUERIES, index.dim))
    directions = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    queries_QD, held_out = directions[HELD_OUT:], directions[:HELD_OUT]
    exact = flat.search(queries_QD, K, num_threads=num_threads)
    measured_on_pool = recall(exact, index.search(queries_QD, K, num_threads=num_threads))
    keys_H2 = np.zeros((HELD_OUT, 2), np.uint64)  # none of the index's
    index.probing = tune(index, held_out, keys_H2, RECALL, num_threads=num_threads, drawn_from="random directions")
    start = time.perf_counter()
    found = index.search(queries_QD, K, num_threads=num_threads)
    detail = {
        "ms_a_query": round((time.perf_counter() - start) / QUERIES * 1e3, 4),
        "lists": index.quantizer.num_lists,
        "probes": index.probing.probes,
        "depth": index.probing.depth,
        "recall_as_measured_on_the_pool": round(measured_on_pool, 4),
    }
    report(f"{name}_recall_at_4_of_other_queries", recall(exact, found), "share", 0.97, detail)


def recall(exact: Neighbours, found: Neighbours) -> float:
    """Return the share of the exact neighbours that were found."""
    same_QKK = (exact.keys[:, :, None] == found.keys[:, None]).all(axis=3)
    return float(same_QKK.any(axis=2).mean())


def build(
    vectors_ND: Halves, keys_N2: npt.NDArray[np.uint64], folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Train, fill, measure and save an index; return the seconds that each took."""
    chosen = choose(len(vectors_ND), vectors_ND.shape[1], code_bytes=options.code_bytes)
    assert chosen.kind == "ivf_pq", chosen
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[step] = time.perf_counter() - start
        return result

    def fill() -> None:
        for start in range(0, len(vectors_ND), BATCH):
            index.add(vectors_ND[start : start + BATCH], keys_N2[start : start + BATCH])

    with threads(options.threads):
        sample = vectors_ND[HELD_OUT : HELD_OUT + chosen.sample_size]
        index: IvfPqIndex = timed("train", lambda: IvfPqIndex.train(sample, chosen))
        timed("add", fill)
        held_out = vectors_ND[:HELD_OUT], keys_N2[:HELD_OUT]
        index.probing = timed("tune", lambda: tune(index, *held_out, RECALL))
        timed("save", lambda: index.save(folder))
    return seconds


def mixture(num: int, scale: float, noise: float) -> Halves:
    """Return L2-normalised vectors in a seeded order."""
    random = np.random.default_rng(0)
    which = np.sort(random.integers(0, CENTRES, num))
    vectors_ND = np.empty((num, DIM), np.float16)
    for start, stop in zip(*np.searchsorted(which, [range(CENTRES), range(1, CENTRES + 1)]), strict=True):
        directions = random.standard_normal((SPREAD + 1, DIM), np.float32) / np.sqrt(DIM)
        inside = random.standard_normal((stop - start, SPREAD), np.float32) * (scale / np.sqrt(SPREAD))
        grain = random.standard_normal((stop - start, DIM), np.float32) * (noise / np.sqrt(DIM))
        values = directions[0] + inside @ directions[1:] + grain
        vectors_ND[start:stop] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return vectors_ND[random.permutation(num)]


def report(
    metric: str, value: float, unit: str, target: float | None, detail: dict[str, Any], less: bool = False
) -> None:
    line: dict[str, Any] = {"bench": "index_search", "metric": metric, "value": round(value, 4), "unit": unit}
    if target is not None:
        line |= {"target": target, "met": value <= target if less else value >= target}
    print(json.dumps(line | {"detail": detail}), flush=True)


if __name__ == "__main__":
    main()
