"""The vision transformer of student and teacher.

Parameters carry the names of the published DINOv2 checkpoints; ``export.timm_state`` renames the few that timm calls
otherwise. Views of different sizes run together: norms and linear layers see the tokens of all of them at once, and
only attention runs once a size. One path on CPU and GPU.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from curation.dinov2.config import ModelConfig
from curation.errors import DimensionError

NORM_EPS = 1e-6


class Kept(NamedTuple):
    """The rows of a stack that run a residual branch, and what their result is scaled by to stand in for the others."""

    rows: Tensor
    scale: float


Size = tuple[int, int]  # views, and tokens of each
KeptRows = Sequence[Sequence[tuple[Kept, Kept]]]  # by block and stack: attention, feed-forward


@dataclass(frozen=True)
class Features:
    """Normalised output tokens of one stack of views."""

    cls_ND: Tensor
    registers_NRD: Tensor
    patches_NPD: Tensor


class PatchEmbed(nn.Module):
    """Cut an image into patches, row-major, and project each."""

    def __init__(self, patch_px: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_px, stride=patch_px)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return tokens, (N, P, D)."""
        tokens: Tensor = self.proj(x_NCHW).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention over several stacks of views."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x_TD: Tensor, sizes: Sequence[Size], scale: "LayerScale", wanted_W: Tensor | None = None
    ) -> Tensor:
        """Attend within each view; return the scaled result.

        Args:
            x_TD: Tokens of all stacks, one after the other.
            sizes: Of each stack.
            scale: Of the result.
            wanted_W: Tokens whose result is wanted; None: all.
        """
        dim = x_TD.shape[1]
        parts = torch.split(self.qkv(x_TD), [views * tokens for views, tokens in sizes])
        attended = []
        for part, (views, tokens) in zip(parts, sizes, strict=True):
            if not views:  # no row of this stack runs the branch
                attended.append(part[:, :dim])
                continue
            # Taken apart before they are turned: their gradients are then put together in one pass.
            apart = part.view(views, tokens, 3, self.heads, dim // self.heads).unbind(dim=2)
            q, k, v = (x.transpose(1, 2) for x in apart)
            out = functional.scaled_dot_product_attention(q, k, v)
            attended.append(out.transpose(1, 2).reshape(views * tokens, dim))
        return scale.after(self.proj, _chosen(torch.cat(attended), wanted_W))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor, scale: "LayerScale") -> Tensor:
        """Return the same shape, scaled."""
        return scale.after(self.fc2, functional.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """Gated feed-forward layer with two thirds of the hidden width, rounded up to 8.

    Source:
        Shazeer 2020, "GLU variants improve Transformer".
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = (int(int(dim * ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: "LayerScale") -> Tensor:
        """Return the same shape, scaled."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return scale.after(self.w3, functional.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each feature.

    It scales the rows of the linear layer before it and not the features, which are many more and would have to be kept
    for the gradient.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def after(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Return what the layer makes of x, scaled."""
        return functional.linear(x, linear.weight * self.gamma.unsqueeze(1), linear.bias * self.gamma)


class Block(nn.Module):
    """x + γ₁ attention(norm x), then x + γ₂ feed-forward(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.shape.dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, config.shape.heads)
        self.ls1 = LayerScale(dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = (SwiGlu if config.ffn == "swiglu" else Mlp)(dim, config.mlp_ratio)
        self.ls2 = LayerScale(dim, config.layer_scale)

    def compile_forward(self) -> None:
        """Compile what the block does, and not what is hooked to it: FSDP puts its weights together around that."""
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    def forward(
        self,
        x_TD: Tensor,
        sizes: Sequence[Size],
        kept: Sequence[tuple[Kept, Kept]] | None,
        wanted_W: Tensor | None = None,
    ) -> Tensor:
        """Return tokens after the block.

        Args:
            x_TD: Tokens of all stacks, one after the other.
            sizes: Of each stack.
            kept: What runs (attention, feed-forward) of each stack; None: all.
            wanted_W: Tokens that are returned; None: all.
        """
        if kept is None:
            x_TD = _chosen(x_TD, wanted_W) + self.attn(self.norm1(x_TD), sizes, self.ls1, wanted_W)
            return x_TD + self._fed_forward(x_TD, sizes)
        stacks = unstacked(x_TD, sizes)
        for branch, run in enumerate((self._attended, self._fed_forward)):
            ran = [pair[branch] for pair in kept]
            chosen = [x.index_select(0, k.rows) for x, k in zip(stacks, ran, strict=True)]
            residual = run(*stacked(chosen))
            parts = unstacked(residual, [(x.shape[0], x.shape[1]) for x in chosen])
            stacks = [
                x.index_add(0, k.rows, part.to(x.dtype), alpha=k.scale)
                for x, k, part in zip(stacks, ran, parts, strict=True)
            ]
        return _chosen(stacked(stacks)[0], wanted_W)

    def _attended(self, x_TD: Tensor, sizes: Sequence[Size]) -> Tensor:
        residual: Tensor = self.attn(self.norm1(x_TD), sizes, self.ls1)
        return residual

    def _fed_forward(self, x_TD: Tensor, _: Sequence[Size]) -> Tensor:
        residual: Tensor = self.mlp(self.norm2(x_TD), self.ls2)
        return residual


def _chosen(x_TD: Tensor, wanted_W: Tensor | None) -> Tensor:
    return x_TD if wanted_W is None else x_TD.index_select(0, wanted_W)


def stacked(stacks: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Return the tokens of (N, T, D) stacks one after the other, and the stacks' sizes."""
    return torch.cat([x.flatten(0, 1) for x in stacks]), [(x.shape[0], x.shape[1]) for x in stacks]


def unstacked(x_TD: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """Return what ``stacked`` was given."""
    parts = torch.split(x_TD, [views * tokens for views, tokens in sizes])
    return [part.view(*size, x_TD.shape[1]) for part, size in zip(parts, sizes, strict=True)]


class VisionTransformer(nn.Module):
    """A vision transformer with mask token, registers and position embeddings for any grid.

    Args:
        config: Its shape.
        image_px: Side of the images whose grid the position embeddings are stored for.

    Attributes:
        recomputes: Whether blocks run again for their gradient instead of keeping what they made.
    """

    def __init__(self, config: ModelConfig, image_px: int) -> None:
        super().__init__()
        self.config = config
        self.recomputes = False
        dim = config.shape.dim
        self.grid = image_px // config.patch_px
        self.patch_embed = PatchEmbed(config.patch_px, config.channels, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.shape.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._reset()

    def _reset(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.config.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, views: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None, kept: KeptRows | None = None
    ) -> list[Features]:
        """Encode stacks of views.

        Args:
            views: Each (N, C, H, W) with H and W multiples of the patch, not necessarily equal; sizes may differ
                between stacks.
            masks: For each stack (N, P) bool, true where the mask token replaces a patch, or None.
            kept: Rows that run each residual branch (stochastic depth), as ``kept[block][stack]``; None: all.

        Returns:
            The normalised tokens of each stack.

        Raises:
            DimensionError: A view has other channels, or a side that is no multiple of the patch.
        """
        x_TD, sizes = stacked(self._tokens(views, masks))
        return [self._features(x) for x in unstacked(self._blocks(x_TD, sizes, kept)[-1], sizes)]

    def chosen(
        self, views: Sequence[Tensor], masks: Sequence[Tensor | None], kept: KeptRows | None, patches_M: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised class tokens of all stacks, and some patches of the first one.

        The last block makes these only: its feed-forward on nine tokens of ten is work for nothing, 4 % of a step of
        ViT-S/16. With stochastic depth it makes all.

        Args:
            views: As in ``forward``.
            masks: As in ``forward``.
            kept: As in ``forward``.
            patches_M: Indices into the flattened (N · P) grid of the first stack; None: no patches.
        """
        x_TD, sizes = stacked(self._tokens(views, masks))
        starts = itertools.accumulate((views * length for views, length in sizes), initial=0)
        wanted = [torch.arange(n) * length + start for (n, length), start in zip(sizes, starts, strict=False)]
        wanted_W = torch.cat(wanted).to(x_TD.device, non_blocking=True)
        num_class_tokens = len(wanted_W)
        if patches_M is not None:
            length = sizes[0][1]
            first = 1 + self.config.registers
            view, patch = patches_M // (length - first), patches_M % (length - first)
            wanted_W = torch.cat([wanted_W, view * length + first + patch])
        tokens = self.norm(self._blocks(x_TD, sizes, kept, wanted_W)[-1])
        return tokens[:num_class_tokens], tokens[num_class_tokens:]

    def intermediate(self, x_NCHW: Tensor, num_blocks: int) -> list[Features]:
        """Return the normalised tokens after each of the last ``num_blocks`` blocks."""
        x_TD, sizes = stacked(self._tokens([x_NCHW], None))
        return [self._features(unstacked(x, sizes)[0]) for x in self._blocks(x_TD, sizes, None)[-num_blocks:]]

    def _blocks(
        self, x_TD: Tensor, sizes: Sequence[Size], kept: KeptRows | None, wanted_W: Tensor | None = None
    ) -> list[Tensor]:
        outputs = []
        for index, block in enumerate(self.blocks):
            rows = None if kept is None else kept[index]
            chosen = wanted_W if index == len(self.blocks) - 1 else None
            if self.recomputes and torch.is_grad_enabled():
                # A block draws no random numbers: the rows that it runs on are given.
                x_TD = checkpoint(block, x_TD, sizes, rows, chosen, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(x_TD, sizes, rows, chosen)
            outputs.append(x_TD)
        return outputs

    def _tokens(self, views: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> list[Tensor]:
        return [self._embed(view, mask) for view, mask in zip(views, masks or [None] * len(views), strict=True)]

    def _embed(self, x_NCHW: Tensor, mask_NP: Tensor | None) -> Tensor:
        channels, *sides = x_NCHW.shape[1:]
        if channels != self.config.channels or any(side % self.config.patch_px for side in sides):
            raise DimensionError(
                f"images must have {self.config.channels} channels and sides that are multiples of "
                f"{self.config.patch_px} pixels, got {tuple(x_NCHW.shape)}"
            )
        rows, columns = (side // self.config.patch_px for side in sides)
        x = self.patch_embed(x_NCHW)
        if mask_NP is not None:
            x = torch.where(mask_NP.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions(rows, columns)
        if self.config.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return position embeddings for a grid, (1, 1 + rows · columns, D): class token first, float32."""
        if rows == self.grid and columns == self.grid:
            return self.pos_embed
        stored = self.pos_embed.float()
        grid = stored[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        antialias, offset = self.config.pos_embed_antialias, self.config.pos_embed_offset
        if offset:
            scale = ((rows + offset) / self.grid, (columns + offset) / self.grid)
            grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            grid = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=antialias)
        return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def _features(self, x_NTD: Tensor) -> Features:
        first = 1 + self.config.registers
        x = self.norm(x_NTD)
        return Features(cls_ND=x[:, 0], registers_NRD=x[:, 1:first], patches_NPD=x[:, first:])
