"""What a run begins with and learns from, other than itself from random weights.

    start.run          another run of this trainer, at another resolution for example: student, teacher, heads, centres
    start.backbone     a published backbone; heads are new and may be warmed up first
    distillation       a frozen teacher, heads included; the student's running mean is kept

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision", sections 5 and 7 (distillation;
    training at high resolution at the end, with the schedules compressed).
"""

from pathlib import Path

from torch import Tensor

from curation.dinov2 import published, sharing
from curation.dinov2.centring import Centrings
from curation.dinov2.checkpoint import Checkpoints, differences, flattened
from curation.dinov2.config import StartConfig, TrainConfig
from curation.dinov2.export import StoredRun, read_run
from curation.dinov2.model import VisionTransformer
from curation.dinov2.network import Network
from curation.errors import TrainError


def sources(config: TrainConfig, has_begun: bool) -> dict[str, str]:
    """Return the digest of each thing that weights come from, by the setting that names it.

    Args:
        config: Settings of the run.
        has_begun: Whether there is a checkpoint: what the run began with is not needed any more then.

    Raises:
        TrainError: A run that is named holds no checkpoint, or a file is not there.
    """
    found = {}
    if config.distillation is not None:
        found["distillation.teacher"] = _digest_of_run(config.distillation.teacher)
    if config.start is not None and not has_begun:
        if config.start.run is not None:
            found["start.run"] = _digest_of_run(config.start.run)
        else:
            found["start.backbone"] = published.digest(Path(str(config.start.backbone)))
    return found


def _digest_of_run(folder: str) -> str:
    digest = Checkpoints(Path(folder), keep=1).newest_digest()
    if digest is None:
        raise TrainError(f"{folder}: holds no checkpoint; name the --output folder of `curate train`")
    return digest


def begin(config: TrainConfig, student: Network, teacher: Network, centrings: Centrings) -> None:
    """Give a run its first weights where they are not random.

    Raises:
        TrainError: What ``start`` names cannot be read, or is of another shape.
    """
    if config.distillation is not None and centrings.state():
        _take_centres(read_run(Path(config.distillation.teacher)), centrings)
    if config.start is None:
        return
    if config.start.run is not None:
        stored = read_run(Path(config.start.run))
        for kind, network in (("student", student), ("teacher", teacher)):
            _take(stored, f"{kind}/", network, config)
        _take_centres(stored, centrings)
    else:
        backbone = _published(config, config.start)
        for network in (student, teacher):
            sharing.load(network.backbone, backbone)


def guide(config: TrainConfig) -> Network | None:
    """Return the frozen teacher of a distillation, on the CPU; None without one.

    Raises:
        TrainError: Its run holds no checkpoint, or it cannot teach with these settings.
    """
    if config.distillation is None:
        return None
    stored = read_run(Path(config.distillation.teacher))
    wrong = _unfit(stored.config, config)
    if wrong:
        raise TrainError(f"{config.distillation.teacher}: cannot teach with these settings: {'; '.join(wrong)}")
    network = Network(stored.config).requires_grad_(False)
    try:
        network.load_state_dict(stored.under("teacher/"))
    except RuntimeError as error:
        raise TrainError(f"{stored.path}: is not what its settings make: {error}") from error
    return network


def _unfit(teacher: TrainConfig, student: TrainConfig) -> list[str]:
    """Return what keeps a teacher's answers from being targets, each with the setting to change."""
    wrong = [
        f"set {name} to {theirs!r}, the teacher's (it is {ours!r})"
        for name, theirs, ours in (
            ("model.patch_px", teacher.model.patch_px, student.model.patch_px),
            ("model.channels", teacher.model.channels, student.model.channels),
            ("crops.mean", teacher.crops.mean, student.crops.mean),
            ("crops.std", teacher.crops.std, student.crops.std),
            ("heads.dino.prototypes", teacher.heads.dino.prototypes, student.heads.dino.prototypes),
        )
        if theirs != ours
    ]
    if student.losses.ibot_weight:
        theirs, ours = ((c.heads.ibot or c.heads.dino).prototypes for c in (teacher, student))
        if theirs != ours:
            wrong.append(f"set heads.ibot.prototypes to {theirs}, the teacher's (it is {ours})")
        if not teacher.losses.ibot_weight:
            wrong.append("set losses.ibot_weight to 0: the teacher was not trained on patches")
    return wrong


def _take(stored: StoredRun, kind: str, network: Network, config: TrainConfig) -> None:
    state, prefix = stored.under(kind), "backbone."
    backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    heads = {name: value for name, value in state.items() if not name.startswith(prefix)}
    try:
        published.fit(backbone, _blank(config))
        sharing.load(network, heads | {f"{prefix}{name}": value for name, value in backbone.items()})
    except (RuntimeError, KeyError) as error:
        was, now = (
            flattened({"model": c.model.model_dump(), "heads": c.heads.model_dump()}) for c in (stored.config, config)
        )
        changed = "; ".join(differences(was, now, ())) or published.in_short(error)
        raise TrainError(
            f"{stored.path}: has another model or other heads ({changed}); set those of that run"
        ) from error


def _take_centres(stored: StoredRun, centrings: Centrings) -> None:
    try:
        centrings.restore({name: value for name, value in stored.tensors.items() if name.startswith("centre/")})
    except KeyError:  # it had none, or others: a running centre is there within tens of steps
        return


def _published(config: TrainConfig, start: StartConfig) -> dict[str, Tensor]:
    backbone = _blank(config)
    published.load_weights(backbone, Path(str(start.backbone)))
    return backbone.state_dict()


def _blank(config: TrainConfig) -> VisionTransformer:
    return VisionTransformer(config.model, config.crops.global_px)
