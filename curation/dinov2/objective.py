"""One step's loss: the teacher's targets, the student's answers, and what the monitors see.

A step's batch may be cut into parts, by process and by micro-batch. Targets are made of all parts at once, and each
part's loss is scaled so that the mean over the parts is the loss of the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curation.dinov2 import losses, monitors
from curation.dinov2.centring import Centrings
from curation.dinov2.config import LossesConfig
from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.model import KeptRows
from curation.dinov2.network import Answers
from curation.dinov2.world import ALONE, World


@dataclass(frozen=True)
class Inputs:
    """A part of a batch on the device.

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

    def ask(self, network: nn.Module, config: LossesConfig, kept: KeptRows | None) -> Answers:
        """Return what the student says, which does not see the masked patches."""
        masked_M = self.masked_M if config.ibot_weight else None
        answers: Answers = network(self.views, self.mask_NP if config.masked_share else None, masked_M, kept)
        return answers


@dataclass(frozen=True)
class Targets:
    """What the teacher says of a part.

    Attributes:
        dino_VBK: Assignments of the class tokens of each global crop.
        ibot_MK: Assignments of the masked patches; None where the objective has no iBOT.
    """

    dino_VBK: Tensor
    ibot_MK: Tensor | None


@dataclass(frozen=True)
class Pull:
    """KoLeo of a whole batch as seen by a part: its value, and the gradient for the part's class tokens."""

    value: Tensor
    gradient_ND: Tensor


@dataclass(frozen=True)
class Outcome:
    """The loss to back-propagate, its weighted parts (which sum to it) and figures about the student."""

    total: Tensor
    parts: dict[str, Tensor]
    monitors: dict[str, Tensor]


@torch.no_grad()
def teacher_targets(
    teacher: nn.Module,
    parts: Sequence[Inputs],
    temperature: float,
    config: LossesConfig,
    centrings: Centrings,
    watchers: World | None = None,
) -> tuple[list[Targets], dict[str, Tensor]]:
    """Return the teacher's targets for each part of the batch, and figures about the teacher.

    It sees whole global crops only. What takes a look at all of the step is figured out where ``watchers``, the
    processes that train together, are given.
    """
    answers: list[Answers] = [
        teacher(inputs.views[:1], None, inputs.masked_M if config.ibot_weight else None) for inputs in parts
    ]
    class_scores = [answer.scores_NK for answer in answers]
    all_scores = torch.cat(class_scores)
    dino = centrings.dino.assign(all_scores, temperature)
    figures = {"teacher_entropy": monitors.entropy(dino)}
    if watchers is not None:
        figures |= monitors.of_teacher(dino, all_scores, [answer.cls_ND for answer in answers], watchers)
    ibot: list[Tensor | None] = [None] * len(parts)
    patch_scores = [answer.patch_scores_MK for answer in answers if answer.patch_scores_MK is not None]
    if patch_scores:
        assigned = centrings.ibot.assign(torch.cat(patch_scores), temperature)
        figures["teacher_entropy_patches"] = monitors.entropy(assigned)
        ibot = list(torch.split(assigned, [len(scores) for scores in patch_scores]))
    assigned_parts = torch.split(dino, [len(scores) for scores in class_scores])
    targets = [
        Targets(part.view(NUM_GLOBAL, -1, part.shape[1]), patches)
        for part, patches in zip(assigned_parts, ibot, strict=True)
    ]
    return targets, figures


def koleo_pulls(cls_parts: Sequence[Tensor], world: World = ALONE) -> list[Pull]:
    """Return KoLeo among the images of all parts and processes, and its gradient for each part of this process.

    The gradient is that of the whole loss times the number of parts, because the mean over parts is taken.

    Args:
        cls_parts: The student's class tokens of the global crops of each part, (2B, D), crop-major; no gradient needed.
        world: Processes that train together.
    """
    dim = cls_parts[0].shape[1]
    own = [cls_ND.detach().float().view(NUM_GLOBAL, -1, dim) for cls_ND in cls_parts]
    own_BVD = torch.cat([part.transpose(0, 1) for part in own])
    all_BVD = world.gather(own_BVD).requires_grad_()
    with torch.enable_grad():
        value = torch.stack([losses.koleo_loss(all_BVD[:, view]) for view in range(NUM_GLOBAL)]).sum()
    (gradient,) = torch.autograd.grad(value, all_BVD)
    first = world.rank * len(own_BVD)
    mine = gradient[first : first + len(own_BVD)] * (len(cls_parts) * world.size)
    return [
        Pull(value.detach(), part.transpose(0, 1).flatten(0, 1))
        for part in torch.split(mine, [part.shape[1] for part in own])
    ]


def objective(
    answers: Answers, inputs: Inputs, targets: Targets, config: LossesConfig, pull: Pull | None = None
) -> Outcome:
    """Return the student's loss on a part.

    The DINO terms are divided by the number of (view, teacher view) pairs, 2 + 2 · local crops: each crop against both
    teacher views, a global crop only against the other one.

    Args:
        answers: The student's.
        inputs: What it was asked.
        targets: The teacher's.
        config: Weights and the student's temperature.
        pull: KoLeo of the whole batch; None: among the images of this part.
    """
    views, images, _ = targets.dino_VBK.shape
    temperature = config.student_temp
    whole_NK, local_NK = answers.scores_NK[: views * images], answers.scores_NK[views * images :]
    num_local = len(local_NK) // images
    pairs = views + views * num_local

    swapped = targets.dino_VBK.flip(0).flatten(0, 1)
    global_loss = losses.dino_global_loss(swapped, whole_NK, temperature)
    parts = {"loss_dino_global": config.dino_weight * views / pairs * global_loss}
    if targets.ibot_MK is not None and answers.patch_scores_MK is not None:
        ibot = losses.ibot_loss(
            targets.ibot_MK, answers.patch_scores_MK, inputs.weight_M, len(answers.cls_ND), temperature
        )
        parts["loss_ibot"] = config.ibot_weight * ibot
    if num_local:
        local = losses.dino_local_loss(targets.dino_VBK, local_NK, temperature)
        parts["loss_dino_local"] = config.dino_weight / pairs * local
    if pull is None:
        koleo = torch.stack([losses.koleo_loss(cls_BD) for cls_BD in answers.cls_ND.chunk(views)]).sum()
    else:
        inner = (answers.cls_ND.float() * pull.gradient_ND).sum()
        koleo = pull.value + inner - inner.detach()  # the value of the whole with its gradient
    parts["loss_koleo"] = config.koleo_weight * koleo
    total = torch.stack(list(parts.values())).sum()
    return Outcome(total, {name: part.detach() for name, part in parts.items()}, {"koleo": koleo.detach() / views})
