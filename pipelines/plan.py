"""The steps of a run, their order, and what each is made from.

A *stage* is what users name (``--stage dedup``); a *step* is what is run, finished and made stale on its own. Most
stages have several: features (expensive, one shard at a time), what is fitted, and the verdict that a threshold or a
group makes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from curation.config import RunConfig
from curation.errors import PlanError, UsageError
from curation.pipelines.context import Context
from curation.schema import Table

Kind = Literal["crawl", "fetch", "images", "map", "blocks", "reduce"]


@dataclass(frozen=True)
class Step:
    """One unit of the plan.

    Attributes:
        name: Name of the table or the artefacts that it makes; unique in the plan.
        stage: The stage that it belongs to.
        kind: ``crawl`` and ``fetch`` bring data in; ``images`` reads pixels of a shard; ``map`` reads tables of a
            shard; ``blocks`` reads two groups of shards; ``reduce`` reads all shards.
        version: Raised by hand when the output for the same input changes.
        collections: Kinds of collections that it runs on.
        reads: Tables that shape the output; where a collection has no such table it is left out.
        after: Verdicts: rows that one of them rejects are not worked on.
        writes: The table, if it makes one.
        writes_for: Kinds of collections that get the table; empty: all that it runs on.
        needs: Steps whose artefacts, or blocks, it uses.
        makes: Names of the artefacts that it leaves; the file of each block.
        pairs: The pairs of collections that ``blocks`` are made of.
        fitted: Its artefacts are kept when inputs change, until ``--refit``.
        locations: Its output says where bytes lie, so it is stale when they move.
        shares_pass: Later image steps of the same bytes: where a shard lacks them too, one read and one decode
            serve all.
        gate: The verdict that says of each image whether this step may store it, where both share a pass.
        reads_raw: Looks at fetched bytes before they are blurred: once those are gone it cannot be made again.
        in_rounds: A reduce whose work is split into parts, iteration by iteration, see ``kmeans_rounds``.
        protected: Never redone unless asked for, because its inputs are gone or cost other people something.
        settings: Settings that shape the output, as plain values, for a collection.
        told: Those of them that markers also keep in words, so that it can be told under which an output was made.
        weights: Names of the weights that shape the output.
        check: Refuses settings that cannot work, before a run starts.
        notes: What the user should know of settings that do work, in words.
        make: Builds the stage in the process that runs it.
    """

    name: str
    stage: str
    kind: Kind
    version: int
    collections: tuple[str, ...]
    make: Callable[[Context], Any] = field(repr=False)
    reads: tuple[Table, ...] = ()
    after: tuple[Table, ...] = ()
    writes: Table | None = None
    writes_for: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    fitted: bool = False
    locations: bool = False
    shares_pass: tuple[str, ...] = ()
    gate: str = ""
    reads_raw: bool = False
    in_rounds: bool = False
    protected: bool = False
    settings: Callable[[RunConfig, str], dict[str, Any]] = field(default=lambda config, collection: {}, repr=False)
    told: Callable[[RunConfig], dict[str, str]] = field(default=lambda config: {}, repr=False)
    pairs: Callable[[Context], list[tuple[str, str]]] = field(default=lambda context: [], repr=False)
    weights: Callable[[RunConfig], tuple[str, ...]] = field(default=lambda config: (), repr=False)
    check: Callable[[RunConfig], None] = field(default=lambda config: None, repr=False)
    notes: Callable[[RunConfig], list[str]] = field(default=lambda config: [], repr=False)

    def existing(self, tables: Sequence[Table], collection: str, plan: "Plan") -> tuple[Table, ...]:
        """Return those of the tables that a collection has."""
        return tuple(table for table in tables if collection.partition("/")[0] in plan.writers[table.name])


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which each finds what it reads.

    Raises:
        PlanError: If a step reads a table or an artefact that no earlier step makes.
    """

    steps: tuple[Step, ...]
    writers: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)  # table → kinds of collections

    def __post_init__(self) -> None:
        artefacts: set[str] = set()
        makers: dict[str, str] = {}
        names = [step.name for step in self.steps]
        for name in names:
            if names.count(name) > 1:
                raise PlanError(f"{names.count(name)} steps are named {name}")
        for step in self.steps:
            for table in (*step.reads, *step.after):
                if not set(self.writers.get(table.name, ())) & set(step.collections):
                    raise PlanError(
                        f"step {step.name} reads table {table.name}, but no step before it writes that table"
                    )
            for needed in step.needs:
                if needed not in artefacts:
                    raise PlanError(f"step {step.name} needs what {needed} makes, but {needed} does not come before it")
            if step.writes is not None:
                if step.writes.name in self.writers:
                    maker = makers[step.writes.name]
                    raise PlanError(f"step {step.name} writes table {step.writes.name}, which step {maker} writes too")
                makers[step.writes.name] = step.name
                self.writers[step.writes.name] = step.writes_for or step.collections
            if step.makes:
                artefacts.add(step.name)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order."""
        return tuple(dict.fromkeys(step.stage for step in self.steps))

    def step(self, name: str) -> Step:
        """Return a step by its name."""
        return next(step for step in self.steps if step.name == name)

    def through(self, stage: str) -> tuple[Step, ...]:
        """Return the steps up to and including a stage.

        Raises:
            UsageError: If there is no such stage; the message lists them.
        """
        self.check_stage(stage)
        last = max(index for index, step in enumerate(self.steps) if step.stage == stage)
        return self.steps[: last + 1]

    def check_stage(self, stage: str) -> None:
        """Raise ``UsageError`` unless the stage exists."""
        if stage not in self.stages:
            raise UsageError(f"there is no stage {stage!r}; stages, in order: {', '.join(self.stages)}")

    def verdicts(self, kind: str) -> tuple[Step, ...]:
        """Return the steps that reject rows of a kind of collection, in order."""
        return tuple(
            step
            for step in self.steps
            if step.writes is not None and step.writes.is_verdict and kind in self.writers[step.writes.name]
        )
