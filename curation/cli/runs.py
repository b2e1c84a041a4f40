"""``curate run`` and the commands that look at a run or change it."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.cli.options import add_command, add_set, agreed, positive, share, whole
from curation.cli.stop import Stop, interruptible
from curation.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from curation.pipelines.context import Context
    from curation.pipelines.driver import Runner
    from curation.pipelines.plan import Plan
    from curation.pipelines.worker_process import Spawner

STAGES = "crawl fetch pca_hash nsfw faces sscd dedup embed index cluster retrieve manifest"


def add_run(commands: Any) -> None:
    """Declare ``curate run``."""
    run = add_command(commands, "run", _run, "bring a run up to a stage; do only what is left or stale")
    run.add_argument("--config", help="settings (YAML); default: those of the run")
    run.add_argument(
        "--run", help="folder or URL of the run (file, s3://, gs://, memory://); default: runs/<config name>"
    )
    run.add_argument("--stage", default="manifest", help=f"up to and including this one of: {STAGES}")
    run.add_argument("--only", action="store_true", help="refuse to run anything before --stage")
    run.add_argument("--redo", action="append", default=[], metavar="STAGE", help="do a finished stage again")
    run.add_argument("--yes", action="store_true", help="agree to what --redo costs")
    run.add_argument(
        "--refit", action="store_true", help="fit PCA, index and centroids again; what used them becomes stale"
    )
    run.add_argument(
        "--retry",
        action="append",
        default=[],
        metavar="REASONS",
        help="try links that failed again, in new shards: timeout,http_5xx, or all that may be better now",
    )
    run.add_argument("--extend", action="store_true", help="read the inputs again, and add the links that are new")
    run.add_argument(
        "--runner",
        choices=("local", "threads", "ray"),
        default="local",
        help="processes of this machine, threads of this process (for debugging), or Ray",
    )
    run.add_argument("--ray-address", help="join this Ray cluster (auto, or ray://host:10001); implies --runner ray")
    run.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="shards at a time, here")
    add_set(run)


def add_upkeep(commands: Any) -> None:
    """Declare the commands that look at a run or change it."""
    status = add_command(commands, "status", _status, "what is done, stale and left; rows kept and rejected by reason")
    status.add_argument("--run", required=True, help="folder or URL of the run")
    status.add_argument("--json", action="store_true", help="as JSON")

    report = add_command(commands, "report", _report, "write report.html into the run and print its path")
    report.add_argument("--run", required=True, help="folder or URL of the run")

    audit = add_command(commands, "audit", _audit, "search the stored images for faces again; 1 if anything is found")
    audit.add_argument("--run", required=True, help="folder or URL of the run")
    audit.add_argument("--weights", help="another detector than the run's: a name of `curate models list`, or a path")
    audit.add_argument(
        "--min-side-px", type=float, default=20.0, help="smaller faces do not count (default: %(default)s)"
    )

    purge = add_command(commands, "purge", _purge, "delete images that nsfw or a list of blocked_hashes rejects since")
    purge.add_argument("--run", required=True, help="folder or URL of the run")
    add_set(purge)
    purge.add_argument("--yes", action="store_true", help="agree to what is deleted")

    config = add_command(commands, "config", _config, "check settings and print them with every default")
    config.add_argument("--config", required=True, help="settings (YAML)")
    add_set(config)

    calibrate = add_command(
        commands, "calibrate", _calibrate, "suggest a threshold from planted copies of your own images"
    )
    calibrate.add_argument("what", choices=("dedup",), help="dedup: the cosine above which two images are copies")
    calibrate.add_argument("--run", help="folder or URL of a run: its pool, its settings")
    calibrate.add_argument("--config", help="settings (YAML); default: those of the run, else the defaults")
    calibrate.add_argument("--images", help="a folder, tar or Parquet file instead of the run's pool")
    calibrate.add_argument("--size", type=positive, default=500, help="images of the sample (default: %(default)s)")
    calibrate.add_argument("--precision", type=share, default=0.99, help="wanted precision (default: %(default)s)")
    calibrate.add_argument(
        "--pool-size", type=positive, help="images of the pool the precision is wanted in; default: of what is sampled"
    )
    calibrate.add_argument("--seed", type=whole, default=0, help="of the sample and the edits (default: %(default)s)")
    calibrate.add_argument("--output", help="folder of the results; default: RUN/calibration/dedup")
    add_set(calibrate)


def add_demo(commands: Any) -> None:
    """Declare ``curate demo``."""
    demo = add_command(commands, "demo", _demo, "crawl, curate and train on a small website served on this machine")
    demo.add_argument("--folder", default="runs/demo", help="where everything goes (default: %(default)s)")
    demo.add_argument(
        "--port", type=int, default=0, help="port of the website; default: a free one, kept for next time"
    )
    demo.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="shards at a time")


def _run(options: argparse.Namespace) -> int:
    from curation.pipelines.worker_process import Spawner

    spawner = Spawner()
    if options.runner == "local" and options.ray_address is None:
        spawner.start_ahead()
    return _bring_up(options, spawner)


def _bring_up(options: argparse.Namespace, spawner: "Spawner") -> int:
    from curation.pipelines.driver import Request, bring_up, redo_cost
    from curation.pipelines.publish import publish
    from curation.progress.run import reporter

    context, plan = _open(options)
    redo = frozenset(options.redo)
    for stage in redo:
        plan.check_stage(stage)
    plan.check_stage(options.stage)
    if redo and not agreed(redo_cost(context, plan, redo, options.stage), options.yes):
        return 1
    retry = tuple(name for names in options.retry for name in names.split(","))
    request = Request(options.stage, options.only, redo, options.refit, retry, options.extend)
    with interruptible(context), _runner(options, context, spawner) as runner, reporter(sys.stderr) as report:
        bring_up(context, plan, request, runner, report)
    published = publish(context)
    if published is not None and options.stage == "manifest":
        _print_funnel(published)
        print(f"manifest  {context.run.url.rstrip('/')}/manifest.parquet")
        print(f"images    {published['num_images']}")
        print(f"digest    {published['digest']}")
        rejected = [entry["rejected"] for entries in published["funnel"].values() for entry in entries[-1:]]
        if any("blocklisted" in reasons for reasons in rejected):
            print(
                "curate: warning: images that are on a list now are still stored; `curate purge` deletes them",
                file=sys.stderr,
            )
        if not published["num_images"]:
            print("curate: warning: the manifest is empty; the funnel above says where images went", file=sys.stderr)
    return 0


def _status(options: argparse.Namespace) -> int:
    from curation.pipelines.overview import overview

    context, plan = _open(options)
    found = overview(context, plan)
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print("\n".join(found.lines()))
    return 0


def _report(options: argparse.Namespace) -> int:
    from curation.pipelines.overview import write_report

    context, plan = _open(options)
    print(write_report(context, plan))
    return 0


def _config(options: argparse.Namespace) -> int:
    from curation import settings
    from curation.config import RunConfig

    print(settings.dump(settings.load(RunConfig, options.config, options.set)), end="")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from curation.pipelines.audit import audit

    context, _ = _open(options)
    found = audit(context, options.weights, options.min_side_px)
    share = found.num_found_again / max(1, found.num_hidden)
    print(f"images that had a face        {found.num_images}")
    print(f"faces hidden, >= {options.min_side_px:g} px        {found.num_hidden}")
    print(f"of these found again          {found.num_found_again} ({share:.2%})")
    print(f"detections in these images    {found.num_detections}")
    print(f"stored bytes that no row owns {found.num_unsafe}")
    return 0 if found.num_found_again == 0 and found.num_unsafe == 0 else 1


def _calibrate(options: argparse.Namespace) -> int:
    from curation.calibrate.dedup import Request, calibrate_dedup
    from curation.progress.counter import counter

    if options.run is None and options.images is None:
        raise UsageError("give --run FOLDER (a run that has come to faces), --images PATH, or both")
    if options.output is None and "://" in (options.run or ""):
        raise UsageError("give --output FOLDER: results of a run that is not on this machine need a place")
    context, plan = _open(options) if options.run or options.config else _of_defaults(options)
    output = Path(options.output or f"{options.run or '.'}/calibration/dedup")
    request = Request(output, options.images, options.size, options.precision, options.seed, options.pool_size)
    with interruptible(context), counter(sys.stderr, "images") as progress:
        found = calibrate_dedup(context, plan, request, progress)
    print("\n".join(found.lines))
    return 0


def _purge(options: argparse.Namespace) -> int:
    from curation.pipelines.discard import discard, listed
    from curation.pipelines.driver import Request, bring_up
    from curation.pipelines.local_runner import LocalRunner
    from curation.pipelines.publish import publish
    from curation.pipelines.purge import purge, rejected_but_stored
    from curation.progress.run import reporter

    context, plan = _open(options)
    rejected = sum(int(rows.sum()) for _, _, rows in rejected_but_stored(context))
    num_listed = sum(len(each.found) for each in listed(context))
    costs = [f"the bytes of {rejected} images that nsfw rejects now"] if rejected else []
    if num_listed:
        costs.append(f"all that is known of {num_listed} images that are on a list of fetch.blocked_hashes now")
    if not agreed(costs, options.yes, "purge deletes"):
        return 1
    is_published = context.run.exists("manifest.json")
    with context.run.lease():
        purged = purge(context) + discard(context, plan)
    if is_published:  # tars have moved: the manifest has to say where
        with reporter(sys.stderr) as report:
            bring_up(context, plan, Request(), LocalRunner(1), report)
        publish(context)
    print(f"purged {purged} images")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from curation.demo.demo import run_demo
    from curation.progress.run import reporter

    stop = Stop()
    with stop, reporter(sys.stderr) as report:
        result = run_demo(Path(options.folder), options.port, options.workers, stop.is_set, report)
    print("\n".join(result.lines))
    return 0 if result.passed else 1


def _open(options: argparse.Namespace) -> "tuple[Context, Plan]":
    """Return the run and its plan; settings come from ``--config``, else from the run itself."""
    from curation import settings
    from curation.config import RunConfig, absolute
    from curation.pipelines.context import Context
    from curation.pipelines.lvd142m import build_plan
    from curation.store import Run

    config_path = getattr(options, "config", None)
    if options.run is None and config_path is None:
        raise UsageError("give --run FOLDER (a run that exists), or --config FILE (to start one)")
    run = Run(options.run or f"runs/{Path(config_path or '').stem}")
    overrides = getattr(options, "set", [])
    if config_path is not None:
        config = settings.load(RunConfig, config_path, overrides)
    elif run.exists("run.yaml"):
        import yaml

        try:
            tree = yaml.safe_load(run.read_bytes("run.yaml"))
        except yaml.YAMLError as error:
            raise ConfigError([f"{run.url}/run.yaml: is not valid YAML; give --config FILE"]) from error
        config = settings.parse(RunConfig, *settings.overridden(tree, f"{run.url}/run.yaml", overrides))
    else:
        raise ConfigError([f"{run.url}: is no run yet (it has no run.yaml); start one with --config FILE"])
    config = absolute(config, Path.cwd())
    return Context(run, config), build_plan(config)


def _of_defaults(options: argparse.Namespace) -> "tuple[Context, Plan]":
    """Return a run in memory with the default settings, for commands that need no run."""
    from curation import settings
    from curation.config import RunConfig
    from curation.pipelines.context import Context
    from curation.pipelines.lvd142m import build_plan
    from curation.store import Run

    config = settings.parse(RunConfig, *settings.overridden({}, "defaults", options.set))
    return Context(Run("memory://calibrate"), config), build_plan(config)


@contextmanager
def _runner(options: argparse.Namespace, context: "Context", spawner: "Spawner | None" = None) -> "Iterator[Runner]":
    """Yield the runner that the options ask for; its workers or its cluster end with the block."""
    in_memory = context.run.url.startswith("memory:")
    if options.ray_address is not None or options.runner == "ray":
        if in_memory:
            raise UsageError("a run in memory exists in one process; give --run a folder or bucket for Ray")
        from curation.pipelines.ray_runner import RayRunner

        with closing(RayRunner(options.ray_address)) as ray_runner:
            yield ray_runner
    elif options.runner == "threads" or in_memory:
        from curation.crashes import watch
        from curation.pipelines.local_runner import LocalRunner

        if not in_memory:  # a run in memory would be lost with its process
            watch().enforce_deadlines()
        yield LocalRunner(options.workers)
    else:
        from curation.pipelines.process_runner import ProcessRunner

        with closing(ProcessRunner(options.workers, spawner)) as process_runner:
            yield process_runner


def _print_funnel(summary: dict[str, Any]) -> None:
    for collection, entries in sorted(summary["funnel"].items()):
        print(f"{collection}")
        print(f"  {'stage':<10} {'in':>12} {'out':>12}  rejected")
        for entry in entries:
            reasons = ", ".join(f"{reason} {count}" for reason, count in entry["rejected"].items())
            print(f"  {entry['stage']:<10} {entry['in']:>12,} {entry['out']:>12,}  {reasons}".rstrip())
