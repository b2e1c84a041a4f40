"""Student and teacher: a backbone and two heads, initialised from the seed alone."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from curation.dinov2.config import TrainConfig
from curation.dinov2.crops import NUM_GLOBAL
from curation.dinov2.heads import ProjectionHead
from curation.dinov2.model import Kept, KeptRows, VisionTransformer
from curation.dinov2.randomness import Purpose, scores
from curation.dinov2.scores import Projected
from curation.dinov2.tensors import own

BRANCHES = 2  # attention and feed-forward


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
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


def kept_rows(config: TrainConfig, step: int, images: range, device: torch.device) -> KeptRows | None:
    """Return the rows of a part of the batch that run each residual branch; None without drop path.

    Of the n rows of the whole step max(1, ⌊n (1 − p)⌋) run: those whose numbers, drawn from the sample's global
    position, are smallest. How the batch is cut into parts changes nothing, so a part may have none of them.

    Args:
        config: Settings of the run.
        step: Zero-based.
        images: Places of the part in the batch of the whole step.
        device: Where the rows are needed.
    """
    share = config.model.drop_path
    if not share:
        return None
    size = config.data.batch_size
    positions = step * size + np.arange(size, dtype=np.int64)
    stacks = [range(NUM_GLOBAL), range(NUM_GLOBAL, NUM_GLOBAL + config.crops.num_local)]

    def chosen(block: int, branch: int, crops: range) -> Kept:
        parts = [(block * BRANCHES + branch) * 64 + crop for crop in crops]
        ranking = np.argsort(
            np.concatenate([scores(config.seed, Purpose.DROP_PATH, part, positions) for part in parts]), kind="stable"
        )
        rows = ranking[: max(1, int(len(ranking) * (1 - share)))]
        crop, image = np.divmod(np.sort(rows), size)
        mine = (image >= images.start) & (image < images.stop)
        local = crop[mine] * len(images) + image[mine] - images.start
        return Kept(torch.from_numpy(local).to(device), len(ranking) / len(rows))

    return [
        [(chosen(block, 0, crops), chosen(block, 1, crops)) for crops in stacks if crops]
        for block in range(config.model.shape.depth)
    ]
