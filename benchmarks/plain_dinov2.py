"""DINOv2's training step and augmentation as the papers have them, and no more: the other side of ``bench_train.py``.

The student's global and local crops go through the backbone in two forwards, cross-entropies are log-softmax and a
product for each pair of crops, Sinkhorn-Knopp exponentiates scores, and each sample is augmented by itself with Pillow.
Parameters have the published names, so that both sides can start from the same weights and must give the same loss.

Source:
    Oquab et al. 2023, "DINOv2: learning robust visual features without supervision"; Zhou et al. 2021, "iBOT";
    Caron et al. 2021, "Emerging properties in self-supervised vision transformers".
"""

import copy
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from curation.dinov2.config import CropsConfig, HeadConfig, TrainConfig
from curation.dinov2.schedules import StepSettings


class PlainBlock(nn.Module):
    """Attention and feed-forward, each after a norm, scaled and added."""

    def __init__(self, dim: int, heads: int, init: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": nn.Parameter(torch.full((dim,), init))}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        batch, tokens, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        attended = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.ls1["gamma"] * self.attn["proj"](attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.ls2["gamma"] * self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainBackbone(nn.Module):
    """A vision transformer for views of one size at a time."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        dim, depth, heads = config.model.shape
        patch, self.grid = config.model.patch_px, config.crops.global_px // config.model.patch_px
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, config.model.layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, views: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return normalised tokens, the class token first."""
        x = self.patch_embed["proj"](views)
        rows = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token, x)
        position = self.pos_embed
        if rows != self.grid:
            patches = position[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
            patches = functional.interpolate(patches, size=(rows, rows), mode="bicubic", antialias=True)
            position = torch.cat([position[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainHead(nn.Module):
    """Three linear layers, unit length, weight-normed prototypes."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, config.bottleneck_dim))
        last = {"weight_g": torch.ones(config.prototypes, 1), "weight_v": torch.empty(config.prototypes, 256)}
        self.last_layer = nn.ParameterDict({name: nn.Parameter(value) for name, value in last.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Return prototype scores."""
        weight = torch._weight_norm(self.last_layer["weight_v"], self.last_layer["weight_g"], 0)
        return functional.linear(functional.normalize(self.mlp(x), dim=-1, eps=1e-12), weight)


class PlainTrainer:
    """Student, teacher, AdamW and one step.

    Args:
        config: Of a ViT with MLPs and two heads of three layers.
        state: Weights that student and teacher start from.
        views: Global and local crops, crop-major.
        mask: Masked patches of the global crops.
        now: Rates and temperatures.
    """

    def __init__(
        self, config: TrainConfig, state: dict[str, Tensor], views: list[Tensor], mask: Tensor, now: StepSettings
    ) -> None:
        dim = config.model.shape.dim
        heads = {"dino_head": config.heads.dino, "ibot_head": config.heads.ibot or HeadConfig()}
        modules: dict[str, Any] = {"backbone": PlainBackbone(config)}
        modules |= {name: PlainHead(dim, head) for name, head in heads.items()}
        self.student = nn.ModuleDict(modules)
        self.student.load_state_dict(state)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.adamw = torch.optim.AdamW(self.student.parameters(), lr=now.lr, weight_decay=now.weight_decay)
        self.config, self.now = config, now
        self.views, self.mask = views, mask

    def step(self) -> float:
        """Take one step; return its loss."""
        self.adamw.zero_grad()
        loss = self.loss()
        loss.backward()
        for module in self.student.children():
            nn.utils.clip_grad_norm_(module.parameters(), self.config.optim.clip_norm)
        self.adamw.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.mul_(self.now.momentum).add_(theirs, alpha=1 - self.now.momentum)
        return loss.item()

    def loss(self) -> Tensor:
        """Return the loss with its graph."""
        config, num_local, mask = self.config.losses, self.config.crops.num_local, self.mask
        whole, local = self.views
        masked = torch.nonzero(mask.flatten()).flatten()
        weight = (1 / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(mask)[mask]
        with torch.no_grad():
            seen = self.teacher["backbone"](whole)
            targets = self._sinkhorn(self.teacher["dino_head"](seen[:, 0])).chunk(2)
            patch_targets = self._sinkhorn(self.teacher["ibot_head"](seen[:, 1:].flatten(0, 1)[masked]))
        seen, near = self.student["backbone"](whole, mask), self.student["backbone"](local)
        scores = self.student["dino_head"](torch.cat([seen[:, 0], near[:, 0]])).chunk(2 + num_local)
        pairs = 2 + 2 * num_local
        loss = torch.zeros(())
        for crop in scores[2:]:
            for target in targets:
                loss = loss + self._cross_entropy(target, crop).mean() / pairs
        for crop, target in zip(scores[:2], targets[::-1], strict=True):
            loss = loss + self._cross_entropy(target, crop).mean() / pairs
        patch_scores = self.student["ibot_head"](seen[:, 1:].flatten(0, 1)[masked])
        loss = loss + (self._cross_entropy(patch_targets, patch_scores) * weight).sum() / len(whole)
        for crop in seen[:, 0].chunk(2):
            loss = loss + config.koleo_weight * koleo(crop)
        return loss

    def _cross_entropy(self, target: Tensor, scores: Tensor) -> Tensor:
        return -(target * functional.log_softmax(scores / self.config.losses.student_temp, dim=-1)).sum(-1)

    def _sinkhorn(self, scores: Tensor) -> Tensor:
        q = torch.exp(scores / self.now.teacher_temp).T
        q /= q.sum()
        for _ in range(self.config.losses.sinkhorn_rounds):
            q /= q.sum(1, keepdim=True)
            q /= q.shape[0]
            q /= q.sum(0, keepdim=True)
            q /= q.shape[1]
        return (q * q.shape[1]).T


def koleo(x: Tensor) -> Tensor:
    unit = functional.normalize(x, dim=-1, eps=1e-8)
    with torch.no_grad():
        similarity = unit @ unit.T
        similarity.fill_diagonal_(-1)
    distance = torch.linalg.vector_norm(unit - unit[similarity.argmax(1)] + 1e-8, dim=1)
    return -torch.log(distance + 1e-8).mean()


def augmented(data: bytes, seed: int, crops: CropsConfig) -> list[Tensor]:
    """Return the normalised crops of one JPEG: the published operations in the published order, on 8-bit images."""
    rng = np.random.default_rng(seed)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (crops.mean, crops.std))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    found = []
    for view in range(2 + crops.num_local):
        scale, side = (crops.global_scale, crops.global_px) if view < 2 else (crops.local_scale, crops.local_px)
        box = random_box(rng, image.size, scale, crops.aspect)
        crop = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
        crop = ImageOps.mirror(crop) if rng.random() < crops.flip_p else crop
        crop = jittered(crop, rng, crops) if rng.random() < crops.jitter_p else crop
        crop = crop.convert("L").convert("RGB") if rng.random() < crops.grey_p else crop
        if rng.random() < crops.blur_p[min(view, 2)]:
            crop = blurred(crop, float(rng.uniform(*crops.blur_sigma_px)))
        crop = ImageOps.solarize(crop, 128) if view == 1 and rng.random() < crops.solarise_p else crop
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
        found.append(pixels.sub_(mean).div_(std))
    return found


def random_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    side = min(size)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def jittered(image: Image.Image, rng: np.random.Generator, crops: CropsConfig) -> Image.Image:
    spreads = (crops.brightness, crops.contrast, crops.saturation)
    for operation in rng.permutation(4):
        if operation == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.asarray(hue, np.uint8) + np.uint8(int(rng.uniform(-crops.hue, crops.hue) * 255) % 256)
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
            image = enhance(image).enhance(float(rng.uniform(1 - spreads[operation], 1 + spreads[operation])))
    return image


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with nine taps on a tensor, as torchvision does; Pillow's own box approximation is another filter."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().unsqueeze(0)
    kernel = torch.exp(-0.5 * (torch.arange(-4, 5, dtype=torch.float32) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = functional.pad(x, (4, 4, 4, 4), mode="reflect")
    x = functional.conv2d(x, torch.outer(kernel, kernel).expand(3, 1, 9, 9), groups=3)[0]
    return Image.fromarray(x.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
