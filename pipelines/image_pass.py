"""One pass over the images of a shard: read and decode each once, for all image steps that lack it, and commit.

Rows that an earlier verdict rejects are not worked on; their features are null until a moved threshold keeps them, and
then only theirs are computed. Where several steps share a pass, each has a table and a marker of its own: killed in
between, those that are committed stay.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.crashes import CRASH, watch
from curation.errors import CurationError, ImageError, StageError
from curation.images import decode
from curation.pipelines.context import Context
from curation.pipelines.freshness import shard_unit
from curation.pipelines.ingest import image_id
from curation.pipelines.plan import Plan, Step
from curation.pipelines.stored_images import encoded, forget_raw, is_last_to_read_raw
from curation.pipelines.units import Unit
from curation.stage import ImageRow, ImageStage, MapStage
from curation.store import Marker
from curation.tars import TarWriter

logger = logging.getLogger(__name__)

_MAX_FAULTS, _MAX_FAULT_SHARE = 10, 0.1  # of the images of a unit, whichever is more; beyond, it is no image's fault
HEADROOM = 2.0  # of reduced decoding: SSCD cosine with a full decode at least 0.99 (docs/images.md)


@dataclass(frozen=True)
class _Prepared:
    """What a row contributes to a batch of each step, or why it cannot; and what nobody expected to go wrong."""

    row: int
    values: Mapping[str, Any]
    errors: Mapping[str, str]
    fault: str = ""


@dataclass
class _Part:
    """One step of a pass.

    Attributes:
        step: The step.
        stage: Its stage, loaded.
        todo: Rows that it lacks.
        old: Its table so far, to be kept; empty if there is none.
        gate: Says of a batch of the step named first which rows may be stored.
        rows: Rows worked on, in the order of ``tables``.
        tables: Their columns, batch by batch.
        tar: Where images are stored.
        files: Paths for the marker.
    """

    step: Step
    stage: ImageStage
    todo: frozenset[int]
    old: pa.Table
    gate: tuple[str, MapStage] | None = None
    rows: list[int] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    tar: TarWriter | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def writes(self) -> pa.Schema:
        """Columns of its table."""
        return self.stage.writes.schema


def run(context: Context, plan: Plan, step: Step, unit: Unit) -> tuple[int, int]:
    """Do a unit of an image step and those that share its pass; return rows of the shard and how many were computed."""
    start = time.monotonic()
    if unit.shard is None:
        raise StageError(step.stage, None, "is a step on shards, but was given none")
    collection, shard, store = unit.collection, unit.shard, context.run
    images = store.read_table(collection, "fetch", shard, ["image_id", "num_bytes", "raw_offset"])
    known = _known(context, unit)
    first = _part(context, plan, step, unit, images, known)
    if known is not None and not first.todo and not unit.with_steps:
        store.write_marker(collection, step.name, shard, Marker(**{**asdict(known), "covers": unit.covers}))
        return images.num_rows, 0
    others = [_part(context, plan, plan.step(name), unit, images, None, first) for name in unit.with_steps]
    parts = [first, *others]
    rows = np.array(sorted(frozenset().union(*(part.todo for part in parts))), np.int64)
    with ExitStack() as stack:
        for part in parts:
            if "tar_offset" in part.writes.names:
                part.files["images"] = store.new_path(collection, "images", shard, "tar")
                part.tar = stack.enter_context(TarWriter(stack.enter_context(store.create(part.files["images"]))))
        source = encoded(context, step, collection, shard, rows)
        _compute(context, collection, shard, parts, source, images.column("image_id"))
    for part in parts:
        _commit(context, plan, part, unit, images.num_rows, time.monotonic() - start)
    return images.num_rows, len(rows)


def _known(context: Context, unit: Unit) -> Marker | None:
    """Return the marker of the table that is to be completed, or None if it is to be made whole."""
    marker = context.run.marker(unit.collection, unit.step, unit.shard or 0)
    if marker is None or marker.fingerprint != unit.fingerprint or unit.anew or "images" in marker.files:
        return None  # a tar is made whole: the new one replaces the old one
    return marker


def _part(
    context: Context,
    plan: Plan,
    step: Step,
    unit: Unit,
    images: pa.Table,
    known: Marker | None,
    first: _Part | None = None,
) -> _Part:
    """Return a step's part of a pass; ``first`` is the part that the pass is for, if it is another one."""
    collection, shard = unit.collection, unit.shard or 0
    stage: ImageStage = context.once(f"stage:{step.name}", lambda: step.make(context))
    after = step.existing(step.after, collection, plan)
    gate = None
    if first is not None and step.gate:
        verdict = plan.step(step.gate)
        after = tuple(table for table in after if table.name != step.gate)
        maker: MapStage = context.once(f"stage:{verdict.name}", lambda: verdict.make(context))
        gate = (verdict.stage, maker)
    needed = context.kept(collection, shard, images.num_rows, after)
    needed &= images.column("image_id").is_valid().to_numpy()
    old = stage.writes.schema.empty_table()
    if known is not None:
        old = context.run.read_table(collection, step.name, shard)
        needed &= ~_has_features(old)
    return _Part(step, stage, frozenset(np.flatnonzero(needed).tolist()), old, gate)


def _commit(context: Context, plan: Plan, part: _Part, unit: Unit, num_rows: int, seconds: float) -> None:
    """Commit a part's table; a step that only shares the pass gets its gate's verdict committed before."""
    collection, shard = unit.collection, unit.shard or 0
    mine = unit
    if part.step.name != unit.step:
        if part.gate is not None:
            _commit_gate(context, plan, plan.step(part.step.gate), collection, shard)
        mine = shard_unit(context, plan, part.step, collection, shard)
    new = pa.concat_tables(part.tables) if part.tables else part.writes.empty_table()
    table = _merge(part.writes, num_rows, part.old, part.rows, new)
    marker = {
        "fingerprint": mine.fingerprint,
        "inputs": mine.inputs,
        "covers": mine.covers,
        "files": part.files,
        "seconds": seconds,
    }
    context.run.commit(collection, part.step.name, shard, table, marker)
    if is_last_to_read_raw(part.step, collection):
        forget_raw(context, collection, shard)


def _commit_gate(context: Context, plan: Plan, verdict: Step, collection: str, shard: int) -> None:
    unit = shard_unit(context, plan, verdict, collection, shard)
    stage: MapStage = context.once(f"stage:{verdict.name}", lambda: verdict.make(context))
    columns = context.run.read_table(collection, verdict.reads[0].name, shard)
    kept = context.kept(collection, shard, columns.num_rows, verdict.existing(verdict.after, collection, plan))
    marker = {"fingerprint": unit.fingerprint, "inputs": unit.inputs}
    context.run.commit(collection, verdict.name, shard, stage(columns, kept), marker)


def _compute(
    context: Context,
    collection: str,
    shard: int,
    parts: Sequence[_Part],
    source: Iterator[tuple[int, bytes]],
    ids: pa.ChunkedArray,
) -> None:
    """Fill the parts' rows and tables.

    Raises:
        StageError: More images than broken ones can account for failed unexpectedly.
    """
    size = max(part.stage.batch_size for part in parts if part.todo or part is parts[0])
    chunk: list[_Prepared] = []
    num_images = len(frozenset().union(*(part.todo for part in parts)))
    num_faults, most_faults = 0, max(_MAX_FAULTS, _MAX_FAULT_SHARE * num_images)
    for item in _prepared(context, collection, parts, source, ids):
        if context.should_stop():
            raise InterruptedError
        if item.fault:
            logger.warning("%s; it is refused as %s", item.fault, CRASH)
            num_faults += 1
            if num_faults > most_faults:
                message = f"{num_faults} of {num_images} images failed in a way that is no fault of theirs; the last: "
                raise StageError(parts[0].step.stage, shard, message + item.fault)
        chunk.append(item)
        if len(chunk) == size:
            _flush(context, parts, chunk, ids)
    if chunk:
        _flush(context, parts, chunk, ids)


def _flush(context: Context, parts: Sequence[_Part], chunk: list[_Prepared], ids: pa.ChunkedArray) -> None:
    made: dict[str, pa.Table] = {}
    for part in parts:
        mine = [item for item in chunk if item.row in part.todo]
        if part.gate is not None:
            mine = _allowed(part.gate, made, chunk, mine)
        tables = []
        for start in range(0, len(mine), part.stage.batch_size):
            batch = mine[start : start + part.stage.batch_size]
            with watch().in_company():
                tables.append(_batch(part, batch, ids))
        part.rows.extend(item.row for item in mine)
        made[part.step.stage] = pa.concat_tables(tables) if tables else part.writes.empty_table()
        part.tables.append(made[part.step.stage])
    context.on_rows(len(chunk))
    chunk.clear()


def _allowed(
    gate: tuple[str, MapStage], made: Mapping[str, pa.Table], chunk: Sequence[_Prepared], mine: list[_Prepared]
) -> list[_Prepared]:
    """Return those of the rows that the gate's verdict on this chunk lets pass."""
    stage, verdict = gate
    columns = made[stage]
    if columns.num_rows != len(chunk):
        raise StageError(stage, None, "decides on other rows than are to be stored")
    reasons = verdict(columns, np.ones(columns.num_rows, bool)).column("reject_reason")
    passed = {item.row for item, rejected in zip(chunk, reasons.is_valid().to_pylist(), strict=True) if not rejected}
    return [item for item in mine if item.row in passed]


def _batch(part: _Part, batch: Sequence[_Prepared], ids: pa.ChunkedArray) -> pa.Table:
    name = part.step.name
    good = [item for item in batch if name in item.values]
    columns = dict(part.stage([item.values[name] for item in good])) if good else {}
    errors = [item.errors.get(name) for item in batch]
    rows = [item.row for item in batch]
    return _table(part.writes, columns, [item.row for item in good], rows, errors, ids, part.tar)


def _prepared(
    context: Context,
    collection: str,
    parts: Sequence[_Part],
    source: Iterator[tuple[int, bytes]],
    ids: pa.ChunkedArray,
) -> Iterator[_Prepared]:
    """Decode and prepare in threads, a bounded number ahead, in the order of rows."""
    limits = context.config.images
    guard = watch()
    sides = [part.stage.min_side_px for part in parts]
    min_side_px = None if None in sides else max(side for side in sides if side is not None)

    def prepare(row: int, data: bytes) -> _Prepared:
        identity = ids[row].as_py()
        names = [part.step.name for part in parts if row in part.todo]
        try:
            with guard.at_work(identity, data, limits) as decoded:
                rgb = decode(data, limits, min_side_px, HEADROOM)
                decoded()
                image = ImageRow(row, identity, data, rgb, collection)
                return _each(image, [part for part in parts if row in part.todo])
        except ImageError as error:
            return _Prepared(row, {}, dict.fromkeys(names, error.reason))
        except (CurationError, InterruptedError):
            raise
        except Exception as error:  # noqa: BLE001  # whatever a decoder raises on hostile bytes costs one row
            return _Prepared(row, {}, dict.fromkeys(names, CRASH), _fault(identity, error))

    # A whole batch is decoded while the model works on the one before, where what waits is small: steps that resize
    # keep a few hundred kilobytes an image, others all pixels.
    ahead = limits.decode_threads * 2
    if min_side_px is not None:
        ahead = max(ahead, *(part.stage.batch_size for part in parts))
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


def _each(image: ImageRow, parts: Sequence[_Part]) -> _Prepared:
    values: dict[str, Any] = {}
    errors: dict[str, str] = {}
    fault = ""
    for part in parts:
        try:
            values[part.step.name] = part.stage.prepare(image)
        except ImageError as error:
            errors[part.step.name] = error.reason
        except (CurationError, InterruptedError):
            raise
        except Exception as error:  # noqa: BLE001  # as in a decoder
            errors[part.step.name] = CRASH
            fault = _fault(image.image_id, error, part.step.name)
    return _Prepared(image.row, values, errors, fault)


def _fault(identity: str, error: Exception, stage: str = "decoding") -> str:
    return f"image {identity}: {stage}: {type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _table(
    wanted: pa.Schema,
    columns: dict[str, Any],
    good: Sequence[int],
    batch: Sequence[int],
    errors: Sequence[str | None],
    ids: pa.ChunkedArray,
    tar: TarWriter | None,
) -> pa.Table:
    """Return the columns of a batch of rows; a row that is not good has nulls, and its error if there is a place."""
    stored = columns.pop("stored", None)
    if tar is not None and stored is not None:
        offsets = [tar.add(ids[row].as_py(), data, kind) for row, (data, kind) in zip(good, stored, strict=True)]
        columns |= {
            "tar_offset": offsets,
            "stored_bytes": [len(data) for data, _ in stored],
            "stored_format": [kind for _, kind in stored],
            "stored_id": [image_id(data) for data, _ in stored],
        }
    place = {row: index for index, row in enumerate(good)}
    take = pa.array([place.get(row) for row in batch], pa.int64())
    arrays = []
    for column in wanted:
        if column.name == schema.DECODE_ERROR.name:
            arrays.append(pa.array(errors, column.type))
        elif column.name in columns:
            arrays.append(_array(columns[column.name], column.type).take(take))
        else:
            arrays.append(pa.nulls(len(batch), column.type))
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
    for column in wanted:
        chunks = [piece for table in (old, new) for piece in table.column(column.name).chunks]
        both = pa.concat_arrays(chunks) if chunks else pa.array([], column.type)
        arrays.append(both.take(indices) if len(both) else pa.nulls(num_rows, column.type))
    return pa.table(arrays, schema=wanted)


def _has_features(table: pa.Table) -> npt.NDArray[np.bool_]:
    has = np.zeros(table.num_rows, dtype=bool)
    for column in table.columns:
        has |= column.is_valid().to_numpy()
    return has
