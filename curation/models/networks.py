"""Networks that encode images, without their classifiers: any timm model, and what our own trainer exports.

A file is read as tensors only (``.safetensors``, or a ``.pth`` / ``.pt`` / ``.bin`` state dict with ``weights_only``).
Its names fit one by one; or by order, where another library named the same layers otherwise; or after the conversion
that timm knows for files as their authors published them (DINOv2, I-JEPA).
"""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from curation.config.selection import EmbedConfig
from curation.encoder_presets import TRAINED
from curation.errors import WeightsError
from curation.models import hub, torchvision_shim
from curation.models.seeds import seeded
from curation.models.weights import HF_PREFIX, TIMM_PREFIX, Weights

# What both readers were seen to raise on files that are something else; they have no common base.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)
# What timm was seen to raise where a model cannot be made, or a file is not its weights.
_NOT_MADE = (RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
# Wrappers in which training scripts save a state dict.
_WRAPPERS = ("state_dict", "model", "teacher", "model_ema")
_HEADS = ("_fc.bias", "classifier.bias", "fc.bias", "head.bias", "head.fc.bias")
_MAX_HEADER_CHARS = 100_000


def load(config: EmbedConfig, weights: Weights) -> Any:
    """Return the network with its weights, for images of ``side_px``, ready for evaluation.

    Raises:
        WeightsError: Unknown model, weights of another model, or a side or features that it does not have.
    """
    if config.model == TRAINED:
        torchvision_shim.prepare()
        network = _trained(weights.path)
        return _sized(network, config).eval()
    hub.prepare(config.model)
    if weights.name.startswith((TIMM_PREFIX, HF_PREFIX)):
        network = _converted(config.model, weights.path)
    else:
        network = _given(config.model, weights.path)
    return _sized(network, config).eval()


def check(config: EmbedConfig) -> None:
    """Refuse a model, side or features that cannot work, before there is anything to encode.

    The network is made without memory for its tensors, so this takes a second for any model. The shape of our own
    trainer's models is in the file, so these are not looked at here.

    Raises:
        WeightsError: As ``load``.
    """
    if config.model == TRAINED:
        return
    hub.prepare(config.model)
    with torch.device("meta"):
        _sized(_created(config.model), config)


def at_random(config: EmbedConfig, seed: int) -> Any:
    """Return the network with the weights that training would begin with, for images of ``side_px``.

    Raises:
        WeightsError: As ``check``.
    """
    hub.prepare(config.model)
    with seeded(seed):
        return _sized(_created(config.model), config).eval()


def has_class_token(network: Any) -> bool:
    """Whether the first of the network's tokens is a class token."""
    return getattr(network, "cls_token", None) is not None


def _sized(network: Any, config: EmbedConfig) -> Any:
    if config.features in ("cls", "both") and not has_class_token(network):
        raise WeightsError(
            f"embed.features {config.features}: {config.model} has no class token; use pooled or default"
        )
    if config.side_px is None:
        return network
    patch_px = getattr(getattr(network, "patch_embed", None), "patch_size", (1,))[0]
    if config.side_px % patch_px:
        nearest = max(patch_px, round(config.side_px / patch_px) * patch_px)
        raise WeightsError(
            f"embed.side_px {config.side_px}: {config.model} sees patches of {patch_px} pixels; use {nearest}"
        )
    if hasattr(network, "set_input_size"):  # transformers; resamples position embeddings
        try:
            network.set_input_size(img_size=config.side_px)
        except _NOT_MADE as error:
            raise WeightsError(f"embed.side_px {config.side_px}: not possible with {config.model}: {error}") from error
    return network


def _created(model: str, **options: Any) -> Any:
    import timm

    try:
        return timm.create_model(model, **{"pretrained": False, "num_classes": 0} | options)
    except _NOT_MADE as error:
        raise WeightsError(f"embed.model {model}: cannot be made: {error}") from error


def _given(model: str, path: Path) -> Any:
    """Return a network with a user's file in it."""
    state = _state_dict(_read(path))
    num_classes = next((int(state[key].shape[0]) for key in _HEADS if key in state), 0)
    # With its classifier first: a file of the whole model then fits entry by entry.
    network = _created(model, num_classes=num_classes)
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    if set(wanted) != set(state):
        if [tuple(value.shape) for value in wanted.values()] != [tuple(value.shape) for value in state.values()]:
            return _converted(model, path)
        state = dict(zip(wanted, state.values(), strict=True))
    _fill(network, state, path)
    if num_classes:
        network.reset_classifier(0)
    return network


def _converted(model: str, path: Path, **options: Any) -> Any:
    """Return a network with a published file in it, converted as timm does when it downloads it itself."""
    overlay = {"state_dict": _read(path), "source": "", "file": "", "custom_load": False}
    try:
        # With its own classifier: told to leave it out, timm would leave out any other layer too, at random values.
        network = _created(model, num_classes=None, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except WeightsError as error:
        raise WeightsError(f"weights {path}: belong to another model than {model}: {str(error)[:500]}") from error
    network.reset_classifier(0)
    return network


def _trained(path: Path) -> Any:
    """Return the backbone that ``curate train`` has exported."""
    from timm.layers.mlp import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("model", "")
        model = json.loads(text[:_MAX_HEADER_CHARS])
        arguments: dict[str, Any] = dict(model["timm_arguments"])
        if model["config"]["ffn"] == "swiglu":
            arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
        network: Any = VisionTransformer(**arguments)
    except (*_UNREADABLE, *_NOT_MADE) as error:
        raise WeightsError(
            f"weights {path}: not a backbone that `curate train` exported ({error}); give its teacher.safetensors"
        ) from error
    _fill(network, _state_dict(_read(path)), path, strict=True)
    # As the trainer's own evaluation crops: the whole of a square, ImageNet's mean and deviation.
    network.pretrained_cfg = {"input_size": (3, arguments["img_size"], arguments["img_size"]), "crop_pct": 1.0}
    return network


def _fill(network: torch.nn.Module, state: dict[str, torch.Tensor], path: Path, strict: bool = False) -> None:
    try:
        network.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise WeightsError(f"weights {path}: belong to another model: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """Read named tensors, in plain containers at most; nothing in the file can run."""
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except _UNREADABLE as error:
        raise WeightsError(f"weights {path}: cannot be read as tensors: {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"weights {path}: not a state dict of tensors")
    return loaded


def _state_dict(loaded: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name, without a script's wrapping and without counters of batches."""
    for key in _WRAPPERS:
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {
        str(key): value
        for key, value in loaded.items()
        if isinstance(value, torch.Tensor) and not str(key).endswith("num_batches_tracked")
    }
