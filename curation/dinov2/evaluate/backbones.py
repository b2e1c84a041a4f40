"""What can be evaluated, and what stands beside it: the same network at random, and raw pixels.

Whatever fits our own vision transformer is one: a run of ``curate train``, its exports for timm and transformers, and
the published DINOv2 checkpoints. Other models are made by timm, by name.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from curation.config.selection import EmbedConfig
from curation.dinov2 import colour, names, published
from curation.dinov2.checkpoint import Checkpoints, read_json
from curation.dinov2.config import CropsConfig, ModelConfig
from curation.dinov2.export import read_backbone
from curation.dinov2.model import VisionTransformer
from curation.encoder_presets import HUB, PRESETS
from curation.errors import TrainError, UsageError
from curation.models import networks
from curation.models.seeds import seeded
from curation.models.weights import HF_PREFIX, TIMM_PREFIX, resolve

_IMAGENET = (CropsConfig().mean, CropsConfig().std)
_HEAD_DIM = 64  # of every published vision transformer of this family
_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin"})


class Tokens(NamedTuple):
    """Normalised output of a block: class tokens, and patches (row-major) where the network has them."""

    cls_ND: Tensor
    patches_NPD: Tensor | None


class Backbone(Protocol):
    """A frozen network on its device.

    Attributes:
        name: For tables.
        side_px: Side of the images it was made for.
        patch_px: Side of a patch; 1 where it has none.
    """

    name: str
    side_px: int
    patch_px: int

    def __call__(self, pixels_NHW3: Tensor, num_blocks: int) -> list[Tokens]:
        """Return tokens after each of the last blocks, or as many as there are, oldest first; uint8 sRGB comes in."""
        ...

    def attention(self, pixels_NHW3: Tensor) -> Tensor | None:
        """Return how each head of the last block looks from the class token at the patches, (N, heads, P), or None."""
        ...


class VitBackbone:
    """Our own vision transformer.

    Args:
        name: For tables.
        network: With its weights.
        mean_std: What its pixels are normalised by.
        device: Where it runs.
    """

    def __init__(self, name: str, network: VisionTransformer, mean_std: tuple[Any, Any], device: torch.device) -> None:
        self.name = name
        self.patch_px = network.config.patch_px
        self.side_px = network.grid * self.patch_px
        self._network = network.eval().requires_grad_(False).to(device)
        self._mean_std = mean_std
        self._device = device

    def at_random(self, seed: int) -> "VitBackbone":
        """Return the same network with random weights, see the function of this name."""
        return at_random(self._network.config, self.side_px, self._mean_std, self._device, seed)

    def __call__(self, pixels_NHW3: Tensor, num_blocks: int) -> list[Tokens]:
        """See ``Backbone``."""
        x_N3HW = normalised(pixels_NHW3, *self._mean_std, self._device)
        return [Tokens(f.cls_ND, f.patches_NPD) for f in self._network.intermediate(x_N3HW, num_blocks)]

    def attention(self, pixels_NHW3: Tensor) -> Tensor | None:
        """See ``Backbone``."""
        config = self._network.config
        last: Any = self._network.blocks[-1]
        run = lambda: self(pixels_NHW3, 1)  # noqa: E731
        return attention_of_class_token(last.attn.qkv, run, len(pixels_NHW3), config.shape.heads, 1 + config.registers)


def at_random(
    model: ModelConfig, side_px: int, mean_std: tuple[Any, Any], device: torch.device, seed: int
) -> VitBackbone:
    """Return the network that training would begin with, but with LayerScale at 1, so that all blocks have a say.

    No global random state changes.
    """
    with seeded(seed):
        network = VisionTransformer(model.model_copy(update={"layer_scale": 1.0}), side_px)
    return VitBackbone("random initialisation", network, mean_std, device)


class TimmBackbone:
    """A model that timm makes.

    Args:
        name: For tables.
        network: Without classifier.
        device: Where it runs.
    """

    def __init__(self, name: str, network: Any, device: torch.device) -> None:
        from timm.data.config import resolve_model_data_config

        settings = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
        self.name = name
        self.side_px = int(settings["input_size"][-1])
        self.patch_px = int(getattr(getattr(network, "patch_embed", None), "patch_size", (1,))[0])
        self._mean_std = (settings["mean"], settings["std"])
        self._network = network.eval().requires_grad_(False).to(device)
        self._device = device

    def __call__(self, pixels_NHW3: Tensor, num_blocks: int) -> list[Tokens]:
        """See ``Backbone``."""
        x_N3HW = normalised(pixels_NHW3, *self._mean_std, self._device)
        network = self._network
        if getattr(network, "cls_token", None) is None:  # one vector an image: what stands before the classifier
            maps = network.forward_features(x_N3HW)
            pooled = network.forward_head(maps, pre_logits=True)
            return [Tokens(pooled, maps if maps.ndim == 3 else maps.flatten(2).transpose(1, 2))]
        blocks = network.forward_intermediates(
            x_N3HW,
            indices=min(num_blocks, len(network.blocks)),
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [Tokens(prefix_NTD[:, 0], patches_NPD) for patches_NPD, prefix_NTD in blocks]

    def attention(self, pixels_NHW3: Tensor) -> Tensor | None:
        """See ``Backbone``; None where the last block is no plain attention over a class token and patches."""
        attention: Any = getattr((getattr(self._network, "blocks", None) or [None])[-1], "attn", None)
        qkv = getattr(attention, "qkv", None)
        plain = all(isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm"))
        has_cls = getattr(self._network, "cls_token", None) is not None
        if (
            not isinstance(qkv, nn.Linear)
            or not plain
            or not has_cls
            or getattr(self._network, "rope", None) is not None
        ):
            return None
        run = lambda: self(pixels_NHW3, 1)  # noqa: E731
        return attention_of_class_token(
            qkv, run, len(pixels_NHW3), attention.num_heads, self._network.num_prefix_tokens
        )


class PixelBackbone:
    """Raw pixels as features."""

    name = "raw pixels"
    patch_px = 1

    def __init__(self, side_px: int, device: torch.device) -> None:
        self.side_px = side_px
        self._device = device

    def __call__(self, pixels_NHW3: Tensor, num_blocks: int) -> list[Tokens]:
        """Return the normalised pixels of each image as its class token; there are no patches."""
        return [Tokens(normalised(pixels_NHW3, *_IMAGENET, self._device).flatten(1), None)]

    def attention(self, pixels_NHW3: Tensor) -> Tensor | None:
        """Return None: pixels do not look at each other."""
        return None


def normalised(pixels_NHW3: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """Return (N, C, H, W) float32 with mean and deviation taken out; luma where there is one mean."""
    x_N3HW = pixels_NHW3.to(device).permute(0, 3, 1, 2).float() / 255
    mean_C11, std_C11 = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
    return ((colour.grey(x_N3HW) if len(mean) == 1 else x_N3HW) - mean_C11) / std_C11


def attention_of_class_token(qkv: nn.Module, run: Any, num_images: int, heads: int, num_prefix: int) -> Tensor:
    """Return softmax(q·k / √d) of the class token's row over the patches, (N, heads, P), float32.

    Args:
        qkv: The linear layer whose output is listened to.
        run: Runs the network once.
        num_images: In that run.
        heads: Attention heads.
        num_prefix: Tokens before the patches, the class token first.
    """
    heard: list[Tensor] = []
    handle = qkv.register_forward_hook(lambda module, inputs, output: heard.append(output.detach()))
    try:
        run()
    finally:
        handle.remove()
    q, k, _ = heard[-1].float().view(num_images, -1, 3, heads, heard[-1].shape[-1] // (3 * heads)).unbind(dim=2)
    scores_NHT = torch.einsum("nhd,nthd->nht", q[:, 0], k) / math.sqrt(q.shape[-1])
    return scores_NHT.softmax(dim=-1)[:, :, num_prefix:]


def load_backbone(
    what: str, device: torch.device, seed: int, *, network: str = "teacher", accept_licenses: tuple[str, ...] = ()
) -> tuple[Backbone, Backbone]:
    """Return a backbone, and the same network with random weights.

    Args:
        what: The ``--output`` folder of ``curate train``; a folder or file of ``curate export-model`` (timm,
            transformers); ``teacher.safetensors``; a published DINOv2 checkpoint; ``timm:NAME``,
            ``hf-hub:ORGANISATION/NAME``, or a preset of ``curation.encoder_presets``.
        device: Where they run.
        seed: Of the random weights.
        network: ``teacher`` or ``student``, of a run.
        accept_licenses: Non-commercial licences of published weights that are accepted.

    Raises:
        UsageError: It is none of these.
        TrainError: It cannot be read.
        WeightsError: timm does not know the name, or its licence is not accepted.
    """
    path = Path(what)
    if what in PRESETS or what.startswith((TIMM_PREFIX, HF_PREFIX)):
        return _of_timm(what, device, seed, accept_licenses)
    if (path / "train.json").exists():
        found, config, step = read_backbone(path, network)
        ours = VitBackbone(f"{network}, {step} steps", found, (config.crops.mean, config.crops.std), device)
    elif (path / "config.json").exists():
        ours = _of_folder(path, device)
    elif path.is_file() and path.suffix in _SUFFIXES:
        about, state = _read(path)
        model, side_px = _shape(path, about, state)
        ours = VitBackbone(path.name, _filled(path, model, side_px, state), _mean_std_beside(path), device)
    else:
        raise UsageError(
            f"{what}: is no backbone that can be evaluated; give the --output folder of `curate train`, a timm or "
            "transformers export (not TorchScript or ONNX: their weights cannot be made anew at random), a DINOv2 "
            f"checkpoint ({', '.join(sorted(_SUFFIXES))}), timm:NAME, or one of {', '.join(PRESETS)}"
        )
    return ours, ours.at_random(seed)


def _of_timm(what: str, device: torch.device, seed: int, accept_licenses: tuple[str, ...]) -> tuple[Backbone, Backbone]:
    if what in PRESETS:
        config = EmbedConfig(preset=what)
    else:
        config = EmbedConfig(model=what.removeprefix(TIMM_PREFIX), weights=HUB)
    published = config.model if config.model.startswith(HF_PREFIX) else f"{TIMM_PREFIX}{config.model}"
    networks.check(config)
    trained = networks.load(config, resolve(published if config.weights == HUB else config.weights, accept_licenses))
    random = networks.at_random(config, seed)
    return TimmBackbone(what, trained, device), TimmBackbone("random initialisation", random, device)


def _of_folder(folder: Path, device: torch.device) -> VitBackbone:
    about = read_json(folder / "config.json")
    pretrained = about.get("pretrained_cfg", {})
    preprocessing = folder / "preprocessor_config.json"
    if preprocessing.exists():
        seen = read_json(preprocessing)
        mean_std = (seen.get("image_mean", _IMAGENET[0]), seen.get("image_std", _IMAGENET[1]))
    else:
        mean_std = (pretrained.get("mean", _IMAGENET[0]), pretrained.get("std", _IMAGENET[1]))
    path = folder / "model.safetensors"
    header, state = _read(path)
    model, side_px = _shape(path, header, state, about)
    return VitBackbone(folder.name, _filled(path, model, side_px, state), mean_std, device)


def _mean_std_beside(path: Path) -> tuple[Any, Any]:
    """Return the mean and deviation of the run that a file lies in, such as ``teacher_best.safetensors``."""
    run = Checkpoints(path.parent, keep=1).identity()
    return _IMAGENET if run is None else (run.settings["crops.mean"], run.settings["crops.std"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of its shape, where it does, and its tensors under our names."""
    given = published.tensors(path)
    try:
        about: dict[str, Any] = {}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("model", "{}"))
        return {**about, "published": "mask_token" in given}, names.ours(given)
    except (ValueError, KeyError, RuntimeError) as error:
        raise TrainError(f"{path}: is not a DINOv2 vision transformer: {error}; try timm:NAME") from error


def _shape(
    path: Path, header: Mapping[str, Any], state: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, int]:
    """Return the model's settings and the side of its images: as written in the file, else read off its tensors."""
    try:
        patch_px = int(state["patch_embed.proj.weight"].shape[-1])
        side_px = math.isqrt(state["pos_embed"].shape[1] - 1) * patch_px
        if "config" in header:
            return ModelConfig.model_validate_json(json.dumps(header["config"])), side_px
        dim = int(state["cls_token"].shape[-1])
        gated = "blocks.0.mlp.w12.weight" in state
        registers = int(state["register_tokens"].shape[1]) if "register_tokens" in state else 0
        arguments = {**(about or {}), **(about or {}).get("model_args", {})}
        heads = arguments.get("num_attention_heads", arguments.get("num_heads", dim // _HEAD_DIM))
        # Published models without registers are resized without antialiasing and with an offset; those of transformers
        # without antialiasing; those of timm, and all with registers, with antialiasing.
        is_first = about is None and header.get("published", False) and not registers
        model = ModelConfig(
            dim=dim,
            depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            heads=int(heads),
            patch_px=patch_px,
            channels=int(state["patch_embed.proj.weight"].shape[1]),
            ffn="swiglu" if gated else "mlp",
            mlp_ratio=4.0 if gated else state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            registers=registers,
            pos_embed_antialias=not is_first and arguments.get("model_type") != "dinov2",
            pos_embed_offset=0.1 if is_first else 0.0,
        )
    except (KeyError, IndexError, ValueError, ValidationError) as error:
        raise TrainError(f"{path}: is not a DINOv2 vision transformer: {error}; try timm:NAME") from error
    return model, side_px


def _filled(path: Path, model: ModelConfig, side_px: int, state: dict[str, Tensor]) -> VisionTransformer:
    network = VisionTransformer(model, side_px)
    try:
        published.fit(state, network)
        network.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = published.in_short(error)
        raise TrainError(f"{path}: is not a DINOv2 vision transformer: {reason}; try timm:NAME") from error
    return network
