"""Look at a run without touching it: how far it is, what it rejected, and the page that shows it.

Works on a run in any state, also while another process writes it.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from curation import __version__, settings
from curation.errors import InputError, WeightsError
from curation.pipelines.clusters import clusters, drift, embeddings
from curation.pipelines.components import components
from curation.pipelines.context import Context
from curation.pipelines.freshness import assess, folders
from curation.pipelines.freshness import collections as collections_of
from curation.pipelines.plan import Plan, Step
from curation.pipelines.seed_sets import seed_rows
from curation.pipelines.tallies import steadily, tally
from curation.pipelines.units import crawl_marker
from curation.report.data import ReportData, WeightsUse
from curation.report.html import render
from curation.report.overview import ManifestOverview, Overview, StageOverview, StepOverview
from curation.stages.manifest import SUMMARY_FILE, ManifestStage
from curation.store import Marker

T = TypeVar("T")

REPORT_FILE = "report.html"
MAP_FILE = "embedding_map.png"


def overview(context: Context, plan: Plan) -> Overview:
    """Return how a run stands."""
    steps = {step.name: _step(context, plan, step) for step in plan.steps}
    stages = tuple(
        StageOverview(stage, tuple(steps[step.name] for step in plan.steps if step.stage == stage))
        for stage in plan.stages
    )
    names = [name for kind in ("pool", "seeds", "references") for name in context.collections(kind)]
    return Overview(
        run=context.run.url,
        version=__version__,
        stages=stages,
        collections=tuple(tally(context, plan, name) for name in names),
        manifest=_manifest(context, steps[ManifestStage.name].state == "done"),
        drift=drift(context),
    )


def report_data(context: Context, plan: Plan) -> ReportData:
    """Return what the page shows; thumbnails are made from blurred images only."""
    found = overview(context, plan)
    return ReportData(
        title=context.run.url.rstrip("/").rpartition("/")[2] or context.run.url,
        overview=found,
        config=settings.dump(context.config),
        accept_licenses=context.config.accept_licenses,
        weights=_weights(context, plan),
        seeds=seed_rows(context, plan, found),
        components=components(context, plan),
        threshold=context.config.dedup.threshold,
        clusters=clusters(context, plan),
        embedding_map=embeddings(context),
    )


def write_report(context: Context, plan: Plan) -> str:
    """Write the page and the map of the embeddings into the run; return where the page lies."""
    report = report_data(context, plan)
    page = render(report)
    if report.embedding_map is not None:
        context.run.write_bytes(MAP_FILE, report.embedding_map.png)
    context.run.write_bytes(REPORT_FILE, page.encode("utf-8", "replace"))
    return f"{context.run.url.rstrip('/')}/{REPORT_FILE}"


class _Crawled(Context):
    """The same run without the collections that have not been crawled; what is made once is shared."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.run, context.config, context.should_stop)
        self._whole = context

    def once(self, key: str, make: Callable[[], T]) -> T:
        return self._whole.once(key, make)

    def collections(self, kind: str) -> list[str]:
        return [name for name in super().collections(kind) if _is_crawled(self, name)]


def _is_crawled(context: Context, collection: str) -> bool:
    return context.run.artefact_marker(crawl_marker(collection)) is not None


def _step(context: Context, plan: Plan, step: Step) -> StepOverview:
    markers = _markers(context, step)
    counts = {"done": 0, "stale": 0, "uncovered": 0, "left": 0}
    changed: set[str] = set()
    problem = ""
    notes: list[str] = []
    missing = [
        name for name in collections_of(context, step) if step.kind != "crawl" and not _is_crawled(context, name)
    ]
    if step.kind == "reduce" and missing:  # it cannot be made now; if it was, then from other collections
        counts["stale" if markers else "left"] = 1
        changed.update(f"collection {name}" for name in missing if markers)
    else:
        try:
            for found in assess(_Crawled(context) if missing else context, plan, step):
                counts[found.state] += 1
                changed.update(found.changed)
            notes = step.notes(context.config)
        except (InputError, WeightsError) as error:  # weights or an exclusion list that this machine lacks
            counts = dict.fromkeys(counts, 0) | {"done": len(markers), "left": 0 if markers else 1}
            changed.clear()
            problem = str(error)
        else:
            counts["left"] += len(missing)
    return StepOverview(
        step.name,
        step.kind,
        **counts,
        changed=tuple(sorted(changed)),
        kept=step.protected and not any(name.startswith("table ") for name in changed),
        num_rows=sum(marker.num_rows for marker in markers),
        seconds=sum(marker.seconds for marker in markers),
        problem=problem,
        notes=tuple(notes),
    )


def _markers(context: Context, step: Step) -> list[Marker]:
    """Return one marker a unit: seconds of a reduce's shards count from its start, so only its own marker counts."""
    if step.kind == "reduce":
        names = [step.name]
    elif step.kind == "crawl":
        names = [crawl_marker(collection) for collection in collections_of(context, step)]
    else:
        found = (context.run.markers(folder, step.name) for folder in folders(context, step))
        return [marker for shards in found for marker in shards.values()]
    return [marker for marker in map(context.run.artefact_marker, names) if marker is not None]


def _summary(context: Context) -> dict[str, Any] | None:
    def read() -> dict[str, Any] | None:
        marker = context.run.artefact_marker(ManifestStage.name)
        if marker is None:
            return None
        summary: dict[str, Any] = json.loads(context.run.read_bytes(marker.files[SUMMARY_FILE]))
        return summary

    return steadily(read)


def _manifest(context: Context, current: bool) -> ManifestOverview | None:
    summary = _summary(context)
    if summary is None:
        return None
    return ManifestOverview(summary["digest"], summary["num_images"], summary["version"], current)


def _weights(context: Context, plan: Plan) -> tuple[WeightsUse, ...]:
    stages: dict[str, dict[str, None]] = {}
    for step in plan.steps:
        for name in step.weights(context.config):
            stages.setdefault(name, {})[step.stage] = None
    uses = []
    for name, used_by in stages.items():
        try:
            weights = context.weights(name)
            uses.append(WeightsUse(name, tuple(used_by), weights.license, weights.sha256))
        except WeightsError:  # a report is also made where the models are not installed
            uses.append(WeightsUse(name, tuple(used_by), "not installed here", ""))
    return tuple(uses)
