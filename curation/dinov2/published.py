"""Backbones of others as first weights: whatever names they come with, other grids and channels fitted.

What is read: safetensors, PyTorch state dicts (tensors alone, nothing in the file can run), and folders that timm or
transformers load, with a ``model.safetensors``.
"""

import hashlib
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from curation.dinov2 import names
from curation.dinov2.model import VisionTransformer
from curation.errors import TrainError

_WRAPPERS = ("teacher", "model", "state_dict")  # of training scripts
_PREFIXES = ("module.", "backbone.", "dinov2.", "dinov2_with_registers.")
_CLASSIFIER = ("head.", "classifier.", "dino_head.", "ibot_head.")


def load_weights(backbone: VisionTransformer, path: Path) -> None:
    """Load a backbone's weights under any of the names of ``names``.

    Position embeddings are resized to the backbone's own grid; filters of colour images are shared out over other
    channels; a network without LayerScale has one of 1.

    Raises:
        TrainError: The file cannot be read, or its weights are those of another shape.
    """
    state = tensors(path)
    try:
        state = names.ours(state)
        fit(state, backbone)
        backbone.load_state_dict(state)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise TrainError(
            f"{path}: holds another network than model settings make{_described(state)}: {in_short(error)}"
        ) from error


def in_short(error: Exception) -> str:
    """Return the first of the differences that PyTorch lists, and how many more there are."""
    lines = [line.strip() for line in str(error).splitlines()]
    first = lines[1] if len(lines) > 1 else lines[0]
    return first if len(lines) <= 2 else f"{first} and {len(lines) - 2} more"


def fit(state: dict[str, Tensor], backbone: VisionTransformer) -> None:
    """Change a state with our names, in place, so that it fits another grid, other channels and LayerScale."""
    if state["pos_embed"].shape[1] != backbone.pos_embed.shape[1]:
        state["pos_embed"] = resized(state["pos_embed"], backbone.grid)
    filters, channels = state["patch_embed.proj.weight"], backbone.config.channels
    if filters.shape[1] != channels:
        state["patch_embed.proj.weight"] = shared_out(filters, channels)
    if not any(name.endswith(".ls1.gamma") for name in state):
        for name, value in backbone.state_dict().items():
            if name.endswith(".gamma"):
                state[name] = torch.ones_like(value)


def resized(pos_embed_1PD: Tensor, grid: int) -> Tensor:
    """Return position embeddings, class token first, for another square grid; bicubic with antialiasing."""
    side = math.isqrt(pos_embed_1PD.shape[1] - 1)
    patches = pos_embed_1PD[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([pos_embed_1PD[:, :1], patches.flatten(2).transpose(1, 2).to(pos_embed_1PD)], dim=1)


def shared_out(filters_DCPP: Tensor, channels: int) -> Tensor:
    """Return filters for another number of channels: an image whose channels are all equal gives what it gave."""
    given = filters_DCPP.shape[1]
    if channels < given:
        return filters_DCPP.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels
    source = torch.arange(channels) % given
    return filters_DCPP[:, source] / torch.bincount(source)[source].view(1, -1, 1, 1)


def digest(path: Path) -> str:
    """Return the sha256 of the file that weights are in.

    Raises:
        TrainError: It cannot be read.
    """
    file = _file(path)
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise TrainError(f"{file}: cannot be read: {error}") from error


def tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or folder under its own names, without wrappers, prefixes and classifiers.

    Raises:
        TrainError: It cannot be read.
    """
    file = _file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused
            loaded: Any = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]  # PyTorch goes on to advise reading it unsafely
        raise TrainError(f"{file}: cannot be read as tensors: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise TrainError(f"{file}: is no state dict of tensors")
    state = {str(name): value.float() for name, value in loaded.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in state.items() if not name.startswith(_CLASSIFIER)}


def _file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _described(state: Mapping[str, Tensor]) -> str:
    """Say which settings would fit, as far as tensors tell."""
    if "patch_embed.proj.weight" not in state:
        return ""
    dim, _, patch_px, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    ffn = "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp"
    return f" (dim: {dim}, depth: {depth}, patch_px: {patch_px}, ffn: {ffn}, registers: {registers})"
