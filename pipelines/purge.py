"""Delete the stored bytes of images that pixel policy rejects now.

A stricter ``nsfw.max_score`` changes verdicts and no bytes, so that a threshold can be tried and moved back. This makes
it final: tars are written anew without the rejected images. Boxes, scores and ids stay, so no feature is computed
again; where the bytes were, ``tar_offset`` is null, and a laxer threshold later finds the images ``discarded``.
"""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from curation import schema
from curation.pipelines.context import Context
from curation.pipelines.tar_rewrite import BLURRED, rewrite


def rejected_but_stored(context: Context) -> Iterator[tuple[str, int, npt.NDArray[np.bool_]]]:
    """Yield (collection, shard, rows) where NSFW rejects images whose bytes are stored."""
    for collection in ("pool", *context.collections("seeds")):
        verdicts = context.run.markers(collection, schema.NSFW_VERDICT.name)
        fetched = context.run.markers(collection, schema.FETCH.name)
        for shard, blurred in context.run.markers(collection, schema.FACES.name).items():
            is_current = shard in fetched and blurred.inputs.get("table fetch") == fetched[shard].digest
            if not is_current or shard not in verdicts:
                continue
            reasons = context.run.read_table(collection, schema.NSFW_VERDICT.name, shard).column(0)
            stored = context.run.read_table(collection, schema.FACES.name, shard, ["tar_offset"]).column(0)
            rows = reasons.is_valid().to_numpy() & stored.is_valid().to_numpy()
            if rows.any():
                yield collection, shard, rows


def purge(context: Context) -> int:
    """Delete those bytes, and return how many images they were; the caller holds the lease."""
    purged = 0
    for collection, shard, rows in list(rejected_but_stored(context)):
        _rewrite(context, collection, shard, rows)
        purged += int(rows.sum())
    return purged


def _rewrite(context: Context, collection: str, shard: int, rejected: npt.NDArray[np.bool_]) -> None:
    run = context.run
    marker = run.marker(collection, schema.FACES.name, shard)
    if marker is None:
        return
    table = run.read_table(collection, schema.FACES.name, shard)
    ids = run.read_table(collection, schema.FETCH.name, shard, ["image_id"]).column(0).to_pylist()
    names = [None if gone else name for name, gone in zip(ids, rejected, strict=True)]
    files, table = rewrite(run, (collection, "images", shard), marker, names, table, BLURRED)
    fields = {name: asdict(marker)[name] for name in ("fingerprint", "inputs", "covers", "seconds")}
    run.commit(collection, schema.FACES.name, shard, table, {**fields, "files": files})
    run.remove(marker.files["images"])
