"""``curate train``, ``export-model`` and ``evaluate``."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.cli.options import add_command, add_set, positive
from curation.cli.stop import Stop
from curation.errors import UsageError

if TYPE_CHECKING:
    from curation.dinov2.train import TrainResult

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


def add_training(commands: Any) -> None:
    """Declare the commands."""
    train = add_command(commands, "train", _train, "train DINOv2 on a manifest")
    train.add_argument("--manifest", help="manifest.parquet, or the run's folder; default: those of data.manifests")
    train.add_argument("--config", required=True, help="training settings (YAML), such as configs/dinov2/tiny.yaml")
    train.add_argument("--output", required=True, help="folder for checkpoints and the log")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    train.add_argument("--workers", type=positive, help="processes that train together, on Ray (ray.workers)")
    train.add_argument("--ray-address", help="join this Ray cluster (auto, or ray://host:10001); default: this machine")
    add_set(train)

    export = add_command(commands, "export-model", _export_model, "write a trained backbone as others load it")
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
        type=positive,
        help="side of the images that torchscript and onnx take, and of the stored positions; default: as trained",
    )
    export.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: %(default)s")

    _add_evaluate(commands)


def _add_evaluate(commands: Any) -> None:
    evaluate = add_command(
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
    add_set(evaluate)


def _train(options: argparse.Namespace) -> int:
    from curation import settings
    from curation.dinov2.config import TrainConfig
    from curation.dinov2.train import train
    from curation.progress.train import train_reporter

    workers = [] if options.workers is None else [f"ray.workers={options.workers}"]
    config = settings.load(TrainConfig, options.config, [*options.set, *workers])
    run: Callable[..., TrainResult] = train
    if workers or options.ray_address:
        from curation.pipelines.ray_train import train_on_ray

        run = partial(train_on_ray, address=options.ray_address)
    stop = Stop()
    try:
        with stop, train_reporter(sys.stderr) as on_step:
            result = run(
                None if options.manifest is None else _manifest_of(options.manifest),
                config,
                _local(options.output),
                resume=options.resume,
                device=options.device,
                on_step=on_step,
                should_stop=stop.is_set,
            )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command with --resume goes on from the newest checkpoint") from error
    if not result.finished:
        raise KeyboardInterrupt(f"step {result.steps} is saved, and the same command with --resume goes on")
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one speaks
        return 0
    print(f"teacher     {result.teacher}")
    print(f"checkpoint  {result.checkpoint}")
    print(f"log         {result.log}")
    return 0


def _export_model(options: argparse.Namespace) -> int:
    from curation.dinov2.export import FORMATS, at_size, read_backbone

    output = _local(options.output)
    backbone, config, step = read_backbone(_local(options.run), options.network)
    if options.image_px is not None:
        backbone = at_size(backbone, options.image_px)
    FORMATS[options.format](backbone, config, step, output)
    print(f"{options.format}  {output}  ({options.network} after {step} steps)")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from curation.dinov2.device import device_of
    from curation.dinov2.evaluate.backbones import load_backbone
    from curation.dinov2.evaluate.config import EvaluateConfig
    from curation.dinov2.evaluate.evaluation import evaluate
    from curation.dinov2.evaluate.tables import lines
    from curation.progress.counter import counter
    from curation.settings import overridden, parse

    tree: dict[str, Any] = {"data": {"path": options.data, "test_path": options.test}}
    if options.tasks:
        tree["tasks"] = options.tasks
    output = _local(options.output or f"{options.run or '.'}/evaluation")
    config = parse(EvaluateConfig, *overridden(tree, "curate evaluate", options.set))
    device = device_of(options.device)
    trained, random = load_backbone(
        options.run or options.backbone,
        device,
        config.seed,
        network=options.network,
        accept_licenses=tuple(options.accept_license),
    )
    with counter(sys.stderr, "images") as progress:
        found = evaluate(trained, random, config, output, device, progress)
    print("\n".join(lines(found)))
    print(*(f"wrote {path}" for path in found.files), sep="\n")
    return 0


def _local(path: str) -> Path:
    """Return a folder or file of this machine.

    Raises:
        UsageError: It is a URL.
    """
    if "://" in path:
        raise UsageError(f"{path}: must be on a disk of this machine, not in a store; copy it there, or from there")
    return Path(path)


def _manifest_of(path: str) -> str:
    """Return the manifest of a run's folder, or the file itself."""
    return path if path.endswith(".parquet") else f"{path.rstrip('/')}/manifest.parquet"
