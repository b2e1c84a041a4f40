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
from curation.dinov2.scores import Assignment, Projected, Scores
from curation.dinov2.world import ALONE, World


@dataclass(frozen=True)
class Inputs:
    """A part of a batch on the device.

    Attributes:
        views: Normalised stacks, crop-major: the 2B global crops, then the local ones if there are any.
        mask_NP: Masked patches of the global crops, bool.
        masked_M: Indices of the patches to answer for in the flattened (2B · P) grid: the masked ones, or all.
        weight_M: 1 / such patches of the crop, for each.
    """

    views: list[Tensor]
    mask_NP: Tensor
    masked_M: Tensor
    weight_M: Tensor

    @classmethod
    def of(
        cls, views: list[Tensor], mask_NP: Tensor, *, every_patch: bool = False, device: torch.device | None = None
    ) -> "Inputs":
        """Derive indices and weights from the mask, where it is: on a CPU, as a GPU would have to be waited for.

        Args:
            views: Stacks.
            mask_NP: Masked patches.
            every_patch: Answer for all patches, whether masked or not.
            device: Where the stacks are; None: where the mask is.
        """
        if every_patch:
            masked_M = torch.arange(mask_NP.numel())
            weight_M = torch.full((mask_NP.numel(),), 1 / mask_NP.shape[1])
        else:
            per_crop = mask_NP.sum(dim=1).clamp(min=1).unsqueeze(1).expand_as(mask_NP)
            masked_M = torch.nonzero(mask_NP.flatten()).flatten()
            weight_M = per_crop.flatten()[masked_M].float().reciprocal()
        return cls(views, *(part.to(device, non_blocking=True) for part in (mask_NP, masked_M, weight_M)))

    def ask(self, network: nn.Module, config: LossesConfig, kept: KeptRows | None) -> Answers:
        """Return what the student says, which does not see the masked patches."""
        masked_M = self.masked_M if config.ibot_weight else None
        answers: Answers = network(self.views, self.mask_NP if config.masked_share else None, masked_M, kept)
        return answers


@dataclass(frozen=True)
class Targets:
    """What the teacher says of a part.

    Attributes:
        dino: Of the class tokens of each of the two global crops, B rows each.
        ibot: Of the masked patches; None where the objective has no iBOT.
    """

    dino: list[Assignment]
    ibot: Assignment | None


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
    class_tokens = _together([answer.class_tokens for answer in answers])
    scores = Scores(class_tokens, config.chunk_rows)
    dino = centrings.dino.assign(scores, temperature)
    figures = {"teacher_entropy": monitors.entropy(dino)}
    if watchers is not None:
        figures |= monitors.of_teacher(dino, [answer.cls_ND for answer in answers], watchers)
    ibot: Sequence[Assignment | None] = [None] * len(parts)
    patches = [answer.patches for answer in answers if answer.patches is not None]
    if patches:
        assigned = centrings.ibot.assign(Scores(_together(patches), config.chunk_rows), temperature)
        figures["teacher_entropy_patches"] = monitors.entropy(assigned)
        ibot = assigned.split([len(part.unit_ND) for part in patches])
    views = dino.split(
        [len(answer.class_tokens.unit_ND) // NUM_GLOBAL for answer in answers for _ in range(NUM_GLOBAL)]
    )
    by_part = [views[first : first + NUM_GLOBAL] for first in range(0, len(views), NUM_GLOBAL)]
    return [Targets(*pair) for pair in zip(by_part, ibot, strict=True)], figures


def _together(parts: Sequence[Projected]) -> Projected:
    """Return the rows of all parts; the prototypes of each are the same."""
    return Projected(torch.cat([part.unit_ND for part in parts]), parts[0].prototypes_KD)


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
    temperature, chunk_rows = config.student_temp, config.chunk_rows
    dino, dino_global, dino_local = losses.dino_loss(answers.class_tokens, targets.dino, temperature, chunk_rows)
    terms = [config.dino_weight * dino]
    parts = {"loss_dino_global": config.dino_weight * dino_global}
    if targets.ibot is not None and answers.patches is not None:
        ibot = losses.ibot_loss(
            answers.patches, targets.ibot, inputs.weight_M, len(answers.cls_ND), temperature, chunk_rows
        )
        terms.append(config.ibot_weight * ibot)
        parts["loss_ibot"] = terms[-1]
    if len(inputs.views) > 1:
        parts["loss_dino_local"] = config.dino_weight * dino_local
    if pull is None:
        koleo = torch.stack([losses.koleo_loss(cls_BD) for cls_BD in answers.cls_ND.chunk(NUM_GLOBAL)]).sum()
    else:
        inner = (answers.cls_ND.float() * pull.gradient_ND).sum()
        koleo = pull.value + inner - inner.detach()  # the value of the whole with its gradient
    terms.append(config.koleo_weight * koleo)
    parts["loss_koleo"] = terms[-1]
    total = torch.stack(terms).sum()
    figures = {name: part.detach() for name, part in parts.items()}
    return Outcome(total, figures, {"koleo": koleo.detach() / NUM_GLOBAL})
