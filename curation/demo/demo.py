"""The demo from end to end: build and serve the website, curate it, look for faces, score, train, report."""

import json
import math
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from curation import settings
from curation.config import RunConfig
from curation.demo.score import score
from curation.demo.server import serve
from curation.demo.site import build_site
from curation.demo.truth import Truth
from curation.errors import TrainError
from curation.pipelines.audit import audit
from curation.pipelines.context import Context
from curation.pipelines.driver import Event, Request, RowsDone, StepEnded, StepStarted, bring_up
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.outcomes import outcomes
from curation.pipelines.overview import write_report
from curation.pipelines.plan import Step
from curation.pipelines.publish import publish
from curation.store import Run

RESULT_FILE = "demo.json"  # what was found out about the manifest whose digest it names


@dataclass(frozen=True)
class DemoResult:
    """How the demo went.

    Attributes:
        passed: Whether all that it promises came true.
        lines: What to tell people.
    """

    passed: bool
    lines: tuple[str, ...]


def run_demo(
    folder: Path,
    port: int,
    num_workers: int,
    should_stop: Callable[[], bool],
    on_event: Callable[[Event], None],
) -> DemoResult:
    """Run the demo in a folder; what an earlier run finished there is not done again.

    Raises:
        KeyboardInterrupt: ``should_stop`` said so.
        CurationError: A stage failed.
    """
    start = time.monotonic()
    truth = build_site(folder / "site")
    with serve(folder / "site", port) as base_url:
        config = demo_config(truth, base_url, folder / "site")
        context, plan = Context(Run(folder / "run"), config, should_stop), build_plan(config)
        bring_up(context, plan, Request(), LocalRunner(num_workers), on_event)
    summary = publish(context) or {}
    rows = pa.concat_tables(list(outcomes(context, plan, "pool")))
    found = score(truth, base_url, rows)
    audit = _audited(context, summary["digest"])
    train = _trained(context, folder / "train", should_stop, on_event)
    report = write_report(context, plan)
    planted = _detected(context, truth, base_url)
    passed = (
        found.passed
        and planted[0] == planted[1]
        and not audit["faces_left"]
        and not audit["unsafe_bytes"]
        and train["passed"]
    )
    lines = [
        *_funnel_lines(summary),
        "",
        *found.lines(),
        f"planted faces detected: {planted[0]} of {planted[1]}",
        f"faces found again in the {audit['images']} stored images that had one: {audit['faces_left']}",
        f"stored images that decoding or NSFW rejects, or not blurred: {audit['unsafe_bytes']}",
        train["line"],
        "",
        f"manifest    {folder / 'run' / 'manifest.parquet'}  ({summary['num_images']} images)",
        f"digest      {summary['digest']}",
        f"report      {report}",
        f"checkpoint  {train['checkpoint']}",
        f"{'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s, peak memory {_peak_gb():.1f} GB",
    ]
    return DemoResult(passed, tuple(lines))


def demo_config(truth: Truth, base_url: str, site: Path) -> RunConfig:
    """Return ``configs/demo.yaml`` with the website's pages and the folders of its seed and reference sets."""
    source = resources.files("curation").joinpath("configs/demo.yaml")
    tree: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    tree["pool"] = {"inputs": [{"kind": "pages", "urls": list(truth.page_urls(base_url))}]}
    for kind in ("seeds", "references"):
        for name, entry in tree[kind].items():
            entry["inputs"] = [{"kind": "folder", "path": str((site / kind / name).resolve())}]
    return settings.parse(RunConfig, tree, "configs/demo.yaml")


def _audited(context: Context, digest: str) -> dict[str, Any]:
    """Search the run's images for faces again, and its tars for bytes that should be gone; once for a manifest."""
    known = _known(context, digest)
    if known is not None:
        return known
    found = audit(context)
    result = {
        "digest": digest,
        "images": found.num_images,
        "faces_left": found.num_detections,
        "unsafe_bytes": found.num_unsafe,
    }
    context.run.write_bytes(RESULT_FILE, json.dumps(result).encode())
    return result


def _detected(context: Context, truth: Truth, base_url: str) -> tuple[int, int]:
    """Return how many of the photos with a planted face had a face blurred, and how many there are."""
    urls = {item.url(base_url) for item in truth.of("face")}
    found = 0
    for shard in context.run.markers("pool", "faces"):
        shown = context.run.read_table("pool", "crawl", shard, ["url"]).column(0).to_pylist()
        counts = context.run.read_table("pool", "faces", shard, ["num_faces"]).column(0).to_pylist()
        found += sum(url in urls and bool(count) for url, count in zip(shown, counts, strict=True))
    return found, len(urls)


def _known(context: Context, digest: str) -> dict[str, Any] | None:
    try:
        known = json.loads(context.run.read_bytes(RESULT_FILE))
    except (FileNotFoundError, ValueError):
        return None
    return known if isinstance(known, dict) and known.get("digest") == digest else None


def _trained(
    context: Context, output: Path, should_stop: Callable[[], bool], on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Train a tiny DINOv2 on the manifest, or go on with what an interrupted demo began."""
    from curation.dinov2.config import TrainConfig
    from curation.dinov2.train import train

    source = resources.files("curation").joinpath("configs/dinov2/tiny.yaml")
    with resources.as_file(source) as path:
        config = settings.load(TrainConfig, path)
    step = Step("train", "train", "reduce", 1, (), lambda context: None)
    manifest = context.run.path("manifest.parquet")
    start = time.monotonic()
    on_event(StepStarted(step, 1, config.schedule.steps, 0))

    def go() -> Any:
        return train(
            manifest,
            config,
            output,
            resume=True,
            device="cpu",
            on_step=lambda _: on_event(RowsDone(1)),
            should_stop=should_stop,
        )

    try:
        result = go()
    except TrainError:  # the folder holds the training of another manifest or configuration
        if not (output / "log.jsonl").exists():
            raise
        shutil.rmtree(output)
        result = go()
    if not result.finished:
        raise KeyboardInterrupt
    on_event(StepEnded(step, False, time.monotonic() - start))
    return _learned(result, config.heads.dino.prototypes)


def _learned(result: Any, num_prototypes: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in result.log.read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    entropy = lines[-1]["teacher_entropy"]
    most = math.log(num_prototypes)
    passed = last < first and 0.02 * most < entropy < 0.98 * most
    return {
        "passed": passed,
        "checkpoint": result.teacher,
        "line": (
            f"training: {result.steps} steps, mean loss of the first 10 {first:.3f}, of the last 10 {last:.3f}; "
            f"teacher entropy {entropy:.2f} of at most {most:.2f}"
        ),
    }


def _funnel_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    for collection, entries in sorted(summary["funnel"].items()):
        lines.append(collection)
        for entry in entries:
            reasons = ", ".join(f"{reason} {count}" for reason, count in entry["rejected"].items())
            lines.append(f"  {entry['stage']:<10} in {entry['in']:>6} out {entry['out']:>6}  {reasons}".rstrip())
    return lines


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
