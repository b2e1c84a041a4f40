"""Sizes of near-duplicate components, and the largest of them with thumbnails.

Three streaming passes over the pool, each in bounded memory: sizes and the largest; their members, of which only those
that are shown stay in memory; thumbnails, read from the blurred tars.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation import images
from curation.errors import ImageError, InputError
from curation.pipelines.context import Context
from curation.pipelines.ingest import image_id
from curation.pipelines.plan import Plan, Step
from curation.pipelines.tallies import finished_verdicts, is_finished, read_aligned, reasons, shard_rows, steadily
from curation.report.data import Component, Components, Member, SizeBin
from curation.stages.manifest import Excluded
from curation.stages.nsfw import nsfw_verdict

NUM_LARGEST = 50
NUM_MEMBERS = 12
THUMBNAIL_PX = 112
_QUALITY = 80
# Never shown, whatever is stored: unsafe images, and takedowns.
_HIDDEN = frozenset({"nsfw", "excluded_url", "excluded_domain", "excluded_id"})


@dataclass(frozen=True)
class _Place:
    """A member and where it lies; ``order`` sorts what is least like its representative first."""

    shard: int
    row: int
    member: Member
    is_representative: bool

    @property
    def order(self) -> tuple[float, str]:
        return (2.0 if self.member.similarity is None else self.member.similarity, self.member.image_id)


@dataclass
class _Members:
    representatives: list[_Place] = field(default_factory=list)
    others: list[_Place] = field(default_factory=list)

    def add(self, place: _Place) -> None:
        (self.representatives if place.is_representative else self.others).append(place)
        if len(self.others) >= 8 * NUM_MEMBERS:
            self._trim()

    def shown(self) -> list[_Place]:
        self._trim()
        first = sorted(self.representatives, key=lambda place: place.order)[:1]
        return [*first, *self.others][:NUM_MEMBERS]

    def _trim(self) -> None:
        self.others = sorted(self.others, key=lambda place: place.order)[:NUM_MEMBERS]


def components(context: Context, plan: Plan) -> Components | None:
    """Return the near-duplicate components of the pool, or None before ``dedup`` is finished."""
    rows = shard_rows(context, "pool")
    if rows is None or not is_finished(context.run, "pool", "dedup", rows):
        return None
    sizes, largest = _sizes(context, rows)
    verdicts = finished_verdicts(context, plan, "pool", rows)
    members = _members(context, verdicts, rows, largest)
    thumbnails = _thumbnails(context, rows, [place for found in members.values() for place in found])
    return Components(
        num_singles=sizes[1],
        bins=_bins(sizes),
        largest=tuple(
            Component(
                component_id,
                num_images,
                tuple(
                    replace(place.member, thumbnail=thumbnails.get((place.shard, place.row)))
                    for place in members[component_id]
                ),
            )
            for component_id, num_images in largest.items()
        ),
    )


def _sizes(context: Context, rows: Mapping[int, int]) -> tuple[Counter[int], dict[str, int]]:
    """Return images by the size of their component, and the largest components (size by id), largest first."""
    sizes: Counter[int] = Counter()
    largest: dict[str, int] = {}
    for shard, num_rows in rows.items():
        table = read_aligned(context.run, "pool", "dedup", shard, ["component_id", "component_size"], num_rows)
        table = table.filter(table.column("component_size").is_valid())
        sizes.update(
            {entry["values"]: entry["counts"] for entry in table.column("component_size").value_counts().to_pylist()}
        )
        floor = min(largest.values()) if len(largest) == NUM_LARGEST else 2
        candidates = table.filter(pc.greater_equal(table.column("component_size"), floor))
        for entry in candidates.group_by(["component_id", "component_size"]).aggregate([]).to_pylist():
            largest[entry["component_id"]] = entry["component_size"]
        largest = dict(sorted(largest.items(), key=lambda item: (-item[1], item[0]))[:NUM_LARGEST])
    return sizes, largest


def _bins(sizes: Mapping[int, int]) -> tuple[SizeBin, ...]:
    """Return components of 2, 3 to 4, 5 to 8, ... images; a component of ``n`` images is counted ``n`` times."""
    bins: dict[int, tuple[int, int]] = {}
    for num_images, count in sizes.items():
        if num_images > 1:
            place = (num_images - 1).bit_length()
            found, total = bins.get(place, (0, 0))
            bins[place] = (found + count // num_images, total + count)
    top = max(bins, default=0)
    return tuple(SizeBin(2 ** (place - 1) + 1, 2**place, *bins.get(place, (0, 0))) for place in range(1, top + 1))


def _members(
    context: Context, verdicts: list[Step], rows: Mapping[int, int], largest: Mapping[str, int]
) -> dict[str, list[_Place]]:
    members = {component_id: _Members() for component_id in largest}
    wanted = pa.array(list(largest), pa.string())
    excluded = _excluded(context)
    for shard, num_rows in rows.items():
        ids = read_aligned(context.run, "pool", "dedup", shard, ["component_id"], num_rows).column(0)
        mine = np.flatnonzero(pc.is_in(ids, value_set=wanted).to_numpy())
        if len(mine):
            for component_id, place in _places(context, verdicts, excluded, shard, num_rows, pa.array(mine)):
                members[component_id].add(place)
    return {component_id: found.shown() for component_id, found in members.items()}


def _excluded(context: Context) -> Excluded | None:
    """Return the takedown lists, or None where they cannot be read: then nothing is shown at all."""
    try:
        return Excluded(context.config.manifest.exclude)
    except InputError:
        return None


def _places(
    context: Context, verdicts: list[Step], excluded: Excluded | None, shard: int, num_rows: int, mine: pa.Array
) -> Iterator[tuple[str, _Place]]:
    """Yield the component and the member of each row in ``mine``."""

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
    columns: list[list[Any]] = [
        column("dedup", name).to_pylist() for name in ("component_id", "reject_reason", "duplicate_of", "similarity")
    ]
    for row, own_id, where, reason, hide, (component_id, rejected, copy_of, similarity) in zip(
        mine.to_pylist(), ids.to_pylist(), url.to_pylist(), first, hidden, zip(*columns, strict=True), strict=True
    ):
        member = Member(own_id, "" if hide else where, hide or reason, copy_of, similarity)
        yield component_id, _Place(shard, row, member, rejected is None)


def _thumbnails(context: Context, rows: Mapping[int, int], places: list[_Place]) -> dict[tuple[int, int], bytes]:
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
