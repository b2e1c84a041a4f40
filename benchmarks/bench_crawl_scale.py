"""A list of five million URLs through the crawl stage: memory of the driver and of all processes, and URLs a second.

The list is Parquet with LAION's columns and a heavy tail of hosts; one URL in eight comes again. What is measured is
``curate run --stage crawl`` as a user starts it, its processes watched twenty times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_DRIVER_BYTES = 1 << 30
_BATCH = 100_000


def write_list(path: Path, num_urls: int) -> int:
    """Write the list; return how many URLs are different."""
    drawn = np.random.default_rng(0)
    different: set[int] = set()
    fields = pa.schema(
        [("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int64()), ("similarity", pa.float64())]
    )
    with pq.ParquetWriter(path, fields) as writer:
        for start in range(0, num_urls, _BATCH):
            size = min(_BATCH, num_urls - start)
            ids = drawn.integers(0, num_urls * 4, size)
            different.update(ids.tolist())
            hosts = [
                min(200_000, int(3 / ((number * 2654435761 % 2**32 + 1) / 2**32) ** 0.9)) for number in ids.tolist()
            ]
            urls = [
                f"https://cdn{host}.example.com/media/{n:09d}/photo.jpg?w=800"
                for host, n in zip(hosts, ids, strict=True)
            ]
            texts = [f"a photo with the number {number}" for number in ids]
            writer.write_table(pa.table([urls, texts, ids % 2000, drawn.random(size)], schema=fields))
    return len(different)


def tree_bytes(root: int) -> tuple[int, int]:
    """Return the resident bytes of a process, and of it and all below it (shared pages counted in each)."""
    parents: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(stat[1]), []).append(int(entry))
                sizes[int(entry)] = int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:  # it has just ended
                continue
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += sizes.get(process, 0)
        waiting += parents.get(process, [])
    return sizes.get(root, 0), total


def say(
    metric: str, value: float, unit: str, target: float | None, met: bool | None, detail: dict[str, object]
) -> None:
    """Print one figure."""
    line = {"bench": "crawl_scale", "metric": metric, "value": round(value, 3), "unit": unit, "target": target}
    print(json.dumps({**line, "met": met, "detail": detail}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--urls", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-crawl-") as folder:
        path = Path(folder) / "urls.parquet"
        num_different = write_list(path, given.urls)
        (Path(folder) / "run.yaml").write_text(f"pool: {{inputs: [{{kind: urls, path: {path}}}]}}\n")
        command = [sys.executable, "-m", "curation.cli", "run", "--stage", "crawl", "--workers", str(given.workers)]
        command += ["--config", f"{folder}/run.yaml", "--run", f"{folder}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        driver = most = 0
        while process.poll() is None:
            of_driver, of_all = tree_bytes(process.pid)
            driver, most = max(driver, of_driver), max(most, of_all)
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"the crawl failed with exit code {process.returncode}")
        crawled = json.loads((Path(folder) / "run/artefacts/crawl.pool.json").read_text())
    detail: dict[str, object] = {"urls": given.urls, "different": num_different, "rows": crawled["num_rows"]}
    detail |= {"shards": crawled["num_shards"], "workers": given.workers, "seconds": round(seconds, 1)}
    say("driver_peak_rss", driver / 2**20, "MiB", 1024, driver < MAX_DRIVER_BYTES, detail)
    say("all_processes_peak_rss", most / 2**20, "MiB", None, None, detail)
    say("urls_per_s", given.urls / seconds, "1/s", None, None, detail)


if __name__ == "__main__":
    main()
