"""Student and teacher: a backbone and two heads, initialised from the seed alone."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from curation.dinov2.config import TrainConfig
from curation.dinov2.heads import ProjectionHead
from curation.dinov2.model import KeptRows, VisionTransformer
from curation.dinov2.randomness import Purpose, scores

BRANCHES = 2  # attention and feed-forward


class Network(nn.Module):
    """A backbone with a head for class tokens, which patches share unless they have one of their own."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        dim = config.model.shape.dim
        self.backbone = VisionTransformer(config.model, config.crops.global_px)
        self.dino_head = ProjectionHead(dim, config.heads.dino)
        if config.heads.ibot is not None:
            self.ibot_head = ProjectionHead(dim, config.heads.ibot)

    @property
    def patch_head(self) -> ProjectionHead:
        """Return the head that masked patches go through."""
        head: ProjectionHead = self._modules.get("ibot_head") or self.dino_head
        return head


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
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)


def kept_rows(config: TrainConfig, step: int, device: torch.device) -> KeptRows | None:
    """Return the rows that run each residual branch in a step, as ``[block][stack]``; None without drop path.

    Of n rows max(1, ⌊n (1 − p)⌋) run: those whose numbers, drawn from the sample's global position, are smallest.
    """
    share = config.model.drop_path
    if not share:
        return None
    size = config.data.batch_size
    positions = step * size + np.arange(size, dtype=np.int64)
    views = [range(2), range(2, 2 + config.crops.num_local)]

    def chosen(block: int, branch: int, crops: range) -> Tensor:
        parts = [(block * BRANCHES + branch) * 64 + crop for crop in crops]
        ranking = np.argsort(
            np.concatenate([scores(config.seed, Purpose.DROP_PATH, part, positions) for part in parts]), kind="stable"
        )
        rows = ranking[: max(1, int(len(ranking) * (1 - share)))]
        return torch.from_numpy(np.sort(rows)).to(device)

    return [
        [(chosen(block, 0, crops), chosen(block, 1, crops)) for crops in views if crops]
        for block in range(config.model.shape.depth)
    ]
