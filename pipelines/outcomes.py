"""What became of every row of a collection: kept, or rejected by which stage, why, and as a copy of what."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from curation import schema
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan
from curation.pipelines.units import shard_markers

OUTCOMES = pa.schema(
    [
        schema.URL,
        schema.IMAGE_ID,
        pa.field("reject_stage", pa.string()),  # null: kept
        schema.REJECT_REASON,
        schema.DUPLICATE_OF,
        schema.SIMILARITY,
    ]
)


def outcomes(context: Context, plan: Plan, collection: str) -> Iterator[pa.Table]:
    """Yield ``OUTCOMES`` shard by shard; verdicts that are not finished are left out."""
    steps = plan.verdicts(collection.partition("/")[0])
    finished = [step for step in steps if context.run.markers(collection, step.name)]
    for shard, marker in shard_markers(context, collection).items():
        num_rows = marker.num_rows
        columns = {name: np.full(num_rows, None, object) for name in OUTCOMES.names[2:]}
        left = np.ones(num_rows, bool)
        for step in finished:
            if context.run.marker(collection, step.name, shard) is None:
                continue
            table = context.run.read_table(collection, step.name, shard)
            rejected = left & table.column("reject_reason").is_valid().to_numpy()
            columns["reject_stage"][rejected] = step.stage
            for name in ("reject_reason", "duplicate_of", "similarity"):
                if name in table.schema.names:
                    values = np.array(table.column(name).to_pylist(), object)
                    columns[name][rejected] = values[rejected]
            left &= ~rejected
        ids = (
            context.run.read_table(collection, "fetch", shard, ["image_id"]).column(0)
            if context.run.marker(collection, "fetch", shard)
            else pa.nulls(num_rows, pa.string())
        )
        urls = context.run.read_table(collection, "crawl", shard, ["url"]).column(0)
        rest = [pa.array(columns[field.name], field.type) for field in list(OUTCOMES)[2:]]
        yield pa.table([urls, ids, *rest], schema=OUTCOMES)
