"""One unit of work: one step on one shard or one block of shards, or one reduce. The same code whoever runs it."""

import hashlib
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.crashes import watch
from curation.errors import CorruptError, CurationError, StageError
from curation.files import disk_full_is_said
from curation.fingerprint import content_digest, fingerprint
from curation.pipelines import blocks, image_pass, ingest, kmeans_part
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.stored_images import encoded
from curation.pipelines.units import Done, Span, Unit, crawl_marker, is_retry, shard_markers
from curation.schema import Table
from curation.stage import ShardView
from curation.store import Marker

_BATCH_ROWS = 1 << 17


def execute(context: Context, plan: Plan, unit: Unit) -> Done:
    """Do a unit and commit its output.

    Raises:
        CurationError: ``StageError`` for what goes wrong in a stage; storage and configuration errors as they are.
    """
    step = plan.step(unit.step)
    start = time.monotonic()
    watch().refresh()
    try:
        with disk_full_is_said(context.run.url):
            if step.kind == "crawl":
                is_part = unit.reading is not None and unit.reading.part is not None
                num_rows = num_computed = (ingest.read if is_part else ingest.cut_parts)(context, unit)
            elif step.kind == "fetch":
                num_rows = num_computed = ingest.fetch(context, unit)
            elif step.kind == "images":
                num_rows, num_computed = image_pass.run(context, plan, step, unit)
            elif step.kind == "map":
                num_rows = num_computed = _map(context, plan, step, unit)
            elif unit.part is not None:
                stage = context.once(f"stage:{step.name}", lambda: step.make(context))
                num_rows = num_computed = kmeans_part.work(context, Inputs(context, plan, step).shards, stage, unit)
            elif step.kind == "blocks":
                num_rows, num_computed = _block(context, plan, step, unit)
            else:
                num_rows = num_computed = _reduce(context, plan, step, unit)
    except (CurationError, InterruptedError):
        raise
    except OSError as error:
        raise StageError(step.stage, unit.shard, str(error)) from error
    return Done(unit, num_rows, num_computed, time.monotonic() - start)


def _map(context: Context, plan: Plan, step: Step, unit: Unit) -> int:
    start = time.monotonic()
    shard, collection = _shard(unit), unit.collection
    stage = context.once(f"stage:{step.name}", lambda: step.make(context))
    columns: dict[str, pa.ChunkedArray] = {}
    num_rows = 0
    for table in step.existing(step.reads, collection, plan):
        read = context.run.read_table(collection, table.name, shard)
        num_rows = read.num_rows
        for name in read.schema.names:
            columns[f"{table.name}.{name}" if name in columns else name] = read.column(name)
    kept = context.kept(collection, shard, num_rows, step.existing(step.after, collection, plan))
    table = stage(pa.table(columns), kept)
    _check(step, shard, table, num_rows)
    context.run.commit(collection, step.name, shard, table, _marker(unit, start))
    return num_rows


def _block(context: Context, plan: Plan, step: Step, unit: Unit) -> tuple[int, int]:
    """Do a block; return the rows that were looked at, and the pairs that were found."""
    start = time.monotonic()
    if unit.block is None:
        raise StageError(step.stage, unit.shard, "is a step on blocks, but was given none")
    stage = context.once(f"stage:{step.name}", lambda: step.make(context))
    inputs = Inputs(context, plan, step)
    left, right = unit.block
    ours = inputs.span(left)
    theirs = None if left == right else inputs.span(right)
    path = context.run.new_path(unit.collection, step.name, _shard(unit), "parquet")
    digest = hashlib.sha256()
    num_pairs = 0
    with (
        tempfile.TemporaryDirectory(prefix=f"curation-{step.name}-") as folder,
        context.run.create(path) as stream,
        pq.ParquetWriter(stream, stage.writes, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in stage(ours, theirs, Path(folder)):
            if context.should_stop():
                raise InterruptedError
            if table.num_rows:
                writer.write_table(table)
                digest.update(content_digest(table).encode())
                num_pairs += table.num_rows
    files = dict.fromkeys(step.makes, path)
    made = Marker(
        **_marker(unit, start),
        digest=digest.hexdigest(),
        num_rows=num_pairs,
        files=files,
        sizes={role: context.run.fs.size(context.run.path(path)) for role in files},
    )
    context.run.write_marker(unit.collection, step.name, _shard(unit), made)
    return sum(view.num_rows for view in [*ours, *(theirs or ())]), num_pairs


def _reduce(context: Context, plan: Plan, step: Step, unit: Unit) -> int:
    start = time.monotonic()
    inputs = Inputs(context, plan, step)
    total = num_shards = 0
    digests = {}
    with tempfile.TemporaryDirectory(prefix=f"curation-{step.name}-") as folder:
        stage = step.make(context)
        try:
            for collection, shard, table in stage(inputs, Path(folder)):
                if context.should_stop():
                    raise InterruptedError
                _check(step, shard, table, inputs.num_rows(collection, shard))
                marker = context.run.commit(collection, step.name, shard, table, _marker(unit, start))
                digests[f"{collection}/{shard}"] = marker.digest
                total += table.num_rows
                num_shards += 1
        except StageError:
            _keep_evidence(context, step, Path(folder))
            raise
        commit_artefacts(context, step, unit, Path(folder), start, digests, total, num_shards)
    return total


def commit_artefacts(
    context: Context,
    step: Step,
    unit: Unit,
    folder: Path,
    start: float,
    digests: Mapping[str, str],
    num_rows: int = 0,
    num_shards: int = 0,
) -> None:
    """Commit what a reduce has left in ``folder``: its artefacts, and the marker that says that it is done."""
    files = {name: folder / name for name in step.makes}
    digests = {**digests, **{name: _file_digest(path) for name, path in sorted(files.items())}}
    made = Marker(
        fingerprint=unit.fingerprint,
        digest=fingerprint(digests),
        num_rows=num_rows,
        files={},
        inputs=unit.inputs,
        num_shards=num_shards,
        seconds=time.monotonic() - start,
    )
    context.run.commit_artefacts(step.name, files, made)


def _keep_evidence(context: Context, step: Step, folder: Path) -> None:
    """Keep what a stage that stopped on purpose has left: it explains why."""
    for name in step.makes:
        if (folder / name).exists():
            context.run.write_bytes(f"stopped/{step.name}/{name}", (folder / name).read_bytes())


class Inputs:
    """``curation.stage.ReduceInputs`` over a run."""

    def __init__(self, context: Context, plan: Plan, step: Step) -> None:
        self._context = context
        self._plan = plan
        self._step = step
        self._rows: dict[tuple[str, int], int] = {}
        self._crawled: dict[str, Marker | None] = {}

    def collections(self, kind: str) -> list[str]:
        """Return the collections of a kind."""
        return self._context.collections(kind) if kind in self._step.collections else []

    def artefacts(self, step: str) -> Path:
        """Return a folder with what an earlier step made."""
        return self._context.artefacts(step)

    def shards(self, collection: str, only: Collection[int] | None = None) -> Iterator[ShardView]:
        """Yield the shards of a collection in order, or some of them."""
        for shard, marker in shard_markers(self._context, collection).items():
            if only is not None and shard not in only:
                continue
            self._rows[collection, shard] = marker.num_rows
            yield self._view(collection, shard, marker.num_rows)

    def span(self, span: Span) -> list[ShardView]:
        """Return the shards of a group."""
        found = []
        for shard in range(span.first, span.stop):
            marker = self._context.run.marker(span.collection, "crawl", shard)
            if marker is not None:
                found.append(self._view(span.collection, shard, marker.num_rows))
        return found

    def pairs(self, step: str, left: str, right: str) -> Iterator[pa.RecordBatch]:
        """Yield what a step on blocks found between two collections."""
        run = self._context.run
        (role,) = self._plan.step(step).makes
        for marker in blocks.markers(self._context, self._plan.step(step), left, right):
            if marker is None:
                raise CorruptError(f"{run.url}: a block of {step} between {left} and {right} is not finished")
            num_rows = 0
            with run.open(marker.files[role]) as stream:
                try:
                    for batch in pq.ParquetFile(stream, page_checksum_verification=True).iter_batches(_BATCH_ROWS):
                        if self._context.should_stop():
                            raise InterruptedError
                        num_rows += batch.num_rows
                        yield batch
                except InterruptedError:
                    raise
                except (pa.ArrowException, OSError) as error:
                    redo = f"`--redo {self._plan.step(step).stage}` makes it again"
                    raise CorruptError(f"{run.url}: {marker.files[role]} cannot be read: {error}; {redo}") from error
            if num_rows != marker.num_rows:
                raise CorruptError(
                    f"{run.url}: {marker.files[role]} has {num_rows} rows, its marker says {marker.num_rows}"
                )

    def _view(self, collection: str, shard: int, num_rows: int) -> ShardView:
        context, run = self._context, self._context.run
        verdicts = self._step.existing(self._step.after, collection, self._plan)
        blurred = run.marker(collection, "faces", shard) if self._step.locations else None

        def keep() -> npt.NDArray[np.bool_]:
            return context.kept(collection, shard, num_rows, verdicts)

        def read(table: Table, columns: Sequence[str] | None = None) -> pa.Table:
            return run.read_table(collection, table.name, shard, columns)

        def images(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
            return encoded(context, self._step, collection, shard, rows)

        tar = blurred.files["images"] if blurred is not None else ""
        return ShardView(collection, shard, num_rows, keep, read, images, tar, self._is_retry(collection, shard))

    def _is_retry(self, collection: str, shard: int) -> bool:
        if collection not in self._crawled:
            self._crawled[collection] = self._context.run.artefact_marker(crawl_marker(collection))
        crawled = self._crawled[collection]
        return crawled is not None and is_retry(crawled, shard)

    def num_rows(self, collection: str, shard: int) -> int:
        """Return the number of rows of a shard."""
        if (collection, shard) not in self._rows:
            self._rows[collection, shard] = shard_markers(self._context, collection)[shard].num_rows
        return self._rows[collection, shard]


def _shard(unit: Unit) -> int:
    if unit.shard is None:
        raise StageError(unit.step, None, "is a step on shards, but was given none")
    return unit.shard


def _marker(unit: Unit, start: float) -> dict[str, Any]:
    return {
        "fingerprint": unit.fingerprint,
        "inputs": unit.inputs,
        "covers": unit.covers,
        "seconds": time.monotonic() - start,
    }


def _check(step: Step, shard: int, table: pa.Table, num_rows: int) -> None:
    if step.writes is None or table.schema.names != step.writes.schema.names:
        raise StageError(step.stage, shard, f"wrote columns {table.schema.names}, promised {step.writes}")
    if table.num_rows != num_rows:
        raise StageError(step.stage, shard, f"wrote {table.num_rows} rows for a shard of {num_rows}")


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
