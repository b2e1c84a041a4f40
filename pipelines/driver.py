"""Bring a run up to a stage: step by step, do what is left or stale, and nothing else."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from curation import schema, settings
from curation.errors import ConfigError, DiskFullError, LeaseError, UsageError
from curation.fingerprint import fingerprint
from curation.lease import Lease
from curation.models.weights import registered
from curation.pipelines import crawl_parts, kmeans_rounds
from curation.pipelines.context import Context
from curation.pipelines.discard import check_finished
from curation.pipelines.freshness import Assessed, assess, collections, folders
from curation.pipelines.growth import Growth
from curation.pipelines.growth import check as growth_check
from curation.pipelines.plan import Plan, Step
from curation.pipelines.purge import rejected_but_stored
from curation.pipelines.redact import redact_retried
from curation.pipelines.stored_images import has_raw
from curation.pipelines.units import Done, Unit
from curation.pipelines.upkeep import is_crawled, mend, tidy


class Runner(Protocol):
    """Does units somewhere: in this process, or on a Ray cluster."""

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done, in any order; raise the first error once the others have stopped."""


@dataclass(frozen=True)
class StepStarted:
    """A step has units to do.

    Attributes:
        step: The step.
        num_units: Units to do now.
        num_rows: Rows of those units, as far as known.
        num_finished: Units that were finished before.
    """

    step: Step
    num_units: int
    num_rows: int
    num_finished: int


@dataclass(frozen=True)
class StepEnded:
    """A step is finished; ``skipped`` says that there was nothing to do."""

    step: Step
    skipped: bool
    seconds: float


@dataclass(frozen=True)
class Warned:
    """Something that the user should know."""

    message: str


@dataclass(frozen=True)
class Noted:
    """Something that was asked for and done, or had not to be done."""

    message: str


@dataclass(frozen=True)
class RowsDone:
    """Rows of a unit at work have been worked on; comes from the threads that work."""

    num_rows: int


Event = StepStarted | RowsDone | Done | StepEnded | Warned | Noted


@dataclass(frozen=True)
class Request:
    """What is asked of a run.

    Attributes:
        stage: Bring the run up to and including this stage.
        only: Refuse instead of running anything before the stage.
        redo: Stages to do again although they are finished.
        refit: Fit PCA, index and centroids again.
        retry: Reasons, see ``retry.wanted_reasons``: links that failed for them are tried again in new shards.
        extend: Read all inputs again, for links that are not there yet.
    """

    stage: str = "manifest"
    only: bool = False
    redo: frozenset[str] = field(default_factory=frozenset)
    refit: bool = False
    retry: tuple[str, ...] = ()
    extend: bool = False


def bring_up(
    context: Context,
    plan: Plan,
    request: Request,
    runner: Runner,
    on_event: Callable[[Event], None] = lambda event: None,
) -> None:
    """Do what a request lacks, under the run's lease.

    Raises:
        CurationError: The first thing that went wrong; what was finished stays finished.
    """
    steps = plan.through(request.stage)
    for stage in request.redo:
        plan.check_stage(stage)
    _check_request(context, steps, request)
    for step in steps:
        for note in step.notes(context.config):
            on_event(Warned(note))
    growth_check(
        request.stage, [step.stage for step in steps], request.only, request.retry, request.extend, request.redo
    )
    grows_behind = [step for step in steps if step.kind in ("crawl", "fetch")][-1]
    with context.run.lease() as lease:
        check_finished(context)
        for message in mend(context, plan, request.redo):
            on_event(Warned(message))
        tidy(context, plan, steps)
        context.run.write_bytes("run.yaml", settings.dump(context.config).encode())
        asked = context.should_stop
        context.should_stop = lambda: asked() or lease.lost.is_set()
        context.on_rows = lambda num_rows: on_event(RowsDone(num_rows))
        try:
            growth = Growth(context, plan, request.retry, request.extend)
            is_read: set[str] = set()  # collections whose inputs this request reads
            for step in steps:
                if step.kind == "crawl":
                    is_read |= {name for name in collections(context, step) if not is_crawled(context, name)}
                _bring_up_step(context, plan, step, request, growth, runner, on_event)
                _check_stop(context, lease, asked)
                grown = _grow(context, plan, request, growth, is_read, runner, on_event) if step == grows_behind else ()
                for _ in grown:
                    _check_stop(context, lease, asked)
                    _bring_up_step(context, plan, step, request, growth, runner, on_event)
                    _check_stop(context, lease, asked)
        finally:
            context.should_stop = asked
        tidy(context, plan, steps)


def _check_stop(context: Context, lease: Lease, asked: Callable[[], bool]) -> None:
    if lease.lost.is_set():
        raise LeaseError(f"{context.run.url}: another process has taken this run over; this one stops")
    if asked():
        raise KeyboardInterrupt


def _grow(
    context: Context,
    plan: Plan,
    request: Request,
    growth: Growth,
    is_read: set[str],
    runner: Runner,
    on_event: Callable[[Event], None],
) -> Iterator[None]:
    """Add the shards that a request asks for to what is fetched; yield where the caller is to fetch them.

    Links to try again and new links may be of one host: it is asked for one kind after the other, at its rate.
    """
    grew = False
    for is_more, message in growth.retry():
        grew |= is_more
        on_event(Noted(message))
    if grew:
        yield
    units = growth.extensions(but=is_read)
    if units and request.only and request.stage not in ("crawl", "fetch"):
        raise UsageError(f"--only {request.stage}: inputs were added since the crawl; leave out --only")
    grew = False
    for done in crawl_parts.run(runner, context, plan, plan.step("crawl"), units):
        on_event(Noted(f"{done.unit.collection}: {done.num_rows:,} new links"))
        grew |= done.num_rows > 0
    if grew:
        yield


def redo_cost(context: Context, plan: Plan, stages: frozenset[str], last: str = "manifest") -> list[str]:
    """Return what doing stages again costs, a line a step: they themselves and what is protected behind them."""
    steps = plan.through(last)
    first = min((index for index, step in enumerate(steps) if step.stage in stages), default=len(steps))
    lines = []
    for index, step in enumerate(steps):
        if step.stage not in stages and not (step.protected and index > first):
            continue
        found = [context.run.markers(folder, step.name) for folder in folders(context, step)]
        markers = [marker for shards in found for marker in shards.values()]
        if markers:
            lines.append(
                f"{step.name}: {len(markers)} shards, {sum(m.num_rows for m in markers)} rows, "
                f"{sum(m.seconds for m in markers):.0f} s of work"
                + (" (requests go to the hosts again)" if step.name == "fetch" else "")
                + ("" if step.stage in stages else ", where its inputs change")
            )
    return lines


def _check_request(context: Context, steps: Sequence[Step], request: Request) -> None:
    """Say now, and not after hours, what cannot work: a missing input list, package or licence, or a redo in vain."""
    if not context.config.pool.inputs:
        raise ConfigError(["pool.inputs: is required: name the pages, URL lists or image sets to curate"])
    late = sorted(request.redo - {step.stage for step in steps})
    if late:
        raise UsageError(f"--redo {late[0]}: comes after --stage {request.stage}; choose a later --stage")
    roles = {entry.name: entry.role for entry in registered()}
    for step in steps:
        step.check(context.config)
        for name in step.weights(context.config):
            role = "embed" if step.stage in ("index", "cluster", "pca_hash") else step.stage
            if step.stage == "sscd" and name != context.config.sscd.weights:
                role = "faces"  # references are described as blurred as the pool
            if roles.get(name, role) != role:
                raise ConfigError([f"{role}.weights: {name} is for {roles[name]}; see `curate models list`"])
            context.weights(name)
        for collection in ("", *collections(context, step)) if step.kind == "reduce" else collections(context, step):
            fingerprint(step.settings(context.config, collection))
    for step in steps:
        if step.reads_raw and step.stage in request.redo and "fetch" not in request.redo:
            gone = sum(
                not has_raw(context, collection, shard)
                for collection in collections(context, step)
                for shard in context.run.markers(collection, step.name)
            )
            if gone:
                raise UsageError(
                    f"--redo {step.stage}: the fetched bytes of {gone} shards were deleted after blurring; "
                    "add --redo fetch to get them again"
                )


def _bring_up_step(
    context: Context,
    plan: Plan,
    step: Step,
    request: Request,
    growth: Growth,
    runner: Runner,
    on_event: Callable[[Event], None],
) -> None:
    start = time.monotonic()
    assessed = list(assess(context, plan, step))
    pending = [found for found in assessed if _is_pending(context, found, step, request)]
    kept = [found for found in assessed if found not in pending]
    if step.kind == "crawl":
        kept = [found for found in kept if not growth.unread(found.unit.collection)]
    _say_what_stays(step, kept, on_event)
    if not pending:
        on_event(StepEnded(step, True, 0.0))
        return
    if request.only and step.stage != request.stage:
        raise UsageError(
            f"--only {request.stage}: {step.stage} is not finished ({len(pending)} of {len(assessed)} units left); "
            f"run `curate run --stage {step.stage}` first, or leave out --only"
        )
    _check_space(context, step, pending)
    num_rows = sum(found.num_rows for found in pending)
    on_event(StepStarted(step, len(pending), num_rows, len(assessed) - len(pending)))
    anew = step.stage in request.redo
    shared = _shared_passes(context, plan, step, request)
    units = [
        replace(
            unit,
            anew=anew,
            with_steps=tuple(name for name, places in shared.items() if (unit.collection, unit.shard) in places),
        )
        for unit in (found.unit for found in pending)
    ]
    do = kmeans_rounds.run if step.in_rounds else crawl_parts.run if step.kind == "crawl" else _at_once
    for done in do(runner, context, plan, step, units):
        if step.kind == "fetch" and done.unit.shard is not None:
            redact_retried(context, done.unit.collection, done.unit.shard)
        on_event(done)
    if step.name == schema.NSFW_VERDICT.name:
        stored = sum(int(rows.sum()) for _, _, rows in rejected_but_stored(context))
        if stored:
            on_event(
                Warned(f"{stored} images that nsfw rejects now are still stored; `curate purge` deletes their bytes")
            )
    if not context.should_stop():
        on_event(StepEnded(step, False, time.monotonic() - start))


def _at_once(runner: Runner, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
    return runner.run(context, plan, step, units)


def _shared_passes(
    context: Context, plan: Plan, step: Step, request: Request
) -> dict[str, set[tuple[str, int | None]]]:
    """Return, for each later image step of the request that can share this one's pass, the shards that lack it."""
    wanted = {other.name for other in plan.through(request.stage)}
    return {
        name: {
            (found.unit.collection, found.unit.shard)
            for found in assess(context, plan, plan.step(name))
            if found.state == "left"
            and found.unit.shard is not None
            and has_raw(context, found.unit.collection, found.unit.shard)
        }
        for name in step.shares_pass
        if name in wanted
    }


def _is_pending(context: Context, found: Assessed, step: Step, request: Request) -> bool:
    unit = found.unit
    if found.state == "left" or step.stage in request.redo:
        return True
    if found.state == "done" and not (request.refit and step.fitted):
        return False
    if step.reads_raw and not _has_its_raw(context, step, unit):
        return False  # what it would see now is blurred: hashes and scores of other pictures
    if not step.protected or any(name.startswith("table ") for name in found.changed):
        return True  # a protected table of other links or images than are there now is of no use to anybody
    return step.reads_raw  # fetched anew


def _has_its_raw(context: Context, step: Step, unit: Unit) -> bool:
    """Whether the fetched bytes that a unit needs are still there."""
    if unit.shard is not None:
        return has_raw(context, unit.collection, unit.shard)
    return all(
        has_raw(context, collection, shard)
        for collection in collections(context, step)
        for shard in context.run.markers(collection, "fetch")
    )


def _say_what_stays(step: Step, kept: Sequence[Assessed], on_event: Callable[[Event], None]) -> None:
    """Warn, once a step, of outputs that were made with other settings and are kept."""
    stale = [found for found in kept if found.state == "stale"]
    if not stale:
        return
    changed = sorted({name for found in stale for name in found.changed})
    redo = f"--redo fetch --redo {step.stage}" if step.reads_raw else f"--redo {step.stage}"
    more = "`--extend` adds the links that are new, " if step.kind == "crawl" else ""
    on_event(
        Warned(
            f"{step.name}: {len(stale)} of {len(kept)} finished units were made with other {', '.join(changed)} and "
            f"are kept as they are; {more}`{redo}` makes them again"
        )
    )


def _check_space(context: Context, step: Step, pending: Sequence[Assessed]) -> None:
    """Refuse to start what would fill the disk: copying a local set, and writing blurred tars beside raw ones."""
    free = context.run.free_bytes()
    if free is None or step.name not in ("fetch", "faces"):
        return
    column = {"fetch": ("crawl", "source_bytes"), "faces": ("fetch", "num_bytes")}[step.name]
    needed = 0
    for found in pending:
        if found.unit.shard is not None and not found.unit.collection.startswith("references/"):
            sizes = context.run.read_table(found.unit.collection, column[0], found.unit.shard, [column[1]]).column(0)
            needed += sum(size for size in sizes.to_pylist() if size is not None)
    if step.name == "faces":  # a raw tar goes as soon as its shard is blurred: only those at work lie twice
        needed = min(needed, needed // max(1, len(pending)) * 8)
    if needed > free:
        raise DiskFullError(
            f"{context.run.url}: {step.stage} needs about {_size(needed)}, and {_size(free)} are free. "
            "Free some space, or move the run to a larger disk or bucket and run again"
        )


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"
