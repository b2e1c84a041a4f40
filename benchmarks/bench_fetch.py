"""How fast images are fetched, against img2dataset, from the same nginx on this machine.

The 1,000 photos of ``photos.parquet`` make 10,000 different files (a comment in each JPEG), so that nothing is stored
only once. Both sides get the same list of URLs and the same two cores, nginx runs there too, and each side is the whole
command, from its start to its end. By turns, medians of the rounds; a first round warms the disk and does not count.

- ``ratio_vs_img2dataset_stored``: images are decoded to see that they are whole, and stored as they came; the peer
  stores them with ``resize_mode=no``.
- ``ratio_vs_img2dataset_resized``: images are decoded, their shorter side brought to 256 pixels, and encoded as JPEG of
  quality 95, by both.

``..._fetch_only`` are the same with the links crawled before; the peer has no such step. Robots.txt, TDM reservations,
headers that opt out, the address policy and all limits are on; the settings say only that the server is ours: many
requests at a time, no rate, a loopback address. Needs nginx: ``apt-get update && apt-get install nginx``.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq
import yaml
from planted import DATA, ROOT, photos

CORES = sorted(os.sched_getaffinity(0))[:2]
TARGETS = {"stored": 3.0, "resized": 1.5}
NGINX_CONF = """
worker_processes 2; daemon off; pid nginx.pid; error_log error.log;
events {{ worker_connections 4096; }}
http {{
  types {{ image/jpeg jpg; }}
  access_log off; sendfile on; keepalive_requests 100000;
  client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {root}; }}
}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-fetch")
    parser.add_argument("--peer", type=Path, default=os.environ.get("IMG2DATASET"), help="its img2dataset command")
    parser.add_argument("--urls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=32, help="of each of the peer's two processes")
    options = parser.parse_args()
    if not (DATA / "photos.parquet").exists():
        sys.exit(f"needs {DATA}/photos.parquet; set CURATION_TEST_DATA to the folder that holds it")
    if shutil.which("nginx") is None:
        sys.exit("needs nginx: apt-get update && apt-get install nginx")
    if options.peer is None:
        sys.exit("needs img2dataset: give --peer, or run `make bench-fetch`, which installs it")
    os.sched_setaffinity(0, CORES)
    work = options.work.absolute()
    write_site(work / "site", options.urls)
    with nginx(work) as url:
        addresses = [f"{url}/{number:06d}.jpg" for number in range(options.urls)]
        (work / "urls.txt").write_text("\n".join(addresses) + "\n")
        for mode in TARGETS:
            compare(mode, work, options)


def compare(mode: str, work: Path, options: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"ours": [], "fetch_only": [], "peer": []}
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(mode, work, options.urls),
        "fetch_only": lambda: ours(mode, work, options.urls, is_crawled=True),
        "peer": lambda: peer(mode, work, options),
    }
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            taken = side()
            if number:
                seconds[name].append(taken)
    detail = {
        "urls": options.urls,
        "rounds": options.rounds,
        "cores": len(CORES),
        "seconds": {name: [round(taken, 2) for taken in found] for name, found in seconds.items()},
    }
    theirs = median(seconds["peer"])
    for name, suffix in (("ours", ""), ("fetch_only", "_fetch_only")):
        ratio = theirs / median(seconds[name])
        line = {
            "bench": "fetch",
            "metric": f"ratio_vs_img2dataset_{mode}{suffix}",
            "value": round(ratio, 2),
            "unit": "x",
        }
        target = TARGETS[mode]
        print(json.dumps(line | {"target": target, "met": ratio >= target, "detail": detail}), flush=True)


def ours(mode: str, work: Path, num_urls: int, is_crawled: bool = False) -> float:
    """Return the seconds that ``curate run --stage fetch`` takes."""
    run, settings = work / "run", work / f"{mode}.yaml"
    shutil.rmtree(run, ignore_errors=True)
    resize = {"side_px": 256, "mode": "shorter", "format": "jpeg", "quality": 95} if mode == "resized" else None
    fetch = {"allow_private_addresses": True, "concurrency": 64, "host_concurrency": 128, "resize": resize}
    inputs = [{"kind": "urls", "path": str(work / "urls.txt")}]
    tree = {"pool": {"inputs": inputs}, "fetch": fetch, "shards": {"rows": max(1, num_urls // 4)}}
    settings.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "curation.cli", "run", "--config", str(settings), "--run", str(run)]
    if is_crawled:
        timed([*command, "--stage", "crawl"])
    taken = timed([*command, "--stage", "fetch"])
    tables = [pq.read_table(path, columns=["raw_offset"]) for path in (run / "pool" / "fetch").glob("*.parquet")]
    stored = sum(table.num_rows - table.column(0).null_count for table in tables)
    if stored != num_urls:
        sys.exit(f"curate stored {stored} of {num_urls} images")
    return taken


def peer(mode: str, work: Path, options: argparse.Namespace) -> float:
    """Return the seconds that img2dataset takes."""
    output = work / "img2dataset"
    shutil.rmtree(output, ignore_errors=True)
    resize = ["--resize_mode", "keep_ratio", "--image_size", "256"] if mode == "resized" else ["--resize_mode", "no"]
    command = [str(options.peer), "--url_list", str(work / "urls.txt"), "--output_folder", str(output), *resize]
    command += ["--output_format", "webdataset", "--processes_count", str(len(CORES))]
    command += ["--thread_count", str(options.threads), "--number_sample_per_shard", str(max(1, options.urls // 4))]
    taken = timed(command, NO_ALBUMENTATIONS_UPDATE="1")
    stored = sum(json.loads(path.read_text())["successes"] for path in output.glob("*_stats.json"))
    if stored != options.urls:
        sys.exit(f"img2dataset stored {stored} of {options.urls} images")
    return taken


def timed(command: list[str], **environment: str) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def write_site(folder: Path, num_urls: int) -> None:
    """Write the files, once; each has a comment of its own behind the JPEG's start marker."""
    if folder.exists() and sum(1 for _ in folder.iterdir()) == num_urls:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    originals = list(photos())
    for number in range(num_urls):
        image, comment = originals[number % len(originals)], f"copy {number:06d}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / f"{number:06d}.jpg").write_bytes(image[:2] + segment + image[2:])


@contextmanager
def nginx(work: Path) -> Iterator[str]:
    """Serve the site; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = work / "nginx"
    folder.mkdir(exist_ok=True)
    (folder / "nginx.conf").write_text(NGINX_CONF.format(port=port, root=work / "site"))
    server = subprocess.Popen(["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            sys.exit(f"nginx does not answer; see {folder}/error.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
