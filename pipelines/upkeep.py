"""A run is put in order before and after work on it: what is damaged, what killed attempts left, what has served."""

from collections.abc import Iterator, Sequence
from functools import partial

from curation import schema
from curation.errors import CorruptError
from curation.pipelines import blocks
from curation.pipelines.context import Context
from curation.pipelines.freshness import assess, collections
from curation.pipelines.plan import Plan, Step
from curation.pipelines.redact import redact_all_retried
from curation.pipelines.stored_images import forget_raw, is_last_to_read_raw
from curation.pipelines.units import crawl_marker


def mend(context: Context, plan: Plan, redo: frozenset[str]) -> Iterator[str]:
    """Take back the markers of outputs whose files are missing or cut short, so that they are made again; say which.

    Args:
        context: Of the run.
        plan: Its plan.
        redo: Stages that are done again anyway.

    Raises:
        CorruptError: What is damaged cannot be made again unless it is asked for.
    """
    steps = {step.name: step for step in plan.steps}
    known = _collections(context)
    for collection, name, shard, path in list(context.run.damaged([*known, *_block_folders(context, plan)])):
        step = steps.get(name)
        if step is not None and (step.protected or step.reads_raw):
            needed = dict.fromkeys(("fetch", step.stage) if step.reads_raw else (step.stage,))
            if not set(needed) <= redo:
                asked = " ".join(f"--redo {stage}" for stage in needed)
                raise CorruptError(f"{context.run.url}: {path} is missing or cut short; `{asked}` makes it again")
        if name == schema.RETRY.name and "crawl" not in redo:
            raise CorruptError(
                f"{context.run.url}: {path} is missing or cut short; `--redo crawl` starts {collection} anew"
            )
        yield f"{path} is missing or cut short; it is made again"
        context.run.forget(collection, name, shard)


def tidy(context: Context, plan: Plan, steps: Sequence[Step]) -> None:
    """Delete what killed attempts left, and fetched bytes whose blurred copy is finished."""
    known = _collections(context)
    for collection in known:
        crawled = context.run.artefact_marker(crawl_marker(collection))
        if crawled is not None:
            context.run.forget_shards(collection, crawled.num_shards)
            redact_all_retried(context, collection)
    blocks.forget_gone(context, plan)
    for step in steps:
        if step.kind != "images" or not any(is_last_to_read_raw(step, collection) for collection in known):
            continue
        if not all(map(partial(is_crawled, context), collections(context, step))):
            continue
        for found in assess(context, plan, step):
            unit = found.unit
            if found.state == "done" and unit.shard is not None and is_last_to_read_raw(step, unit.collection):
                forget_raw(context, unit.collection, unit.shard)
    context.run.collect_garbage([*known, *_block_folders(context, plan)])


def _collections(context: Context) -> list[str]:
    return [name for kind in ("pool", "seeds", "references") for name in context.collections(kind)]


def _block_folders(context: Context, plan: Plan) -> list[str]:
    return [folder for step in plan.steps if step.kind == "blocks" for folder in blocks.places(context, step)]


def is_crawled(context: Context, collection: str) -> bool:
    """Whether a collection has shards."""
    return context.run.artefact_marker(crawl_marker(collection)) is not None
