"""Reduces over rows in memory, so that the same rows can be put into different shards and orders."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config.dedup import DedupConfig
from curation.indexes.pairs import ExactPairs, PairSearch
from curation.schema import Table
from curation.stage import ShardView
from curation.stages.dedup_edges import DedupEdges
from curation.stages.dedup_search import DedupCodes

Row = Mapping[str, Any]


class InMemory:
    """``curation.stage.ReduceInputs`` over dictionaries, each one row of all tables of its collection.

    A key is a column, or ``<table>.<column>`` where tables share a name; what is absent is null. ``kept`` (default:
    true) says whether an earlier verdict left the row; ``data`` is its encoded image.

    Args:
        collections: Rows by collection.
        num_shards: How many shards each collection is cut into.
        shuffled: Seed of the order of rows; None: as they are.
        made: Folder of artefacts by step.
        search: How pairs of descriptors are found, in blocks of two shards on each side.
        settings: Of that search.
    """

    def __init__(
        self,
        collections: Mapping[str, Sequence[Row]],
        num_shards: int = 1,
        shuffled: int | None = None,
        made: Mapping[str, Path] | None = None,
        search: PairSearch | None = None,
        settings: DedupConfig | None = None,
    ) -> None:
        self.made = dict(made or {})
        self.search = search or ExactPairs()
        self.settings = settings or DedupConfig(edge_floor=0.01, reference_floor=0.01)
        self.was_read: set[str] = set()
        self.found: dict[tuple[str, str], list[pa.RecordBatch]] = {}
        self.cut: dict[str, list[list[Row]]] = {}
        for collection, rows in collections.items():
            order = np.arange(len(rows)) if shuffled is None else np.random.default_rng(shuffled).permutation(len(rows))
            self.cut[collection] = [[rows[row] for row in part] for part in np.array_split(order, num_shards)]

    def collections(self, kind: str) -> list[str]:
        return sorted(name for name in self.cut if name.partition("/")[0] == kind)

    def artefacts(self, step: str) -> Path:
        return self.made[step]

    def shards(self, collection: str) -> Iterator[ShardView]:
        for shard, rows in enumerate(self.cut[collection]):

            def read(table: Table, columns: Sequence[str] | None = None, rows: list[Row] = rows) -> pa.Table:
                self.was_read.add(table.name)
                if table is schema.DEDUP_CODES:
                    kept = np.array([row.get("kept", True) for row in rows], bool)
                    whole = DedupCodes(self.search)(table_of(rows, schema.SSCD), kept)
                else:
                    whole = table_of(rows, table)
                return whole if columns is None else whole.select(columns)

            def images(wanted: Any, rows: list[Row] = rows) -> Iterator[tuple[int, bytes]]:
                for row in wanted.tolist():
                    yield row, rows[row]["data"]

            def keep(rows: list[Row] = rows) -> Any:
                return np.array([row.get("kept", True) for row in rows], bool)

            yield ShardView(collection, shard, len(rows), keep, read, images, f"{collection}/{shard}.tar")

    def pairs(self, step: str, left: str, right: str) -> Iterator[pa.RecordBatch]:
        assert step == DedupEdges.name
        if (left, right) not in self.found:
            self.found[left, right] = list(self._search(left, right))
        yield from self.found[left, right]

    def _search(self, left: str, right: str) -> Iterator[pa.RecordBatch]:
        stage = DedupEdges(self.settings, self.search)
        ours, theirs = ([*self.shards(name)] for name in (left, right))
        for i in range(0, len(ours), 2):
            for j in range(i if left == right else 0, len(theirs), 2):
                same = left == right and i == j
                with tempfile.TemporaryDirectory() as folder:
                    for found in stage(ours[i : i + 2], None if same else theirs[j : j + 2], Path(folder)):
                        yield from found.to_batches()


def table_of(rows: Sequence[Row], table: Table) -> pa.Table:
    """Return one table of the rows; a list of vectors gets the dimension of its vectors."""
    columns, fields = [], []
    for field in table.schema:
        values = [row.get(f"{table.name}.{field.name}", row.get(field.name)) for row in rows]
        if field.name in ("sscd", "embedding"):
            columns.append(vectors(values))
            field = field.with_type(columns[-1].type)
        else:
            columns.append(pa.array(values, field.type))
        fields.append(field)
    return pa.table(columns, schema=pa.schema(fields))


def vectors(values: Sequence[Any], dim: int = 8) -> pa.Array:
    """Return float16 vectors as a column; None is null."""
    dim = next((len(value) for value in values if value is not None), dim)
    flat = np.zeros((len(values), dim), np.float16)
    for row, value in enumerate(values):
        flat[row] = 0 if value is None else value
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), dim, mask=missing)


def run_reduce(stage: Any, inputs: InMemory, scratch: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a reduce; return its rows by collection and URL.

    Checks what every reduce promises: it reads what it declares, yields each shard once, row-aligned, in its own
    schema, and leaves its artefacts.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    seen = set()
    for collection, shard, table in stage(inputs, scratch):
        rows = inputs.cut[collection][shard]
        assert (collection, shard) not in seen
        assert table.schema.names == stage.writes.schema.names
        assert [field.type for field in table.schema] == [field.type for field in stage.writes.schema]
        assert table.num_rows == len(rows)
        seen.add((collection, shard))
        by_url = found.setdefault(collection, {})
        by_url |= {row["url"]: verdict for row, verdict in zip(rows, table.to_pylist(), strict=True)}
    assert {(name, shard) for name in found for shard in range(len(inputs.cut[name]))} == seen
    assert inputs.was_read <= {table.name for table in stage.reads}
    assert all((scratch / name).is_file() for name in stage.artefacts)
    return found


def make_image(number: int, **columns: Any) -> dict[str, Any]:
    """Return a row of an image; ids and URLs sort like their numbers."""
    row: dict[str, Any] = {
        "url": f"http://example.org/{number:05d}.jpg",
        "image_id": f"{number:016x}" * 2,
        "width": 100,
        "height": 100,
        "num_bytes": 1000,
    }
    return row | columns


def make_unit(*values: float) -> np.ndarray[Any, Any]:
    """Return a direction of at least 8 dimensions as it is stored: L2-normalised float16."""
    padded = np.zeros(max(8, len(values)))
    padded[: len(values)] = values
    return (padded / np.linalg.norm(padded)).astype(np.float16)


def stored_cosine(left: Any, right: Any) -> float:
    """Return the rounded similarity that decisions are taken on."""
    return float(np.round(left.astype(np.float64) @ right.astype(np.float64), 6))


@pytest.fixture(scope="session")
def in_memory() -> type[InMemory]:
    return InMemory


@pytest.fixture(scope="session")
def table() -> Callable[..., pa.Table]:
    """``table(rows, schema.X)``: one table of rows."""
    return table_of


@pytest.fixture(scope="session")
def image() -> Callable[..., dict[str, Any]]:
    """``image(number, **columns)``: a row."""
    return make_image


@pytest.fixture(scope="session")
def unit() -> Callable[..., Any]:
    """``unit(*values)``: a stored vector."""
    return make_unit


@pytest.fixture(scope="session")
def cosine() -> Callable[..., float]:
    """``cosine(left, right)``: of stored vectors."""
    return stored_cosine


@pytest.fixture
def reduce(tmp_path: Path) -> Callable[..., dict[str, dict[str, dict[str, Any]]]]:
    """``reduce(stage, inputs)``: rows by collection and URL; artefacts lie in ``reduce.scratch``."""

    def run(stage: Any, inputs: InMemory) -> dict[str, dict[str, dict[str, Any]]]:
        run.scratch = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        return run_reduce(stage, inputs, run.scratch)

    return run


@pytest.fixture(scope="session", params=[(1, 1), (3, 2), (7, 3)], ids=["1-shard", "3-shards", "7-shards"])
def sharding(request: pytest.FixtureRequest) -> dict[str, int]:
    """Shards and order of rows that must change nothing."""
    return {"num_shards": request.param[0], "shuffled": request.param[1]}
