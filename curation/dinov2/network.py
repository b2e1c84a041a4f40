"""Student and teacher: a backbone and two heads, initialised from the seed alone."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from curation.dinov2.config import TrainConfig
from curation.dinov2.heads import ProjectionHead
from curation.dinov2.model import KeptRows, VisionTransformer
from curation.dinov2.scores import Projected
from curation.dinov2.tensors import own
from curation.models.seeds import seeded


class Answers(NamedTuple):
    """What a network says of stacks of views.

    Attributes:
        cls_ND: Normalised class tokens of the global crops.
        class_tokens: The class tokens of all stacks, one after the other, as their head has them.
        patches: The masked patches as their head has them; None unless asked for.
    """

    cls_ND: Tensor
    class_tokens: Projected
    patches: Projected | None


class Network(nn.Module):
    """A backbone with a head for class tokens, which patches share unless they have one of their own.

    Attributes:
        heads_alone: Whether only the heads learn: the backbone then keeps nothing for a gradient, and has none.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.heads_alone = False
        dim = config.model.shape.dim
        self.backbone = VisionTransformer(config.model, config.crops.global_px)
        self.dino_head = ProjectionHead(dim, config.heads.dino)
        if config.heads.ibot is not None:
            self.ibot_head = ProjectionHead(dim, config.heads.ibot)

    def forward(
        self,
        views: Sequence[Tensor],
        mask_NP: Tensor | None,
        masked_M: Tensor | None,
        kept: KeptRows | None = None,
    ) -> Answers:
        """Answer to stacks of views, the global crops first.

        Args:
            views: As ``Inputs.views``.
            mask_NP: Patches of the global crops that are hidden; None: none.
            masked_M: Patches that are wanted, indices into the flattened (2B · P) grid; None: no patches.
            kept: Rows that run each residual branch; None: all.
        """
        masks = [mask_NP] + [None] * (len(views) - 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.heads_alone):
            class_tokens, patches = self.backbone.chosen(views, masks, kept, masked_M)
        whole = class_tokens[: len(views[0])]
        if masked_M is None:
            return Answers(whole, self.dino_head(class_tokens), None)
        if "ibot_head" in self._modules:
            return Answers(whole, self.dino_head(class_tokens), self.ibot_head(patches))
        both: Projected = self.dino_head(torch.cat([class_tokens, patches]))  # once: its prototypes are many
        return Answers(whole, *both.split([len(class_tokens), len(patches)]))


def student_and_teacher(config: TrainConfig) -> tuple[Network, Network]:
    """Return two equal networks on the CPU, the teacher's without gradients; no global random state changes."""
    with seeded(config.seed):
        student = Network(config)
    if not config.losses.masked_share:
        student.backbone.mask_token.requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return student, teacher


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move the teacher: m · teacher + (1 − m) · student."""
    ours, theirs = ([own(parameter) for parameter in network.parameters()] for network in (teacher, student))
    torch._foreach_lerp_(ours, theirs, 1 - momentum)
