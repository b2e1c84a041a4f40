"""One step's loss: the teacher's targets, the student's answers, and what the monitors see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curation.dinov2 import losses, monitors
from curation.dinov2.centring import Centrings
from curation.dinov2.config import LossesConfig
from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.model import KeptRows
from curation.dinov2.network import Network


@dataclass(frozen=True)
class Inputs:
    """A batch on the device.

    Attributes:
        views: Normalised stacks, crop-major: the 2B global crops, then the local ones if there are any.
        mask_NP: Masked patches of the global crops, bool.
        masked_M: Indices of the masked patches in the flattened (2B · P) grid.
        weight_M: 1 / masked patches of the crop, for each masked patch.
    """

    views: list[Tensor]
    mask_NP: Tensor
    masked_M: Tensor
    weight_M: Tensor

    @classmethod
    def of(cls, views: list[Tensor], mask_NP: Tensor) -> "Inputs":
        """Derive indices and weights from the mask."""
        per_crop = mask_NP.sum(dim=1).clamp(min=1).unsqueeze(1).expand_as(mask_NP)
        masked = torch.nonzero(mask_NP.flatten()).flatten()
        return cls(views, mask_NP, masked, per_crop.flatten()[masked].float().reciprocal())


@dataclass(frozen=True)
class Targets:
    """What the teacher says.

    Attributes:
        dino_VBK: Assignments of the class tokens of each global crop.
        ibot_MK: Assignments of the masked patches; None where the objective has no iBOT.
        monitors: Figures about the teacher, tensors without gradient.
    """

    dino_VBK: Tensor
    ibot_MK: Tensor | None
    monitors: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """The loss to back-propagate, its weighted parts (which sum to it) and figures about student and teacher."""

    total: Tensor
    parts: dict[str, Tensor]
    monitors: dict[str, Tensor]


@torch.no_grad()
def teacher_targets(
    teacher: Network, inputs: Inputs, temperature: float, config: LossesConfig, centrings: Centrings
) -> Targets:
    """Return the teacher's assignments: it sees whole global crops only."""
    (features,) = teacher.backbone([inputs.views[0]])
    dino_scores = teacher.dino_head(features.cls_ND)
    dino = centrings.dino.assign(dino_scores, temperature)
    figures = {
        "teacher_entropy": monitors.entropy(dino),
        "prototypes_used": monitors.prototypes_used(dino_scores),
        "rank": monitors.effective_rank(features.cls_ND),
    }
    ibot = None
    if config.ibot_weight:
        patches_MD = features.patches_NPD.flatten(0, 1).index_select(0, inputs.masked_M)
        ibot = centrings.ibot.assign(teacher.patch_head(patches_MD), temperature)
        figures["teacher_entropy_patches"] = monitors.entropy(ibot)
    return Targets(dino.view(NUM_GLOBAL, -1, dino.shape[1]), ibot, figures)


def objective(
    student: Network, inputs: Inputs, targets: Targets, config: LossesConfig, kept: KeptRows | None
) -> Outcome:
    """Return the student's loss.

    The DINO terms are divided by the number of (view, teacher view) pairs, 2 + 2 · local crops: each crop against both
    teacher views, a global crop only against the other one.
    """
    mask_NP = inputs.mask_NP if config.masked_share else None
    encoded = student.backbone(inputs.views, [mask_NP] + [None] * (len(inputs.views) - 1), kept)
    whole = encoded[0]
    scores = student.dino_head(torch.cat([features.cls_ND for features in encoded]))
    scores = scores.split([len(features.cls_ND) for features in encoded])
    views, images, _ = targets.dino_VBK.shape
    temperature = config.student_temp
    num_local = len(scores[1]) // images if len(scores) > 1 else 0
    pairs = views + views * num_local

    swapped = targets.dino_VBK.flip(0).flatten(0, 1)
    global_loss = losses.dino_global_loss(swapped, scores[0], temperature)
    parts = {"loss_dino_global": config.dino_weight * views / pairs * global_loss}
    if targets.ibot_MK is not None:
        patches_MD = whole.patches_NPD.flatten(0, 1).index_select(0, inputs.masked_M)
        answers_MK = student.patch_head(patches_MD)
        ibot = losses.ibot_loss(targets.ibot_MK, answers_MK, inputs.weight_M, len(whole.cls_ND), temperature)
        parts["loss_ibot"] = config.ibot_weight * ibot
    if num_local:
        local = losses.dino_local_loss(targets.dino_VBK, scores[1], temperature)
        parts["loss_dino_local"] = config.dino_weight / pairs * local
    koleo = torch.stack([losses.koleo_loss(cls_BD) for cls_BD in whole.cls_ND.chunk(views)])
    parts["loss_koleo"] = config.koleo_weight * koleo.sum()
    total = torch.stack(list(parts.values())).sum()
    figures = {**targets.monitors, "koleo": koleo.detach().mean()}
    return Outcome(total, {name: part.detach() for name, part in parts.items()}, figures)
