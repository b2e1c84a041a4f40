"""One image step on one shard: read what rows lack, decode in threads, run the stage in batches, commit.

Rows that an earlier verdict rejects are not worked on; their features are null until a moved threshold keeps them, and
then only theirs are computed.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.crawl import fetch as fetch_links
from curation.errors import CorruptError, ImageError, StageError
from curation.images import decode
from curation.pipelines.context import Context
from curation.pipelines.ingest import image_id, links_of
from curation.pipelines.plan import Plan, Step
from curation.stage import ImageRow, ImageStage
from curation.store import Marker
from curation.tars import TarWriter

if TYPE_CHECKING:
    from curation.pipelines.work import Unit


@dataclass(frozen=True)
class _Prepared:
    row: int
    value: Any
    error: str | None


def run(context: Context, plan: Plan, step: Step, unit: "Unit") -> tuple[int, int]:
    """Do a unit of an image step; return the rows of the shard and how many of them were computed."""
    start = time.monotonic()
    if unit.shard is None or step.writes is None:
        raise StageError(step.stage, unit.shard, "is a step on shards that writes a table")
    collection, shard, store = unit.collection, unit.shard, context.run
    stage: ImageStage = context.once(f"stage:{step.name}", lambda: step.make(context))
    images = store.read_table(collection, "fetch", shard, ["image_id", "num_bytes", "raw_offset"])
    needed = context.kept(collection, shard, images.num_rows, step.existing(step.after, collection, plan))
    needed &= images.column("image_id").is_valid().to_numpy()
    marker = store.marker(collection, step.name, shard)
    writes_tar = "tar_offset" in stage.writes.schema.names
    known = marker if marker is not None and marker.fingerprint == unit.fingerprint else None
    if unit.anew or writes_tar:  # a tar is made whole: the new one replaces the old one
        known = None
    old = stage.writes.schema.empty_table()
    if known is not None:
        old = store.read_table(collection, step.name, shard)
        needed &= ~_has_features(old)
    todo = np.flatnonzero(needed)
    if known is not None and not len(todo):
        store.write_marker(collection, step.name, shard, Marker(**{**asdict(known), "covers": unit.covers}))
        return images.num_rows, 0
    fields: dict[str, Any] = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "covers": unit.covers}
    with ExitStack() as stack:
        tar = None
        if writes_tar:
            path = store.new_path(collection, "images", shard, "tar")
            tar = stack.enter_context(TarWriter(stack.enter_context(store.create(path))))
            fields["files"] = {"images": path}
        source = encoded(context, step, collection, shard, todo)
        rows, new = _compute(context, stage, source, images, tar)
    table = _merge(stage.writes.schema, images.num_rows, old, rows, new)
    store.commit(collection, step.name, shard, table, {**fields, "seconds": time.monotonic() - start})
    if is_last_to_read_raw(step, collection):
        forget_raw(context, collection, shard)
    return images.num_rows, len(todo)


def _compute(
    context: Context, stage: ImageStage, source: Iterator[tuple[int, bytes]], images: pa.Table, tar: TarWriter | None
) -> tuple[list[int], pa.Table]:
    """Return the rows that were worked on and their columns of ``stage.writes``, in the same order."""
    ids = images.column("image_id")
    rows: list[int] = []
    tables: list[pa.Table] = []
    batch: list[_Prepared] = []

    def flush() -> None:
        good = [item for item in batch if item.error is None]
        columns = dict(stage([item.value for item in good])) if good else {}
        tables.append(_table(stage.writes.schema, columns, good, batch, ids, tar))
        rows.extend(item.row for item in batch)
        context.on_rows(len(batch))
        batch.clear()

    for item in _prepared(context, stage, source, ids):
        if context.should_stop():
            raise InterruptedError
        batch.append(item)
        if sum(entry.error is None for entry in batch) == stage.batch_size:
            flush()
    if batch:
        flush()
    return rows, pa.concat_tables(tables) if tables else stage.writes.schema.empty_table()


def _prepared(
    context: Context, stage: ImageStage, source: Iterator[tuple[int, bytes]], ids: pa.ChunkedArray
) -> Iterator[_Prepared]:
    """Decode and prepare in threads, a bounded number ahead, in the order of rows."""
    limits = context.config.images

    def prepare(row: int, data: bytes) -> _Prepared:
        try:
            rgb = decode(data, limits)
            return _Prepared(row, stage.prepare(ImageRow(row, ids[row].as_py(), data, rgb)), None)
        except ImageError as error:
            return _Prepared(row, None, error.reason)

    ahead = limits.decode_threads * 2
    pending: deque[Future[_Prepared]] = deque()
    pool = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="decode")
    try:
        for row, data in source:
            pending.append(pool.submit(prepare, row, data))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _table(
    wanted: pa.Schema,
    columns: Mapping[str, Any],
    good: Sequence[_Prepared],
    batch: Sequence[_Prepared],
    ids: pa.ChunkedArray,
    tar: TarWriter | None,
) -> pa.Table:
    """Return the columns of a batch; an image that does not decode has nulls, and its reason if there is a place."""
    columns = dict(columns)
    stored = columns.pop("stored", None)
    if tar is not None and stored is not None:
        offsets = [tar.add(ids[item.row].as_py(), data, kind) for item, (data, kind) in zip(good, stored, strict=True)]
        columns |= {
            "tar_offset": offsets,
            "stored_bytes": [len(data) for data, _ in stored],
            "stored_format": [kind for _, kind in stored],
            "stored_id": [image_id(data) for data, _ in stored],
        }
    place = {item.row: index for index, item in enumerate(good)}
    take = pa.array([place.get(item.row) for item in batch], pa.int64())
    arrays = []
    for field in wanted:
        if field.name == "decode_error":
            arrays.append(pa.array([item.error for item in batch], field.type))
        elif field.name in columns:
            arrays.append(_array(columns[field.name], field.type).take(take))
        else:
            arrays.append(pa.nulls(len(batch), field.type))
    return pa.table(arrays, schema=wanted)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values, kind)


def _merge(wanted: pa.Schema, num_rows: int, old: pa.Table, rows: Sequence[int], new: pa.Table) -> pa.Table:
    """Return one row a row of the shard: the new features, else the old ones, else nulls."""
    place = np.arange(num_rows) if old.num_rows else np.full(num_rows, -1)
    place[list(rows)] = old.num_rows + np.arange(len(rows))
    indices = pa.array(place, mask=place < 0)
    arrays = []
    for field in wanted:
        chunks = [column for table in (old, new) for column in table.column(field.name).chunks]
        both = pa.concat_arrays(chunks) if chunks else pa.array([], field.type)
        arrays.append(both.take(indices) if len(both) else pa.nulls(num_rows, field.type))
    return pa.table(arrays, schema=wanted)


def _has_features(table: pa.Table) -> npt.NDArray[np.bool_]:
    has = np.zeros(table.num_rows, dtype=bool)
    for column in table.columns:
        has |= column.is_valid().to_numpy()
    return has


def encoded(
    context: Context, step: Step, collection: str, shard: int, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[int, bytes]]:
    """Yield the rows' encoded bytes as a step wants them, from where they lie now.

    A step that reads the table of faces gets the blurred images; others get those that were fetched while there are
    any, else the blurred ones; references of local sets come from the source itself.

    Raises:
        CorruptError: If the bytes are not those that were stored.
        StageError: If the source has changed.
    """
    store = context.run
    images = store.read_table(collection, "fetch", shard, ["image_id", "num_bytes", "raw_offset"])
    blurred = store.marker(collection, "faces", shard)
    fetched = store.marker(collection, "fetch", shard)
    in_place: list[int] = []
    path = fetched.files.get("raw", "") if fetched is not None else ""
    is_blurred = blurred is not None and fetched is not None and blurred.inputs.get("table fetch") == fetched.digest
    if blurred is not None and is_blurred and (not path or schema.FACES in step.reads):
        table = store.read_table(collection, "faces", shard, ["tar_offset", "stored_bytes", "stored_id"])
        path, offsets, sizes, names = blurred.files["images"], table.column(0), table.column(1), table.column(2)
    else:
        offsets, sizes, names = (images.column(name) for name in ("raw_offset", "num_bytes", "image_id"))
        if collection.startswith("references/"):
            in_place = [int(row) for row in rows if not offsets[row].is_valid]
    if path and len(in_place) < len(rows):
        skip = set(in_place)
        with store.open(path) as stream:
            for row in rows.tolist():
                if row not in skip and offsets[row].is_valid:
                    stream.seek(offsets[row].as_py())
                    data = stream.read(sizes[row].as_py())
                    if image_id(data) != names[row].as_py():
                        raise CorruptError(
                            f"{store.url}: {path} does not hold image {images.column('image_id')[row]} where its table "
                            "says; `--redo fetch` gets the images again"
                        )
                    yield row, data
    if in_place:
        links = links_of(context, collection, shard)
        ids = images.column("image_id")
        for found in fetch_links([links[row] for row in in_place], context.config, context.should_stop):
            row = in_place[found.index]
            if found.data is None or image_id(found.data) != ids[row].as_py():
                raise StageError(
                    "sscd",
                    shard,
                    f"{links[row].url} has changed or gone since it was fetched; `--redo fetch` reads it again",
                )
            yield row, found.data


def is_last_to_read_raw(step: Step, collection: str) -> bool:
    """Whether nothing needs a shard's fetched bytes once it has been through this step."""
    return step.name == ("sscd" if collection.startswith("references/") else "faces")


def has_raw(context: Context, collection: str, shard: int) -> bool:
    """Whether a shard's fetched bytes are still there."""
    marker = context.run.marker(collection, "fetch", shard)
    return marker is not None and "raw" in marker.files


def forget_raw(context: Context, collection: str, shard: int) -> None:
    """Delete a shard's raw tar, if there is one."""
    marker = context.run.marker(collection, "fetch", shard)
    if marker is not None and "raw" in marker.files:
        files = {role: path for role, path in marker.files.items() if role != "raw"}
        context.run.write_marker(collection, "fetch", shard, Marker(**{**asdict(marker), "files": files}))
        context.run.remove(marker.files["raw"])
