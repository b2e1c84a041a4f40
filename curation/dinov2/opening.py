"""Whether a run may begin in a folder, or go on there: with the same images, settings and sources of weights."""

import hashlib
import json
from pathlib import Path

from curation.dinov2 import phases
from curation.dinov2.checkpoint import Checkpoints, Identity, ManifestShare, differences, flattened
from curation.dinov2.config import TrainConfig
from curation.errors import TrainError

# Settings that change no weight but by rounding: a run may go on with others.
FREE_SETTINGS = (
    "activation_checkpointing",
    "checkpoint.",
    "data.manifests",  # what they hold, and their weights, are compared instead of their paths
    "compile",
    "data.micro_batches",
    "data.prefetch_batches",
    "data.workers",
    "distillation.teacher",  # where it lies; its digest is compared
    "losses.chunk_rows",
    "monitors.",
    "optim.max_nonfinite_steps",
    "parallel",
    "ray.",
    "start.backbone",
    "start.run",
)


def fingerprint(config: TrainConfig, manifests: list[ManifestShare]) -> int:
    """Return a number, below 2^63, that all processes must share that train together."""
    settings = flattened(config.model_dump(mode="json"))
    shaping = {name: value for name, value in settings.items() if not name.startswith(FREE_SETTINGS)}
    shaping["data.micro_batches"], shaping["parallel"] = config.data.micro_batches, config.parallel
    text = json.dumps([shaping, [str(manifest) for manifest in manifests]], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def open_run(output: Path, config: TrainConfig, manifests: list[ManifestShare], resume: bool) -> None:
    """Make the folder of a run and write down what the run is, or see that it is the one that is there.

    Args:
        output: The run's folder.
        config: Settings.
        manifests: What is trained on.
        resume: Whether the folder may hold a run that has begun.

    Raises:
        TrainError: It holds something else, another run, or a run that has begun and is not to be resumed.
        DiskFullError: There is no space.
    """
    checkpoints = Checkpoints(output, config.checkpoint.keep)
    settings = flattened(config.model_dump(mode="json"))
    if output.exists() and not output.is_dir():
        raise TrainError(f"{output}: is not a folder; give another one")
    used = output.is_dir() and checkpoints.is_used()
    if used and not resume:
        raise TrainError(f"{output}: is not empty; go on with --resume, or give another folder")
    before = checkpoints.identity() if used else None
    if used and before is None:
        raise TrainError(f"{output}: holds no training run to resume; give another folder")
    if before is not None:
        if before.manifests != manifests:
            was, now = (", ".join(map(str, found)) for found in (before.manifests, manifests))
            raise TrainError(
                f"{output}: was trained on manifest {was}, but this one is {now}; "
                "resume with the same manifests and weights, or give another folder"
            )
        # Where KoLeo looks at the images of a part only, what the parts are is part of the objective.
        is_cut_free = config.losses.koleo_scope == "global" or not config.losses.koleo_weight
        free = tuple(name for name in FREE_SETTINGS if is_cut_free or name != "data.micro_batches")
        changed = differences(before.settings, settings, free)
        if changed:
            raise TrainError(
                f"{output}: was started with other settings ({'; '.join(changed)}); "
                "resume with the same ones, or give another folder"
            )
    sources = phases.sources(config, has_begun=checkpoints.has_begun())
    if before is not None:
        _same_sources(output, before.sources, sources)
        sources = {**before.sources, **sources}
    checkpoints.start(Identity(settings, manifests, sources))


def _same_sources(output: Path, before: dict[str, str], now: dict[str, str]) -> None:
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise TrainError(
                f"{output}: was started with another {name} ({before[name][:12]}, now {now[name][:12]}); "
                "resume with the same one, or give another folder"
            )
