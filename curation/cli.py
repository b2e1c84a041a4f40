"""The command line: ``curate``. The only module that parses arguments or prints.

Exit codes: 0 done; 1 failed; 2 wrong use (arguments or settings); 130 interrupted, the next run goes on.
What is heavy (torch, faiss, ray) is imported by the command that needs it, so that ``--help`` answers at once.
"""

import argparse
import atexit
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from curation.errors import ConfigError, CurationError, UsageError
from curation.processes import leave_pandas_out

if TYPE_CHECKING:
    from curation.dinov2.train import TrainResult
    from curation.pipelines.context import Context
    from curation.pipelines.driver import Runner
    from curation.pipelines.plan import Plan
    from curation.pipelines.worker_process import Spawner

_STARTED_AHEAD = 2  # workers that get ready while this process does; not all, there may be nothing to do
_STAGES = "crawl fetch pca_hash nsfw faces sscd dedup embed index cluster retrieve manifest"
_EXAMPLES = """examples:
  curate demo                                        see everything work on a small website
  curate run --config my.yaml --run runs/my          crawl to manifest; run again to go on
  curate run --run runs/my --stage dedup --set dedup.threshold=0.7
  curate status --run runs/my                        what is done, stale and left
  curate train --manifest runs/my/manifest.parquet --config configs/dinov2/tiny.yaml --output runs/my/train
"""
_TASKS = "knn linear logistic spectrum pictures"
_EVALUATE = """the data:
  a Parquet file with the columns image (bytes or {bytes, path}), label, and split (train or test);
  or two of them, --data train.parquet --test test.parquet;
  or a folder with train/CLASS/*.jpg and test/CLASS/*.jpg. Other names: --set data.label_column=fine_label

the tasks:
  knn        each test image asks its k nearest training images for their class; learns nothing, so trust it first
  linear     linear classifiers on frozen features: 13 learning rates, 1 or 4 last blocks, with and without patches;
             the best on held-out training images is reported
  logistic   logistic regression on class tokens
  spectrum   RankMe (how many directions the features use; higher is better) and α-ReQ (how fast the rest falls off;
             near 1 is best); need no labels
  pictures   where the class token looks, and what patches look alike, as PNG; need no labels

Two rows always stand beside: the same network with random weights, and raw pixels. Features that do not beat both
have learned nothing that helps here.

examples:
  curate evaluate --run runs/my/train --data cifar10.parquet --set crop_share=1.0
  curate evaluate --run runs/my/train --data photos/ --tasks spectrum pictures      no labels at hand
  curate evaluate --backbone dinov2-vits14 --data imagenet/ --set data.test_split=val --set data.max_train=100000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on shared cores
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except UsageError as error:
        print(_prefixed(str(error)), file=sys.stderr)
        return 2
    except CurationError as error:
        print(_prefixed(str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("curate: interrupted; what was finished is kept, and the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: argparse.Namespace) -> int:
    from curation.pipelines.worker_process import Spawner

    with closing(Spawner()) as spawner:
        if options.runner == "local" and options.ray_address is None:
            spawner.start_ahead(min(options.workers, _STARTED_AHEAD))
        return _bring_up(options, spawner)


def _bring_up(options: argparse.Namespace, spawner: "Spawner") -> int:
    from curation.pipelines.driver import Request, bring_up, redo_cost
    from curation.pipelines.publish import publish
    from curation.progress import reporter

    context, plan = _open(options)
    redo = frozenset(options.redo)
    for stage in redo:
        plan.check_stage(stage)
    plan.check_stage(options.stage)
    if redo and not _agreed(redo_cost(context, plan, redo, options.stage), options.yes):
        return 1
    retry = tuple(name for names in options.retry for name in names.split(","))
    request = Request(options.stage, options.only, redo, options.refit, retry, options.extend)
    with _interruptible(context), _runner(options, context, spawner) as runner, reporter(sys.stderr) as report:
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
    from curation.progress import Counter

    if options.run is None and options.images is None:
        raise UsageError("give --run FOLDER (a run that has come to faces), --images PATH, or both")
    if options.output is None and "://" in (options.run or ""):
        raise UsageError("give --output FOLDER: results of a run that is not on this machine need a place")
    context, plan = _open(options) if options.run or options.config else _of_defaults(options)
    output = Path(options.output or f"{options.run or '.'}/calibration/dedup")
    request = Request(output, options.images, options.size, options.precision, options.seed, options.pool_size)
    with _interruptible(context), Counter(sys.stderr, "images") as progress:
        found = calibrate_dedup(context, plan, request, progress)
    print("\n".join(found.lines))
    return 0


def _purge(options: argparse.Namespace) -> int:
    from curation.pipelines.discard import discard, listed
    from curation.pipelines.driver import Request, bring_up
    from curation.pipelines.local_runner import LocalRunner
    from curation.pipelines.publish import publish
    from curation.pipelines.purge import purge, rejected_but_stored
    from curation.progress import reporter

    context, plan = _open(options)
    rejected = sum(int(rows.sum()) for _, _, rows in rejected_but_stored(context))
    num_listed = sum(len(each.found) for each in listed(context))
    costs = [f"the bytes of {rejected} images that nsfw rejects now"] if rejected else []
    if num_listed:
        costs.append(f"all that is known of {num_listed} images that are on a list of fetch.blocked_hashes now")
    if not _agreed(costs, options.yes, "purge deletes"):
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


def _models_list(options: argparse.Namespace) -> int:
    from curation.models.weights import locate, registered

    found = [(entry, locate(entry)) for entry in registered()]
    if getattr(options, "json", False):
        rows = [
            {
                "name": entry.name,
                "role": entry.role,
                "license": entry.license,
                "non_commercial": entry.non_commercial,
                "citation": entry.citation,
                "url": entry.url or None,
                "state": where.state,
                "path": None if where.path is None else str(where.path),
            }
            for entry, where in found
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for entry, where in found:
        print(f"{entry.name:<20} {entry.role:<6} {entry.license:<30} {where.state:<13} {where.path or where.advice}")
    return 0


def _models_fetch(options: argparse.Namespace) -> int:
    from curation.download_progress import download_reporter
    from curation.errors import WeightsError
    from curation.models.weights import fetch, locate, registered

    names, failed = [options.name], False
    if options.name == "all":
        if options.sha256 or options.trust_first_download:
            raise UsageError("--sha256 and --trust-first-download are for one name")
        states = {entry.name: locate(entry) for entry in registered()}
        names = [name for name, where in states.items() if where.state in ("installed", "cached", "not fetched")]
        for name in states.keys() - set(names):
            print(f"curate: weights {name} skipped: {states[name].advice}", file=sys.stderr)
    for name in names:
        try:
            with download_reporter(sys.stderr) as progress:
                weights = fetch(
                    name,
                    options.accept_license,
                    sha256=options.sha256 or "",
                    trust_first_download=options.trust_first_download,
                    progress=progress,
                )
        except WeightsError as error:
            failed = True
            print(_prefixed(str(error)), file=sys.stderr)
        else:
            print(f"{weights.name}  {weights.sha256}  {weights.path}", flush=True)
    return 1 if failed else 0


def _models_verify(options: argparse.Namespace) -> int:
    from curation.models.verify import verify

    results = verify(options.name)
    for result in results:
        print(f"{'ok' if result.ok else 'BAD':<4} {result.name}  {result.detail}")
    return 0 if results and all(result.ok for result in results) else 1


def _train(options: argparse.Namespace) -> int:
    from curation import settings
    from curation.dinov2.config import TrainConfig
    from curation.dinov2.train import train
    from curation.train_progress import train_reporter

    workers = [] if options.workers is None else [f"ray.workers={options.workers}"]
    config = settings.load(TrainConfig, options.config, [*options.set, *workers])
    run: Callable[..., TrainResult] = train
    if workers or options.ray_address:
        from curation.pipelines.ray_train import train_on_ray

        run = partial(train_on_ray, address=options.ray_address)
    stop = _Stop()
    with stop, train_reporter(sys.stderr) as on_step:
        result = run(
            None if options.manifest is None else _manifest_of(options.manifest),
            config,
            Path(options.output),
            resume=options.resume,
            device=options.device,
            on_step=on_step,
            should_stop=stop.is_set,
        )
    if not result.finished:
        raise KeyboardInterrupt
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one speaks
        return 0
    print(f"teacher     {result.teacher}")
    print(f"checkpoint  {result.checkpoint}")
    print(f"log         {result.log}")
    return 0


def _export_model(options: argparse.Namespace) -> int:
    from curation.dinov2.export import FORMATS, at_size, read_backbone

    backbone, config, step = read_backbone(Path(options.run), options.network)
    if options.image_px is not None:
        backbone = at_size(backbone, options.image_px)
    output = Path(options.output)
    FORMATS[options.format](backbone, config, step, output)
    print(f"{options.format}  {output}  ({options.network} after {step} steps)")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from curation.dinov2.device import device_of
    from curation.dinov2.evaluate.backbones import load_backbone
    from curation.dinov2.evaluate.config import EvaluateConfig
    from curation.dinov2.evaluate.evaluation import evaluate
    from curation.dinov2.evaluate.tables import lines
    from curation.progress import Counter
    from curation.settings import overridden, parse

    tree: dict[str, Any] = {"data": {"path": options.data, "test_path": options.test}}
    if options.tasks:
        tree["tasks"] = options.tasks
    config = parse(EvaluateConfig, *overridden(tree, "curate evaluate", options.set))
    device = device_of(options.device)
    trained, random = load_backbone(
        options.run or options.backbone,
        device,
        config.seed,
        network=options.network,
        accept_licenses=tuple(options.accept_license),
    )
    output = Path(options.output or f"{options.run or '.'}/evaluation")
    with Counter(sys.stderr, "images") as progress:
        found = evaluate(trained, random, config, output, device, progress)
    print("\n".join(lines(found)))
    print(*(f"wrote {path}" for path in found.files), sep="\n")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from curation.demo.demo import run_demo
    from curation.progress import reporter

    stop = _Stop()
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


class _Stop:
    """Ctrl-C and SIGTERM ask for a clean end; a second one ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        print("curate: stopping; press Ctrl-C again to stop at once", file=sys.stderr)


def _interruptible(context: "Context") -> _Stop:
    stop = _Stop()
    context.should_stop = stop.is_set
    return stop


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


def _agreed(costs: Sequence[str], yes: bool, what: str = "--redo throws this away and does it again") -> bool:
    """Say what is about to be lost, and ask."""
    if not costs:
        return True
    print(f"{what}:", *(f"  {line}" for line in costs), sep="\n", file=sys.stderr)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("add --yes to agree")
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


def _print_funnel(summary: dict[str, Any]) -> None:
    for collection, entries in sorted(summary["funnel"].items()):
        print(f"{collection}")
        print(f"  {'stage':<10} {'in':>12} {'out':>12}  rejected")
        for entry in entries:
            reasons = ", ".join(f"{reason} {count}" for reason, count in entry["rejected"].items())
            print(f"  {entry['stage']:<10} {entry['in']:>12,} {entry['out']:>12,}  {reasons}".rstrip())


def _manifest_of(path: str) -> str:
    """Return the manifest of a run's folder, or the file itself."""
    return path if path.endswith(".parquet") else f"{path.rstrip('/')}/manifest.parquet"


def _prefixed(message: str) -> str:
    return "\n".join(f"curate: {line}" for line in message.splitlines())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curate",
        description="Curate image datasets from crawled pages, and train DINOv2 on them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "bring a run up to a stage; do only what is left or stale")
    run.add_argument("--config", help="settings (YAML); default: those of the run")
    run.add_argument(
        "--run", help="folder or URL of the run (file, s3://, gs://, memory://); default: runs/<config name>"
    )
    run.add_argument("--stage", default="manifest", help=f"up to and including this one of: {_STAGES}")
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
    run.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="shards at a time, here")
    _add_set(run)

    status = _command(commands, "status", _status, "what is done, stale and left; rows kept and rejected by reason")
    status.add_argument("--run", required=True, help="folder or URL of the run")
    status.add_argument("--json", action="store_true", help="as JSON")

    report = _command(commands, "report", _report, "write report.html into the run and print its path")
    report.add_argument("--run", required=True, help="folder or URL of the run")

    audit = _command(commands, "audit", _audit, "search the stored images for faces again; 1 if anything is found")
    audit.add_argument("--run", required=True, help="folder or URL of the run")
    audit.add_argument("--weights", help="another detector than the run's: a name of `curate models list`, or a path")
    audit.add_argument(
        "--min-side-px", type=float, default=20.0, help="smaller faces do not count (default: %(default)s)"
    )

    purge = _command(commands, "purge", _purge, "delete images that nsfw or a list of blocked_hashes rejects since")
    purge.add_argument("--run", required=True, help="folder or URL of the run")
    _add_set(purge)
    purge.add_argument("--yes", action="store_true", help="agree to what is deleted")

    config = _command(commands, "config", _config, "check settings and print them with every default")
    config.add_argument("--config", required=True, help="settings (YAML)")
    _add_set(config)

    calibrate = _command(
        commands, "calibrate", _calibrate, "suggest a threshold from planted copies of your own images"
    )
    calibrate.add_argument("what", choices=("dedup",), help="dedup: the cosine above which two images are copies")
    calibrate.add_argument("--run", help="folder or URL of a run: its pool, its settings")
    calibrate.add_argument("--config", help="settings (YAML); default: those of the run, else the defaults")
    calibrate.add_argument("--images", help="a folder, tar or Parquet file instead of the run's pool")
    calibrate.add_argument("--size", type=_positive, default=500, help="images of the sample (default: %(default)s)")
    calibrate.add_argument("--precision", type=_share, default=0.99, help="wanted precision (default: %(default)s)")
    calibrate.add_argument(
        "--pool-size", type=_positive, help="images of the pool the precision is wanted in; default: of what is sampled"
    )
    calibrate.add_argument("--seed", type=_whole, default=0, help="of the sample and the edits (default: %(default)s)")
    calibrate.add_argument("--output", help="folder of the results; default: RUN/calibration/dedup")
    _add_set(calibrate)

    _add_models(commands)

    train = _command(commands, "train", _train, "train DINOv2 on a manifest")
    train.add_argument("--manifest", help="manifest.parquet, or the run's folder; default: those of data.manifests")
    train.add_argument("--config", required=True, help="training settings (YAML), such as configs/dinov2/tiny.yaml")
    train.add_argument("--output", required=True, help="folder for checkpoints and the log")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    train.add_argument("--workers", type=_positive, help="processes that train together, on Ray (ray.workers)")
    train.add_argument("--ray-address", help="join this Ray cluster (auto, or ray://host:10001); default: this machine")
    _add_set(train)

    export = _command(commands, "export-model", _export_model, "write a trained backbone as others load it")
    export.add_argument("--run", required=True, help="the --output folder of `curate train`")
    export.add_argument(
        "--format",
        required=True,
        choices=("timm", "transformers", "torchscript", "onnx"),
        help="timm and transformers make a folder, the others a file",
    )
    export.add_argument("--output", required=True, help="the folder or file")
    export.add_argument(
        "--image-px",
        type=_positive,
        help="side of the images that torchscript and onnx take, and of the stored positions; default: as trained",
    )
    export.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: %(default)s")

    _add_evaluate(commands)

    demo = _command(commands, "demo", _demo, "crawl, curate and train on a small website served on this machine")
    demo.add_argument("--folder", default="runs/demo", help="where everything goes (default: %(default)s)")
    demo.add_argument(
        "--port", type=int, default=0, help="port of the website; default: a free one, kept for next time"
    )
    demo.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="shards at a time")
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = _command(
        commands, "evaluate", _evaluate, "measure a backbone on labelled images, beside random weights and raw pixels"
    )
    evaluate.formatter_class = argparse.RawDescriptionHelpFormatter
    evaluate.epilog = _EVALUATE
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="the --output folder of `curate train`")
    what.add_argument("--backbone", help="an export, a checkpoint, timm:NAME or a preset of docs/embed.md")
    evaluate.add_argument("--data", required=True, help="images to learn from, and to test on unless --test is given")
    evaluate.add_argument("--test", help="images to test on, of the same kind")
    evaluate.add_argument(
        "--tasks", nargs="+", choices=_TASKS.split(), metavar="TASK", help=f"some of: {_TASKS} (default: all)"
    )
    evaluate.add_argument("--output", help="folder of evaluation.json and pictures; default: RUN/evaluation")
    evaluate.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: %(default)s")
    evaluate.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    evaluate.add_argument(
        "--accept-license", action="append", default=[], metavar="ID", help="accept a non-commercial licence"
    )
    _add_set(evaluate)


def _command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_models(commands: Any) -> None:
    models = _command(commands, "models", _models_list, "list, fetch and verify model weights")
    actions = models.add_subparsers(title="commands", metavar="COMMAND")
    listing = _command(actions, "list", _models_list, "what there is: what for, licence, where it is")
    listing.add_argument("--json", action="store_true", help="as JSON, with citations and URLs")
    fetch = _command(actions, "fetch", _models_fetch, "download what is pinned, checked and resumed")
    fetch.add_argument("name", help="a name of `curate models list`, all, or https://…#sha256=HEX")
    fetch.add_argument("--sha256", metavar="HEX", help="pin this digest for a name that has none")
    fetch.add_argument(
        "--trust-first-download", action="store_true", help="pin what arrives for a name that has no digest"
    )
    fetch.add_argument(
        "--accept-license", action="append", default=[], metavar="ID", help="accept a non-commercial licence"
    )
    verify = _command(actions, "verify", _models_verify, "hash what is here again, and look into the files")
    verify.add_argument("name", nargs="*", help="names or paths; default: everything that is here")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: --set fetch.timeout_s=10"
    )


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: reading package metadata takes longer than the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help=options.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from curation import __version__

        print(f"curate {__version__}")
        parser.exit()


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text}")
    return value


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def entry() -> None:
    """Run the command line and end the process.

    What is registered for the end of a process is run, but libraries' C++ globals are not torn down: their threads may
    still be there, and were seen to abort one in ten processes whose work was done.
    """
    leave_pandas_out()
    code = main()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    entry()
