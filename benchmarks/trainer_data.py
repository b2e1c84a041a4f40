"""Labelled Parquet sets as input of the trainer, by way of the project's own pipeline."""

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.config import RunConfig
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, bring_up
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.process_runner import ProcessRunner
from curation.settings import parse
from curation.store import Run

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CURATION_TEST_DATA", str(ROOT.parent / "shared" / "data")))

Row = dict[str, Any]


def rows_of(name: str, split: str | None = None, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Return rows (image, label, split) of a set of the data folder, some of them drawn by the seed."""
    table = pq.read_table(DATA / f"{name}.parquet")
    if split is not None:
        table = table.filter(pc.equal(table.column("split"), split))
    if limit is not None and limit < table.num_rows:
        table = table.take(np.sort(np.random.default_rng(seed).permutation(table.num_rows)[:limit]))
    return table.to_pylist()


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=1000)
    return path


def curate(folder: Path, tree: dict[str, Any], stage: str, workers: int) -> Context:
    """Bring a run up to a stage, in this process or in several others, and return it."""
    config = parse(RunConfig, tree, str(folder))
    context, plan = Context(Run(folder), config), build_plan(config)
    if workers == 1:
        bring_up(context, plan, Request(stage), LocalRunner(1))
        return context
    with closing(ProcessRunner(workers)) as runner:
        bring_up(context, plan, Request(stage), runner)
    return context


def stored_rows(context: Context, step: str) -> list[Row]:
    """Return where each stored image of the pool lies: after ``fetch`` in raw tars, after ``faces`` in blurred ones.

    ``number`` is the row of the Parquet file that the pool was read from.
    """
    kind, offset, size = {
        "fetch": ("raw", "raw_offset", "num_bytes"),
        "faces": ("images", "tar_offset", "stored_bytes"),
    }[step]
    found = []
    for shard, marker in context.run.markers("pool", step).items():
        table = context.run.read_table("pool", step, shard)
        ids = context.run.read_table("pool", "fetch", shard, ["image_id"]).column(0).to_pylist()
        urls = context.run.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
        places = zip(urls, ids, table.column(offset).to_pylist(), table.column(size).to_pylist(), strict=True)
        for url, image_id, first, length in places:
            if first is not None:
                row = {"image_id": image_id, "tar": marker.files[kind], "tar_offset": first, "stored_bytes": length}
                found.append({**row, "number": int(url.rpartition("#")[2])})
    return found


def write_manifest(run: Path, name: str, rows: Iterable[Row]) -> str:
    """Write what the trainer needs of a manifest into a run's folder and return its path."""
    columns = ("image_id", "tar", "tar_offset", "stored_bytes")
    path = run / f"{PurePosixPath(name).stem}.parquet"
    pq.write_table(pa.Table.from_pylist([{key: row[key] for key in columns} for row in rows]), path)
    return str(path)
