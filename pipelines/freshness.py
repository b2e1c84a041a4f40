"""Which units of a step are finished, stale or left, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from curation.fingerprint import fingerprint
from curation.pipelines import blocks
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Unit, crawl_marker, shard_markers
from curation.schema import Table
from curation.store import Marker

State = Literal["done", "left", "stale", "uncovered"]


@dataclass(frozen=True)
class Assessed:
    """A unit and how it stands.

    Attributes:
        unit: The unit, with the inputs that it would be made from now.
        state: ``done``; ``left``: never made; ``stale``: made from something else; ``uncovered``: a feature table that
            may lack rows that a moved threshold keeps now.
        changed: Names of the inputs that differ (stale only).
        num_rows: Rows, as far as known.
    """

    unit: Unit
    state: State
    changed: tuple[str, ...] = ()
    num_rows: int = 0


def assess(context: Context, plan: Plan, step: Step) -> Iterator[Assessed]:
    """Yield every unit of a step; steps before it must have been finished for the answer to be final."""
    fixed = _fixed_inputs(context, plan, step)
    if step.kind == "blocks":
        yield from (_assessed(*found) for found in blocks.units(context, step, fixed))
        return
    if step.kind == "reduce":
        yield _reduce(context, plan, step, fixed)
        return
    for collection in collections(context, step):
        settings = fixed | {"settings": fingerprint(step.settings(context.config, collection))}
        if step.kind == "crawl":
            yield _assessed(Unit(step.name, collection, None, settings), _crawled(context, collection))
        else:
            yield from _shards(context, plan, step, collection, settings)


def collections(context: Context, step: Step) -> list[str]:
    """Return the collections of the run that a step works on."""
    return [collection for kind in step.collections for collection in context.collections(kind)]


def folders(context: Context, step: Step) -> list[str]:
    """Return the folders below which the markers of a step on shards or blocks lie."""
    return blocks.places(context, step) if step.kind == "blocks" else collections(context, step)


def shard_unit(context: Context, plan: Plan, step: Step, collection: str, shard: int) -> Unit:
    """Return the unit of a step on one shard, with the causes as they are now."""
    fixed = _fixed_inputs(context, plan, step) | {"settings": fingerprint(step.settings(context.config, collection))}

    def markers(tables: Sequence[Table]) -> dict[str, Marker | None]:
        existing = step.existing(tables, collection, plan)
        return {table.name: context.run.marker(collection, table.name, shard) for table in existing}

    return _unit(step, collection, shard, fixed, markers(step.reads), markers(step.after))


def _unit(
    step: Step,
    collection: str,
    shard: int,
    fixed: Mapping[str, str],
    reads: Mapping[str, Marker | None],
    after: Mapping[str, Marker | None],
) -> Unit:
    covers = ""
    shaping = dict(reads)
    if step.kind == "images":
        covers = fingerprint({name: _digest(marker) for name, marker in after.items()})
    else:  # a verdict on kept rows depends on which rows were kept
        shaping |= after
    inputs = dict(fixed) | {f"table {name}": _digest(marker) for name, marker in sorted(shaping.items())}
    return Unit(step.name, collection, shard, inputs, covers)


def _shards(context: Context, plan: Plan, step: Step, collection: str, fixed: dict[str, str]) -> Iterator[Assessed]:
    run = context.run
    reads = {table.name: run.markers(collection, table.name) for table in step.existing(step.reads, collection, plan)}
    after = {table.name: run.markers(collection, table.name) for table in step.existing(step.after, collection, plan)}
    made = run.markers(collection, step.name)
    for shard, links in shard_markers(context, collection).items():
        here = [{name: markers.get(shard) for name, markers in tables.items()} for tables in (reads, after)]
        unit = _unit(step, collection, shard, fixed, *here)
        marker = made.get(shard)
        found = _assessed(unit, marker, links.num_rows)
        if found.state == "done" and step.kind == "images" and marker is not None and marker.covers != unit.covers:
            found = Assessed(unit, "uncovered", (), links.num_rows)
        yield found


def _reduce(context: Context, plan: Plan, step: Step, fixed: dict[str, str]) -> Assessed:
    inputs = dict(fixed)
    num_rows = 0
    settings = {"": step.settings(context.config, "")}
    for collection in collections(context, step):
        settings[collection] = step.settings(context.config, collection)
        shards = shard_markers(context, collection)
        num_rows += sum(marker.num_rows for marker in shards.values())
        if step.fitted:
            continue
        tables = dict.fromkeys(
            table.name for table in (*step.reads, *step.after) if table in step.existing((table,), collection, plan)
        )
        for name in tables:
            markers = context.run.markers(collection, name)
            digests = [_digest(markers.get(shard)) for shard in shards]
            inputs[f"table {collection}/{name}"] = fingerprint({"shards": digests})
            if step.locations and name == "faces":
                paths = [markers[shard].files["images"] for shard in shards if shard in markers]
                inputs[f"tars {collection}"] = fingerprint({"paths": paths})
    inputs["settings"] = fingerprint(settings)
    unit = Unit(step.name, "", None, inputs)
    found = _assessed(unit, context.run.artefact_marker(step.name), num_rows)
    if found.state == "done" and not _has_its_tables(context, plan, step, unit):
        return Assessed(unit, "left", (), num_rows)
    return found


def _crawled(context: Context, collection: str) -> Marker | None:
    """Return the marker of a crawl, or None where its shards are not all there, or not those that it made."""
    marker = context.run.artefact_marker(crawl_marker(collection))
    if marker is None:
        return None
    shards = context.run.markers(collection, "crawl")
    digests = [_digest(shards.get(shard)) for shard in range(marker.num_shards)]
    return marker if fingerprint({"shards": digests}) == marker.digest else None


def _has_its_tables(context: Context, plan: Plan, step: Step, unit: Unit) -> bool:
    """Whether every table of a reduce is of this attempt: one of other settings may have been killed in the middle."""
    if step.writes is None:
        return True
    kinds = plan.writers[step.writes.name]
    for collection in collections(context, step):
        if collection.partition("/")[0] in kinds:
            made = context.run.markers(collection, step.writes.name)
            for shard in shard_markers(context, collection):
                if shard not in made or made[shard].fingerprint != unit.fingerprint:
                    return False
    return True


def _fixed_inputs(context: Context, plan: Plan, step: Step) -> dict[str, str]:
    inputs = {"step": step.name, "version": str(step.version)}
    inputs |= {f"setting {name}": text for name, text in step.told(context.config).items()}
    for name in step.weights(context.config):
        inputs[f"weights {name}"] = context.weights(name).sha256
    for needed in step.needs:
        if plan.step(needed).kind == "blocks":
            found = blocks.digests(context, plan.step(needed))
            inputs |= {f"table {folder}/{needed}": digest for folder, digest in found.items()}
            continue
        marker = context.run.artefact_marker(needed)
        inputs[f"artefact {needed}"] = "" if marker is None else marker.digest
    return inputs


def _assessed(unit: Unit, marker: Marker | None, num_rows: int = 0) -> Assessed:
    if marker is None:
        return Assessed(unit, "left", (), num_rows)
    if marker.fingerprint == unit.fingerprint:
        return Assessed(unit, "done", (), num_rows or marker.num_rows)
    names = sorted(unit.inputs.keys() | marker.inputs.keys())
    changed = tuple(name for name in names if unit.inputs.get(name) != marker.inputs.get(name))
    return Assessed(unit, "stale", changed, num_rows or marker.num_rows)


def _digest(marker: Marker | None) -> str:
    return "" if marker is None else marker.digest
