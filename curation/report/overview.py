"""How a run stands, as plain values, and as lines of text for a terminal.

Whoever can read a run fills these in (``curation.pipelines.overview``); nothing here reads anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from curation.report.words import counted, plain, share, size, took

_SHOWN_HOSTS = 10


@dataclass(frozen=True)
class StepOverview:
    """One step of the plan.

    Attributes:
        name: Its name.
        kind: ``crawl``, ``fetch``, ``images``, ``map`` or ``reduce``.
        done: Units that are finished and made from what would be used now.
        stale: Units that were made from something else.
        uncovered: Units whose features may lack rows that a moved threshold keeps now.
        left: Units never made; a collection that has not been crawled counts as one.
        changed: What the stale units were made with otherwise, sorted.
        kept: Whether stale units stay as they are until somebody asks for them to be redone.
        num_rows: Rows of the units that exist.
        seconds: Work that they took, summed over units.
        problem: Why it could not be found out what is stale; units that exist then count as done.
        notes: What there is to know of the settings that it is made with.
    """

    name: str
    kind: str
    done: int = 0
    stale: int = 0
    uncovered: int = 0
    left: int = 0
    changed: tuple[str, ...] = ()
    kept: bool = False
    num_rows: int = 0
    seconds: float = 0.0
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        """Units in any state."""
        return self.done + self.stale + self.uncovered + self.left

    @property
    def rows_per_s(self) -> float | None:
        """Rows for a second of work of one worker; None where nothing was measured."""
        return self.num_rows / self.seconds if self.num_rows and self.seconds > 0 else None

    @property
    def state(self) -> str:
        """One word: ``done``, ``unknown``, ``stale``, ``started`` or ``left``."""
        if self.problem:
            return "unknown"
        if self.stale or self.uncovered:
            return "stale"
        if not self.left:
            return "done"
        return "started" if self.done else "left"


@dataclass(frozen=True)
class StageOverview:
    """One stage: what users name."""

    name: str
    steps: tuple[StepOverview, ...]


@dataclass(frozen=True)
class FunnelEntry:
    """What one stage did to the rows of a collection.

    Attributes:
        stage: Name of the stage.
        num_in: Rows that no earlier stage rejects.
        num_out: Rows that it keeps.
        rejected: Reason → rows, largest first; they add up to ``num_in - num_out``.
    """

    stage: str
    num_in: int
    num_out: int
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class HostOverview:
    """Rows of one host, how many of them failed, and why; the host is empty for images of local sets.

    Attributes:
        host: Its name.
        num_rows: Rows.
        num_failed: Those that became no images.
        rejected: Reason → rows, largest first.
    """

    host: str
    num_rows: int
    num_failed: int
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FetchOverview:
    """What has been fetched so far. A link that was tried again counts once, as what became of it in the end.

    Attributes:
        num_rows: Links of the shards that are fetched.
        num_kept: Those that became images.
        rejected: Reason → rows, largest first.
        hosts: Hosts with the most rows.
        exact_hosts: False if there were too many hosts to count each: counts of hosts are then lower bounds.
        failing: Hosts with the most failures, the worst first.
        num_retried: Times that a link was tried again by ``curate run --retry``.
        num_recovered: Links that became images by it.
    """

    num_rows: int
    num_kept: int
    rejected: dict[str, int]
    hosts: tuple[HostOverview, ...]
    exact_hosts: bool = True
    failing: tuple[HostOverview, ...] = ()
    num_retried: int = 0
    num_recovered: int = 0


@dataclass(frozen=True)
class CollectionOverview:
    """One collection.

    Attributes:
        name: ``pool``, ``seeds/<name>`` or ``references/<name>``.
        crawled: Whether its crawl is finished; everything else is empty before.
        num_shards: Shards.
        num_rows: Links: rows but for those that try another one again.
        skipped: What the crawl left out, by reason.
        funnel: Stages whose verdicts are finished, in order.
        fetch: What has been fetched, or None before the first shard.
        image_bytes: Bytes in tars of blurred images.
        raw_bytes: Bytes in tars of images as fetched, which go when their shard is blurred.
    """

    name: str
    crawled: bool
    num_shards: int = 0
    num_rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    funnel: tuple[FunnelEntry, ...] = ()
    fetch: FetchOverview | None = None
    image_bytes: int = 0
    raw_bytes: int = 0

    def entry(self, stage: str) -> FunnelEntry | None:
        """Return what a stage did, or None if its verdicts are not finished."""
        return next((entry for entry in self.funnel if entry.stage == stage), None)


@dataclass(frozen=True)
class ManifestOverview:
    """The newest manifest.

    Attributes:
        digest: Of its content.
        num_images: Its rows.
        version: Of the package that wrote it.
        current: False if something that it is made from has changed since.
    """

    digest: str
    num_images: int
    version: str
    current: bool


@dataclass(frozen=True)
class DriftOverview:
    """How new images of the pool lie in clusters that were fitted without them.

    Attributes:
        is_sample: Whether only a sample of the images was compared: the pool is large.
        num_compared: Images of the pool that were looked at.
        num_new_images: Those that were not there when the centroids were fitted.
        mean_similarity: Mean cosine of new images with their centroids; None where there are none.
        fitted_mean_similarity: That of the images that were there at the fit.
        share_change: Total variation distance of the clusters' shares of images, in [0, 1].
        share_change_by_chance: What as many images drawn from those at the fit would show in the mean.
    """

    is_sample: bool
    num_compared: int
    num_new_images: int
    mean_similarity: float | None
    fitted_mean_similarity: float | None
    share_change: float | None
    share_change_by_chance: float | None

    def text(self) -> str:
        """Return one line."""
        of = f"{counted(self.num_compared, 'image')}{' of a sample' if self.is_sample else ''}"
        if not self.num_new_images:
            return f"none of {of} is newer than the centroids"
        head = f"{self.num_new_images:,} of {of} are newer than the centroids"
        if self.mean_similarity is None or self.fitted_mean_similarity is None or self.share_change is None:
            return f"{head}; there was none at the fit to compare them with"
        return (
            f"{head}: mean similarity {self.mean_similarity:.3f} ({self.fitted_mean_similarity:.3f} at the fit), "
            f"shares of clusters moved by {self.share_change:.3f} ({self.share_change_by_chance:.3f} by chance)"
        )


@dataclass(frozen=True)
class Overview:
    """How a run stands."""

    run: str
    version: str
    stages: tuple[StageOverview, ...]
    collections: tuple[CollectionOverview, ...]
    manifest: ManifestOverview | None = None
    drift: DriftOverview | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        tree = asdict(self)
        for stage, plain_stage in zip(self.stages, tree["stages"], strict=True):
            for step, plain_step in zip(stage.steps, plain_stage["steps"], strict=True):
                plain_step |= {"state": step.state, "num_units": step.num_units, "rows_per_s": step.rows_per_s}
        return tree

    def lines(self) -> list[str]:
        """Return the overview for a terminal."""
        return [
            *self._head(),
            "",
            *self._stages(),
            *(line for found in self.collections for line in _collection(found)),
        ]

    def _head(self) -> Iterator[str]:
        yield f"run       {plain(self.run)}"
        if self.manifest is None:
            yield "manifest  not finished"
        else:
            outdated = "" if self.manifest.current else "  (outdated: run again)"
            yield f"manifest  {counted(self.manifest.num_images, 'image')}, digest {self.manifest.digest}{outdated}"
        if self.drift is not None:
            yield f"clusters  {self.drift.text()}"

    def _stages(self) -> Iterator[str]:
        rows = [("stage", "step", "done", "stale", "left", "rows", "work", "rows/s")]
        notes = []
        for stage in self.stages:
            for step in stage.steps:
                rate = step.rows_per_s
                rows.append(
                    (
                        stage.name,
                        step.name,
                        f"{step.done}/{step.num_units}",
                        f"{step.stale + step.uncovered or '-'}",
                        f"{step.left or '-'}",
                        f"{step.num_rows:,}" if step.num_rows else "-",
                        took(step.seconds) if step.seconds else "-",
                        "-" if rate is None else f"{rate:,.0f}",
                    )
                )
                notes += step_notes(step)
        yield from _aligned(rows, left=2)
        yield from (f"  {note}" for note in notes)


def step_notes(step: StepOverview) -> list[str]:
    """Return what there is to say about a step beyond its numbers."""
    notes = []
    if step.stale:
        what = ", ".join(step.changed) or "other inputs"
        fate = "kept until `--redo` names it" if step.kept else "made again by the next run"
        notes.append(f"{step.name}: {counted(step.stale, 'unit')} made with other {what}; {fate}")
    if step.uncovered:
        notes.append(f"{step.name}: {counted(step.uncovered, 'unit')} may lack rows that are kept now")
    if step.problem:
        notes.append(f"{step.name}: cannot tell what is stale: {plain(step.problem)}")
    notes += [f"{step.name}: {plain(note)}" for note in step.notes]
    return notes


def _collection(found: CollectionOverview) -> Iterator[str]:
    yield ""
    if not found.crawled:
        yield f"{found.name}: not crawled yet"
        return
    tars = [f"{size(found.image_bytes)} of images"] if found.image_bytes else []
    tars += [f"{size(found.raw_bytes)} as fetched"] if found.raw_bytes else []
    shards = counted(found.num_shards, "shard")
    yield f"{found.name}: {counted(found.num_rows, 'row')} in {shards}{''.join(f', {text}' for text in tars)}"
    yield from _aligned(
        [("stage", "in", "out", "rejected")]
        + [
            (entry.stage, f"{entry.num_in:,}", f"{entry.num_out:,}", _reasons(entry.rejected)) for entry in found.funnel
        ],
        left=1,
        last_left=True,
        indent="  ",
    )
    if found.skipped:
        yield f"  left out by the crawl: {_reasons(found.skipped)}"
    if found.fetch is not None:
        yield from _fetched(found.fetch, is_whole=found.fetch.num_rows == found.num_rows)


def _fetched(found: FetchOverview, is_whole: bool) -> Iterator[str]:
    yield f"  fetched{'' if is_whole else ' so far'}: {counted(found.num_rows, 'link')}"
    outcomes = [("image", found.num_kept), *found.rejected.items()]
    rows = [(plain(reason), f"{count:,}", share(count, found.num_rows)) for reason, count in outcomes]
    yield from _aligned(rows, left=1, indent="    ")
    if found.num_retried:
        yield f"  tried again: {found.num_retried:,}, of which {found.num_recovered:,} became images"
    if found.failing:
        yield "  failures by host:" + ("" if found.exact_hosts else " (at least)")
        failing = [
            (plain(host.host) or "local", f"{host.num_failed:,}", f"of {host.num_rows:,}", _reasons(host.rejected))
            for host in found.failing[:_SHOWN_HOSTS]
        ]
        yield from _aligned(failing, left=1, last_left=True, indent="    ")


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{plain(reason)} {count:,}" for reason, count in counts.items())


def _aligned(rows: Sequence[tuple[str, ...]], left: int, last_left: bool = False, indent: str = "") -> Iterator[str]:
    """Yield rows as columns: the first ``left`` flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left or (last_left and column == len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()
