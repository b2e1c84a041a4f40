"""A shard's tar, written anew without some of its images."""

from collections.abc import Sequence

import pyarrow as pa

from curation.store import Marker, Run
from curation.tars import TarWriter

RAW = ("raw_offset", "num_bytes", "format")
BLURRED = ("tar_offset", "stored_bytes", "stored_format")


def rewrite(
    run: Run,
    place: tuple[str, str, int],
    marker: Marker,
    names: Sequence[str | None],
    table: pa.Table,
    columns: tuple[str, str, str],
) -> tuple[dict[str, str], pa.Table]:
    """Write the images of a shard into a new tar, where there is one; the old one is left to the caller.

    Args:
        run: Where it lies.
        place: Collection, folder (which is its role in the marker, too) and shard.
        marker: Names the old tar.
        names: Image id of each row; None: it is left out.
        table: The table that says where images lie.
        columns: Its columns with the first byte, the number of bytes, and the format.

    Returns:
        The files of a new marker, and the table with the places where images lie now.
    """
    collection, role, shard = place
    if role not in marker.files:
        return {}, table
    path = run.new_path(collection, role, shard, "tar")
    offsets: list[int | None] = []
    with run.open(marker.files[role]) as old, run.create(path) as stream, TarWriter(stream) as tar:
        found = (table.column(name).to_pylist() for name in columns)
        for name, offset, size, suffix in zip(names, *found, strict=True):
            if name is None or offset is None:
                offsets.append(None)
                continue
            old.seek(offset)
            offsets.append(tar.add(name, old.read(size), suffix))
    column = table.schema.get_field_index(columns[0])
    return {role: path}, table.set_column(column, table.schema.field(column), pa.array(offsets, pa.int64()))
