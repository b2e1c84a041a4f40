"""Image sets that exist already: folders, WebDataset tars, Parquet files. Listed here, read in ``local``."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config.inputs import InputConfig
from curation.crawl.links import Link
from curation.crawl.urls import normalise
from curation.errors import InputError, LinkError
from curation.local_files import IMAGE_SUFFIXES, expand, walk

Report = Callable[[str], None]


def images_of(path: str) -> Iterator[Path]:
    """Yield the image files of a folder, glob or single file, sorted."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (file for file in walk(folder.absolute()) if file.suffix.lower() in IMAGE_SUFFIXES)
    return iter(expand(path, IMAGE_SUFFIXES, "folder")[0])


def list_folder(source: InputConfig, report: Report) -> Iterator[Link]:
    """Yield the image files of a folder, glob or single file."""
    num_found = 0
    for file in images_of(source.path):
        try:
            size = file.stat().st_size
        except OSError:
            report("unreadable_file")
            continue
        num_found += 1
        yield Link(file.as_uri(), (), "file", str(file), None, size)
    if not num_found:
        raise InputError(f"folder {source.path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")


def list_tar(file: Path, report: Report, is_only: bool) -> Iterator[Link]:
    """Yield the image members of a tar, with where their bytes begin.

    Raises:
        InputError: It is the only one, and no tar.
    """
    size = file.stat().st_size
    any_member = False
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                any_member = True
                if not member.isreg() or member.sparse is not None or not _is_image(member.name):
                    continue
                if member.offset_data + member.size > size:
                    report("truncated_member")
                    break
                url = f"{file.as_uri()}#{quote(member.name, safe='/', errors='surrogateescape')}"
                yield Link(url, (), "tar", str(file), member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        if is_only and not any_member:
            raise InputError(
                f"webdataset {file}: is not an uncompressed tar ({error}); unpack compressed ones first"
            ) from error
        report("damaged_tar")


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and Path(base).suffix.lower() in IMAGE_SUFFIXES


def list_parquet(file: Path, source: InputConfig, report: Report, is_only: bool) -> Iterator[Link]:
    """Yield the rows of a Parquet file that holds images.

    The image column is a struct with ``bytes`` (as Hugging Face ``datasets`` writes it) or binary.

    Raises:
        InputError: It has no such column, or it is the only one and cannot be read.
    """
    try:
        yield from _list_rows(file, source, report)
    except (pa.ArrowException, OSError) as error:
        if is_only:
            raise InputError(f"parquet {file}: cannot be read: {error}") from error
        report("damaged_parquet")


def _list_rows(file: Path, source: InputConfig, report: Report) -> Iterator[Link]:
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if source.image_column not in names:
            raise InputError(f"parquet {file}: no column {source.image_column}; set image_column to one of {names}")
        if not _holds_bytes(parquet.schema_arrow.field(source.image_column).type):
            raise InputError(f"parquet {file}: column {source.image_column} holds neither bytes nor {{bytes, path}}")
        url_column = source.url_column or "url"
        if url_column not in names or not _is_text(parquet.schema_arrow.field(url_column).type):
            for row in range(parquet.metadata.num_rows):
                yield Link(_row_url(file, row), (), "parquet", str(file), row, None)
            return
        row = 0
        for batch in parquet.iter_batches(1024, columns=[url_column]):
            for text in batch.column(0).to_pylist():
                yield Link(_web_url(text, report) or _row_url(file, row), (), "parquet", str(file), row, None)
                row += 1


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _row_url(file: Path, row: int) -> str:
    return f"{file.as_uri()}#{row}"


def _web_url(text: str | None, report: Report) -> str | None:
    if not text:
        return None
    try:
        return normalise(text)
    except LinkError:
        report("bad_url")
        return None
