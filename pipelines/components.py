"""Sizes of near-duplicate components, and the largest of them with thumbnails.

Three streaming passes over the pool, each in bounded memory: sizes and the largest; their members, of which only those
that are shown stay in memory; thumbnails, read from the blurred tars.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.tallies import finished_verdicts, is_finished, read_aligned, shard_rows
from curation.pipelines.thumbnails import Place, look_up, takedowns, thumbnails
from curation.report.data import Component, Components, SizeBin
from curation.stages.manifest import Excluded

NUM_LARGEST = 50
NUM_MEMBERS = 12


@dataclass(frozen=True)
class _Place(Place):
    """A member and where it lies; ``order`` sorts what is least like its representative first."""

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
    pictures = thumbnails(context, rows, [place for found in members.values() for place in found])
    return Components(
        num_singles=sizes[1],
        bins=size_bins({size: images // size for size, images in sizes.items() if size > 1}, smallest=2),
        largest=tuple(
            Component(
                component_id,
                num_images,
                tuple(
                    replace(place.member, thumbnail=pictures.get((place.shard, place.row)))
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


def size_bins(groups: Mapping[int, int], smallest: int = 1) -> tuple[SizeBin, ...]:
    """Return groups of 1, 2, 3 to 4, 5 to 8, ... images, from the bin of ``smallest`` on.

    Args:
        groups: Number of groups by number of images, which is at least ``smallest``.
        smallest: Images of the smallest group that there can be.
    """
    bins: dict[int, tuple[int, int]] = {}
    for num_images, number in groups.items():
        place = (num_images - 1).bit_length()
        found, total = bins.get(place, (0, 0))
        bins[place] = (found + number, total + number * num_images)
    places = range((smallest - 1).bit_length(), max(bins) + 1) if bins else range(0)
    return tuple(SizeBin(2**place // 2 + 1, 2**place, *bins.get(place, (0, 0))) for place in places)


def _members(
    context: Context, verdicts: list[Step], rows: Mapping[int, int], largest: Mapping[str, int]
) -> dict[str, list[_Place]]:
    members = {component_id: _Members() for component_id in largest}
    wanted = pa.array(list(largest), pa.string())
    excluded = takedowns(context)
    for shard, num_rows in rows.items():
        ids = read_aligned(context.run, "pool", "dedup", shard, ["component_id"], num_rows).column(0)
        mine = np.flatnonzero(pc.is_in(ids, value_set=wanted).to_numpy())
        if len(mine):
            for component_id, place in _places(context, verdicts, excluded, shard, num_rows, pa.array(mine)):
                members[component_id].add(place)
    return {component_id: found.shown() for component_id, found in members.items()}


def _places(
    context: Context, verdicts: list[Step], excluded: Excluded | None, shard: int, num_rows: int, mine: pa.Array
) -> Iterator[tuple[str, _Place]]:
    """Yield the component and the member of each row in ``mine``."""
    table = read_aligned(context.run, "pool", "dedup", shard, schema.DEDUP.schema.names, num_rows).take(mine)
    for found, row in zip(look_up(context, verdicts, excluded, shard, num_rows, mine), table.to_pylist(), strict=True):
        member = replace(found.member, copy_of=row["duplicate_of"], similarity=row["similarity"])
        yield row["component_id"], _Place(shard, found.row, member, row["reject_reason"] is None)
