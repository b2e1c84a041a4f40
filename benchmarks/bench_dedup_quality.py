"""How well and how fast copies are found: against brute force, and against imagededup on the same files.

The 1,000 photos of ``photos.parquet`` and about 2,100 planted copies of 600 of them (seeded; every edit of
``curation.edits`` but the collage, at its two milder strengths). The truth is about pairs: two files that show the same
photo are copies, also two copies of it.

- ``components_equal_brute_force``: components of both backends at ``dedup.threshold`` against SciPy's connected
  components of all float64 dot products, and which of those edges they have.
- ``pair_f1``: F1 over pairs at the default threshold, and the margin over imagededup's CNN and PHash, each at its best
  threshold of a grid, chosen on these very files: the choice favours the peers.
- ``time_ratio``: seconds of the peer over ours, encoding and finding, on a part of the files, by turns, medians.

Descriptors, copies and the peers' pairs stay in ``--work``, so a second run takes a minute or two. Without ``--peer``
or ``IMAGEDEDUP_PYTHON`` (the Python of an environment with imagededup; ``make bench-dedup`` makes one) only our own
side is measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
from planted import DATA, ROOT, Planted, fingerprint, plant

from curation.config.dedup import DedupConfig, SscdConfig
from curation.config.images import ImagesConfig
from curation.images import decode
from curation.indexes.components import UnionFind
from curation.indexes.exact import Edges, self_join
from curation.indexes.pairs import InvertedPairs
from curation.models.sscd import SscdEncoder
from curation.models.weights import resolve

THRESHOLD = DedupConfig().threshold
HEADROOM = 2.0  # as in the pipeline's passes
Descriptors = npt.NDArray[np.float16]
Join = Callable[[Descriptors, float], Iterator[Edges]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-dedup")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=Path, default=os.environ.get("IMAGEDEDUP_PYTHON"))
    parser.add_argument("--timed", type=int, default=192, help="files of the time ratio")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not (DATA / "photos.parquet").exists():
        sys.exit(f"needs {DATA}/photos.parquet; set CURATION_TEST_DATA to the folder that holds it")
    planted = plant(options.work / f"files-{options.seed}", options.seed)
    encoder = SscdEncoder(resolve(SscdConfig().weights), batch_size=SscdConfig().batch_size)
    vectors_ND = described(planted, encoder, options.work)
    detail = {"images": len(planted.paths), "copies": sum(e != "original" for e in planted.edits), "seed": options.seed}
    bench_components(planted, vectors_ND, self_join_of_one_thread, "exact", detail)
    bench_components(planted, vectors_ND, inverted_of_one_thread, "inverted", detail)
    ours = bench_f1(planted, vectors_ND, detail)
    if options.peer is None:
        return
    bench_peers(planted, ours, options.work, options.peer, detail)
    bench_time(planted, encoder, options)


def describe(paths: Sequence[Path], encoder: SscdEncoder) -> Descriptors:
    """Return stored descriptors (N, 512), with a thread a core, as workers of the pipeline have."""
    limits, size = ImagesConfig(), encoder.batch_size

    def one(start: int) -> npt.NDArray[np.float32]:
        batch = paths[start : start + size]
        return encoder(
            [encoder.prepare(decode(path.read_bytes(), limits, encoder.side_px, HEADROOM)) for path in batch]
        )

    with ThreadPoolExecutor(cores()) as pool:
        return np.concatenate(list(pool.map(one, range(0, len(paths), size)))).astype(np.float16)


def described(planted: Planted, encoder: SscdEncoder, work: Path) -> Descriptors:
    """Return the descriptors of all files, from the work folder where they were made before."""
    path = work / f"sscd-{fingerprint(planted, resolve(SscdConfig().weights).sha256, str(encoder.side_px))}.npy"
    if not path.exists():
        np.save(path, describe(planted.paths, encoder))
    return np.load(path, allow_pickle=False)


def self_join_of_one_thread(vectors_ND: Descriptors, threshold: float) -> Iterator[Edges]:
    return self_join(vectors_ND, threshold, num_threads=1)


def inverted_of_one_thread(vectors_ND: Descriptors, threshold: float) -> Iterator[Edges]:
    search = InvertedPairs.fit(vectors_ND, len(vectors_ND), [threshold], DedupConfig().recall, 0, 1)
    return search.self_pairs(vectors_ND, search.encode(vectors_ND, 1), threshold, 1)


def brute_force(vectors_ND: Descriptors, threshold: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return all pairs i < j above the threshold: float64 dot products rounded to 1e-6, no part of our code."""
    x_ND = vectors_ND.astype(np.float64)
    left, right = np.nonzero(np.triu(np.round(x_ND @ x_ND.T, 6) > threshold, 1))
    return left, right


def bench_components(
    planted: Planted, vectors_ND: Descriptors, join: Join, backend: str, detail: dict[str, Any]
) -> None:
    """Compare a backend's edges and components with brute force.

    Edges are counted between different descriptors: a backend may join identical ones by a star instead of all pairs.
    """
    num_rows = len(vectors_ND)
    _, first, inverse = np.unique(vectors_ND, axis=0, return_index=True, return_inverse=True)
    distinct_N = first[inverse]
    left, right = brute_force(vectors_ND, THRESHOLD)
    graph = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), (num_rows, num_rows))
    expected = first_rows(scipy.sparse.csgraph.connected_components(graph, directed=False)[1])
    union, edges = UnionFind(num_rows), set()
    for found in join(vectors_ND, THRESHOLD):
        union.add(found.left, found.right)
        edges |= pairs(distinct_N[found.left], distinct_N[found.right])
    wanted = pairs(distinct_N[left], distinct_N[right])
    equal = bool((union.labels() == expected).all())
    sizes = np.bincount(expected)
    more = detail | {"edges": len(wanted), "components": int((sizes > 1).sum()), "largest": int(sizes.max())}
    report(f"{backend}_components_equal_brute_force", int(equal), "bool", 1 if backend == "exact" else None, more)
    recall = len(edges & wanted) / max(1, len(wanted))
    precision = len(edges & wanted) / max(1, len(edges))
    report(f"{backend}_edge_recall", recall, "share", 1.0 if backend == "exact" else 0.99, more)
    report(f"{backend}_edge_precision", precision, "share", 1.0, more)


def pairs(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> set[tuple[int, int]]:
    """Return pairs of different rows, smaller first."""
    both = np.sort(np.stack((left, right), axis=1), axis=1)
    return {(a, b) for a, b in both.tolist() if a != b}


def first_rows(labels_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the smallest row of each row's component."""
    _, first, inverse = np.unique(labels_N, return_index=True, return_inverse=True)
    return first[inverse]


def bench_f1(planted: Planted, vectors_ND: Descriptors, detail: dict[str, Any]) -> float:
    """Report our F1 over pairs; return that of the default threshold."""
    x_ND = vectors_ND.astype(np.float64)
    cosine_NN = np.round(x_ND @ x_ND.T, 6)
    left, right = np.triu_indices(len(x_ND), 1)
    curve = f1_curve(planted, left, right, cosine_NN[left, right], np.arange(0.3, 0.96, 0.02), np.greater)
    at = f1_curve(planted, left, right, cosine_NN[left, right], np.array([THRESHOLD]), np.greater)[0]
    best = max(curve, key=lambda point: point["f1"])
    report("sscd_pair_f1", at["f1"], "F1", None, detail | at | {"pairs": planted.num_pairs, "best": best})
    return at["f1"]


def bench_peers(planted: Planted, ours: float, work: Path, peer: Path, detail: dict[str, Any]) -> None:
    output = work / f"imagededup-{fingerprint(planted)}"
    if not (output / "phash.npz").exists():
        run_peer(peer, planted.paths[0].parent, output)
    for name, grid, keeps in (
        ("cnn", np.arange(0.5, 1.0, 0.01), np.greater_equal),
        ("phash", np.arange(0, 25), np.less_equal),
    ):
        with np.load(output / f"{name}.npz", allow_pickle=False) as found:
            place = {path.name: row for row, path in enumerate(planted.paths)}
            rows = np.array([place[str(file)] for file in found["names"]])
            left, right = rows[found["left"].astype(int)], rows[found["right"].astype(int)]
            curve = f1_curve(planted, left, right, found["score"], grid, keeps)
        best = max(curve, key=lambda point: point["f1"])
        report(f"imagededup_{name}_pair_f1", best["f1"], "F1", None, detail | best)
        report(f"f1_margin_over_imagededup_{name}", ours - best["f1"], "F1", 0.0, {"ours": ours, "theirs": best["f1"]})


def f1_curve(
    planted: Planted,
    left: npt.NDArray[np.int64],
    right: npt.NDArray[np.int64],
    score: npt.NDArray[np.float64],
    grid: npt.NDArray[Any],
    keeps: Callable[..., npt.NDArray[np.bool_]],
) -> list[dict[str, float]]:
    """Return precision, recall and F1 over pairs for each threshold."""
    true = planted.family_N[left] == planted.family_N[right]
    curve = []
    for threshold in grid:
        kept = keeps(score, threshold)
        right_ones, all_ones = int((kept & true).sum()), int(kept.sum())
        precision, recall = right_ones / max(1, all_ones), right_ones / planted.num_pairs
        f1 = 2 * right_ones / (all_ones + planted.num_pairs)
        point = {"threshold": float(threshold), "precision": precision, "recall": recall, "f1": f1}
        curve.append({name: round(value, 4) for name, value in point.items()})
    return curve


def bench_time(planted: Planted, encoder: SscdEncoder, options: argparse.Namespace) -> None:
    """Report how many times our seconds the peers take, on the same part of the files."""
    folder = options.work / "timed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = [Path(shutil.copy(path, folder)) for path in planted.paths[: options.timed]]
    seconds: dict[str, list[float]] = {"sscd": [], "cnn": [], "phash": []}
    for turn in range(options.rounds):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            if side == "peer":
                took = run_peer(options.peer, folder, options.work / "timed-output", "--only-time")
                for name, parts in took.items():
                    seconds[name].append(parts["encode"] + parts["find"])
            else:
                start = time.perf_counter()
                list(self_join(describe(paths, encoder), THRESHOLD))
                seconds["sscd"].append(time.perf_counter() - start)
    detail = {name: round(median(values), 2) for name, values in seconds.items()}
    detail |= {"files": len(paths), "rounds": options.rounds, "load": round(os.getloadavg()[0], 1)}
    for name in ("cnn", "phash"):
        ratio = median(seconds[name]) / median(seconds["sscd"])
        report(f"time_ratio_vs_imagededup_{name}", ratio, "x", None, detail)


def run_peer(python: Path, folder: Path, output: Path, *options: str) -> Any:
    script = ROOT / "benchmarks" / "peers" / "run_imagededup.py"
    shim = ROOT / "curation" / "models" / "torchvision_shim.py"
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores()), "PYTHONPATH": ""}
    command = [str(python), str(script), str(folder), str(output), "--shim", str(shim), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(metric: str, value: float, unit: str, target: float | None, detail: dict[str, Any]) -> None:
    line = {"bench": "dedup_quality", "metric": metric, "value": round(value, 4), "unit": unit, "target": target}
    met = None if target is None else bool(value > target if metric.startswith("f1_margin") else value >= target)
    print(json.dumps(line | {"met": met, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
