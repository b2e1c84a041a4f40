"""How fast pages become links: real pages where there are some, of CPU time on one core.

Pages come from ``pages.zip`` in the folder that ``CURATION_TEST_DATA`` names (default ``../shared/data``).
"""

import json
import os
import sys
import time
import zipfile
from pathlib import Path
from statistics import median

from curation.crawl.charset import decode_html
from curation.crawl.extract import extract

PAGES = Path(os.environ.get("CURATION_TEST_DATA", "../shared/data")) / "pages.zip"
PAGE_URL = "https://site.example/section/page.html"
ROUNDS = 5


def main() -> None:
    if not PAGES.exists():
        sys.exit(f"no pages at {PAGES}; set CURATION_TEST_DATA")
    with zipfile.ZipFile(PAGES) as archive:
        pages = [archive.read(name) for name in archive.namelist()]
    num_images = sum(len(extract(decode_html(page)[0], PAGE_URL).urls) for page in pages)
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for page in pages:
            extract(decode_html(page)[0], PAGE_URL)
        seconds.append(time.process_time() - start)
    num_bytes = sum(map(len, pages))
    detail = {"pages": len(pages), "images": num_images, "mean_bytes": num_bytes // len(pages), "rounds": ROUNDS}
    for metric, value, unit in (
        ("pages_per_core_second", len(pages) / median(seconds), "1/s"),
        ("mb_per_core_second", num_bytes / 1e6 / median(seconds), "MB/s"),
    ):
        line = {"bench": "crawl_extract", "metric": metric, "value": round(value, 1), "unit": unit, "target": None}
        print(json.dumps({**line, "met": None, "detail": detail}))


if __name__ == "__main__":
    main()
