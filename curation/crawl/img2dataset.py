"""What img2dataset has downloaded, as images that exist already, with the URL, caption and other columns of each.

Its three layouts, told apart by what a file is::

    00000.tar                     000000000.jpg 000000000.json 000000000.txt   (WebDataset)
    00000/000000000.jpg           beside 000000000.json and 000000000.txt      (files)
    00000.parquet                 with a column jpg, png or webp               (parquet; other sidecars are skipped)
"""

import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic_core

from curation.config.inputs import InputConfig
from curation.crawl.extra_columns import row_to_json
from curation.crawl.links import Link
from curation.crawl.sets import Report
from curation.crawl.urls import normalise
from curation.errors import LinkError
from curation.local_files import IMAGE_SUFFIXES

SUFFIXES = frozenset({".tar", ".parquet", *IMAGE_SUFFIXES})
IMAGE_COLUMNS = ("jpg", "png", "webp")

_MAX_SIDECAR_BYTES = 1 << 20
_BATCH_ROWS = 1_024
# What the tool says of its own work, and what is a column of ours.
_NOT_EXTRA = frozenset({"url", "key", "status", "error_message", *IMAGE_COLUMNS})


def read_output(file: str, source: InputConfig, report: Report) -> Iterator[Link]:
    """Yield the images of one file of img2dataset's output, in order.

    Raises:
        OSError: It cannot be read.
    """
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        yield from _of_tar(path, source, report)
    elif suffix == ".parquet":
        yield from _of_parquet(path, source, report)
    elif suffix in IMAGE_SUFFIXES:
        sidecar = path.with_suffix(".json")
        known = _parsed(sidecar.read_bytes()[:_MAX_SIDECAR_BYTES], report) if sidecar.is_file() else {}
        yield _link(known, source, path.as_uri(), "file", path, None, path.stat().st_size)


def _of_tar(path: Path, source: InputConfig, report: Report) -> Iterator[Link]:
    """Yield a tar's samples: consecutive members that share what is before the first dot of their names."""
    size = path.stat().st_size
    key: str | None = None
    image: tarfile.TarInfo | None = None
    known: Mapping[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                if not member.isreg() or member.sparse is not None:
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (sample := f"{folder}/{stem}") != key:
                    yield from _of_sample(image, known, source, path)
                    key, image, known = sample, None, {}
                if member.offset_data + member.size > size:
                    report("truncated_member")
                    break
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    image = member
                elif suffix.lower() == "json" and member.size <= _MAX_SIDECAR_BYTES:
                    stream = tar.extractfile(member)
                    known = _parsed(stream.read(), report) if stream is not None else {}
    except (tarfile.TarError, ValueError):
        report("damaged_tar")
    yield from _of_sample(image, known, source, path)


def _of_sample(
    image: tarfile.TarInfo | None, known: Mapping[str, Any], source: InputConfig, path: Path
) -> Iterator[Link]:
    if image is not None:
        url = f"{path.as_uri()}#{quote(image.name, safe='/', errors='surrogateescape')}"
        yield _link(known, source, url, "tar", path, image.offset_data, image.size)


def _of_parquet(path: Path, source: InputConfig, report: Report) -> Iterator[Link]:
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if not any(name in names for name in IMAGE_COLUMNS):
                return  # the sidecar of a tar or a folder
            columns = [name for name in names if name not in IMAGE_COLUMNS]
            row = 0
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=columns):
                for known in batch.to_pylist():
                    if known.get("status", "success") == "success":
                        yield _link(known, source, f"{path.as_uri()}#{row}", "parquet", path, row, None)
                    else:
                        report("not_downloaded")
                    row += 1
    except pa.ArrowException:
        report("damaged_parquet")


def _parsed(data: bytes, report: Report) -> Mapping[str, Any]:
    try:
        tree = pydantic_core.from_json(data)
    except ValueError:
        report("damaged_sidecar")
        return {}
    return tree if isinstance(tree, dict) else {}


def _link(
    known: Mapping[str, Any], source: InputConfig, url: str, kind: Any, path: Path, offset: int | None, size: int | None
) -> Link:
    original = known.get(source.url_column or "url")
    if isinstance(original, str):
        with suppress(LinkError):
            url = normalise(original)
    wanted = source.columns
    extra = {key: value for key, value in known.items() if key not in _NOT_EXTRA and (wanted is None or key in wanted)}
    return Link(url, (), kind, str(path), offset, size, extra=row_to_json(extra))
