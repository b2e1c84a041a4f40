"""The crawl over many workers, whatever runs them: parts of the inputs are read apart, then cut into shards at once.

What is a part depends on the inputs alone, and what it gives on the part alone, so shards are the same for any workers.
A part that has been read has a marker under ``work/crawl/`` of the run: a worker that dies costs its part, and a run
that was killed goes on with the parts that are left. Parts that visit live pages are read one after the other, each by
many requests at a time, so that no host is asked by two workers at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from curation.crawl.inputs import InputPart, split
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.ingest import inputs_of, parts_of
from curation.pipelines.kmeans_rounds import Runner
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Reading, Unit


def run(runner: Runner, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
    """Crawl the collections of ``units`` one after the other; yield each once its shards are there.

    Raises:
        InputError: An input does not exist, or cannot be read at all.
    """
    for unit in units:
        parts = _parts(context, unit)
        key = _key(unit, parts)
        _forget_others(context, unit.collection, key)
        done = context.run.markers(parts_of(unit.collection), key)
        left = [
            replace(unit, shard=number, reading=Reading(key, len(parts), part))
            for number, part in enumerate(parts)
            if number not in done
        ]
        together = [reading for reading, part in _with_part(left) if not part.in_turn]
        batches = [together, *([reading] for reading, part in _with_part(left) if part.in_turn)]
        num_read = sum(1 for batch in batches if batch for _ in runner.run(context, plan, step, batch))
        if num_read < len(left):  # the run is to stop
            return
        for finished in runner.run(context, plan, step, [replace(unit, reading=Reading(key, len(parts)))]):
            context.run.remove_folder(parts_of(unit.collection))
            yield finished


def _parts(context: Context, unit: Unit) -> list[InputPart]:
    """Return the parts of the inputs that a crawl reads: all, or those of an extension."""
    inputs = inputs_of(context.config, unit.collection)
    numbers = unit.extend or range(len(inputs))
    found = split([inputs[number] for number in numbers], context.config)
    return [replace(part, source=numbers[part.source]) for part in found]


def _with_part(readings: Sequence[Unit]) -> Iterator[tuple[Unit, InputPart]]:
    for unit in readings:
        if unit.reading is not None and unit.reading.part is not None:
            yield unit, unit.reading.part


def _key(unit: Unit, parts: Sequence[InputPart]) -> str:
    """Name what a crawl is made from: one of other inputs does not go on with its parts."""
    return fingerprint({"unit": unit.fingerprint, "parts": [asdict(part) for part in parts]})[:16]


def _forget_others(context: Context, collection: str, key: str) -> None:
    """Delete what was read for crawls of other inputs, and what killed attempts left."""
    folder = parts_of(collection)
    if not context.run.exists(f"{folder}/{key}"):
        context.run.remove_folder(folder)
    context.run.collect_garbage([folder])
