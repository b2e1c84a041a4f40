"""Images of the pool as the report shows them: where they lie, why they were rejected, and small pictures.

Pictures are made from blurred images only, of rows that ``nsfw`` has scored as safe and that no takedown names. Memory:
what is asked for, and one shard's columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation import images
from curation.errors import ImageError, InputError
from curation.pipelines.context import Context
from curation.pipelines.ingest import image_id
from curation.pipelines.plan import Step
from curation.pipelines.tallies import read_aligned, reasons, steadily
from curation.report.data import Member
from curation.stages.manifest import Excluded
from curation.stages.nsfw import nsfw_verdict

THUMBNAIL_PX = 112
_QUALITY = 80
# Never shown, whatever is stored: unsafe images, and takedowns.
_HIDDEN = frozenset({"nsfw", "excluded_url", "excluded_domain", "excluded_id"})


@dataclass(frozen=True)
class Place:
    """An image of the pool and where it lies."""

    shard: int
    row: int
    member: Member


def takedowns(context: Context) -> Excluded | None:
    """Return the takedown lists, or None where they cannot be read: then nothing is shown at all."""
    try:
        return Excluded(context.config.manifest.exclude)
    except InputError:
        return None


def look_up(
    context: Context, verdicts: Sequence[Step], excluded: Excluded | None, shard: int, num_rows: int, mine: pa.Array
) -> list[Place]:
    """Return id, address and fate of each row in ``mine``; addresses that were taken down are left out."""

    def column(step: str, name: str) -> pa.ChunkedArray:
        return read_aligned(context.run, "pool", step, shard, [name], num_rows).column(0).take(mine)

    first: list[str | None] = [None] * len(mine)
    for _, found in reasons(context.run, "pool", shard, num_rows, verdicts):
        first = [known or reason for known, reason in zip(first, found.take(mine).to_pylist(), strict=True)]
    ids, url = column("fetch", "image_id"), column("crawl", "url")
    hashed = any(step.name == "pca_hash_verdict" for step in verdicts)
    urls = column("pca_hash_verdict", "urls") if hashed else pa.nulls(len(mine), pa.list_(pa.string()))
    hidden = ["excluded_url"] * len(mine)
    if excluded is not None:
        named = pa.table({"image_id": ids, "url": url, "urls": urls})
        hidden = excluded.reasons(named, np.ones(len(mine), bool)).to_pylist()
    return [
        Place(shard, row, Member(own_id, "" if hide else where, hide or reason))
        for row, own_id, where, reason, hide in zip(
            mine.to_pylist(), ids.to_pylist(), url.to_pylist(), first, hidden, strict=True
        )
    ]


def thumbnails(context: Context, rows: Mapping[int, int], places: Sequence[Place]) -> dict[tuple[int, int], bytes]:
    """Return small JPEGs by shard and row, of those images that may be shown.

    Args:
        context: The run.
        rows: Rows of each shard of the pool.
        places: Images to show.
    """
    by_shard: dict[int, list[int]] = {}
    for place in places:
        if place.member.reason not in _HIDDEN:
            by_shard.setdefault(place.shard, []).append(place.row)
    made = {}
    for shard, wanted in sorted(by_shard.items()):
        for row, data in steadily(partial(_of_shard, context, shard, rows[shard], wanted)):
            made[shard, row] = data
    return made


def _of_shard(context: Context, shard: int, num_rows: int, wanted: list[int]) -> list[tuple[int, bytes]]:
    """Return thumbnails of the rows that may be shown: blurred, and neither rejected nor unscored by ``nsfw``."""
    run = context.run
    blurred, fetched, scored = (run.marker("pool", step, shard) for step in ("faces", "fetch", "nsfw"))
    if blurred is None or fetched is None or scored is None:
        return []
    if any(marker.inputs.get("table fetch") != fetched.digest for marker in (blurred, scored)):
        return []  # of other images: fetched anew since
    scores = read_aligned(run, "pool", "nsfw", shard, ["nsfw_score"], num_rows).column(0).combine_chunks()
    stored = read_aligned(run, "pool", "faces", shard, ["tar_offset", "stored_bytes", "stored_id"], num_rows)
    safe = pc.and_(scores.is_valid(), nsfw_verdict(scores, context.config.nsfw.max_score).is_null())
    shown = pc.and_(safe, stored.column("tar_offset").is_valid()).to_numpy()
    made = []
    with run.open(blurred.files["images"]) as stream:
        for row in wanted:
            if not shown[row]:
                continue
            offset, num_bytes, stored_id = (stored.column(name)[row].as_py() for name in stored.column_names)
            stream.seek(offset)
            data = stream.read(num_bytes)
            if image_id(data) == stored_id:
                thumbnail = _thumbnail(context, data)
                if thumbnail is not None:
                    made.append((row, thumbnail))
    return made


def _thumbnail(context: Context, data: bytes) -> bytes | None:
    try:
        image = Image.fromarray(images.decode(data, context.config.images, THUMBNAIL_PX))
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        return images.encode(np.asarray(image), "jpeg", _QUALITY)
    except ImageError:
        return None
