"""A trained backbone as others load it: timm, transformers, TorchScript, ONNX."""

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from curation.dinov2 import names
from curation.dinov2.checkpoint import Checkpoints, clear_errors, write_json, write_tensors, write_whole
from curation.dinov2.config import TrainConfig
from curation.dinov2.model import VisionTransformer
from curation.dinov2.tensors import whole
from curation.errors import TrainError
from curation.settings import parse

_MAX_IMAGE_PX = 8192


def timm_state(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return the weights under timm's names, on the CPU; where they are in parts all processes must ask."""
    state = {name: whole(value.detach()).cpu() for name, value in backbone.state_dict().items()}
    return {name: value.contiguous() for name, value in names.to_timm(state).items()}


def timm_arguments(backbone: VisionTransformer) -> dict[str, object]:
    """Return the arguments of ``timm.models.VisionTransformer`` that build the same network, but for layer classes.

    A SwiGLU model needs ``mlp_layer=timm.layers.SwiGLUPacked`` and ``act_layer=torch.nn.SiLU`` besides.
    """
    config, registers = backbone.config, backbone.config.registers
    hidden = backbone.state_dict()[f"blocks.0.mlp.{'w12' if config.ffn == 'swiglu' else 'fc1'}.weight"].shape[0]
    return {
        "img_size": backbone.grid * config.patch_px,
        "in_chans": config.channels,
        "patch_size": config.patch_px,
        "embed_dim": config.shape.dim,
        "depth": config.shape.depth,
        "num_heads": config.shape.heads,
        "mlp_ratio": hidden / config.shape.dim,
        "init_values": config.layer_scale,
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
        "num_classes": 0,
        "global_pool": "token",
    }


def metadata(backbone: VisionTransformer, step: int) -> dict[str, str]:
    """Return what ``teacher.safetensors`` says about itself, JSON under ``model``."""
    model = {"timm_arguments": timm_arguments(backbone), "config": backbone.config.model_dump(mode="json")}
    return {"format": "pt", "step": str(step), "torch": str(torch.__version__), "model": json.dumps(model)}


@dataclass(frozen=True)
class StoredRun:
    """The newest checkpoint of a training run.

    Attributes:
        config: The run's settings.
        step: Finished steps.
        tensors: As ``curation.dinov2.checkpoint`` lists them.
        path: The file of the tensors.
    """

    config: TrainConfig
    step: int
    tensors: dict[str, Tensor]
    path: Path

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with a prefix, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def read_run(run: Path) -> StoredRun:
    """Return what is stored of a training run.

    Args:
        run: The folder that ``curate train`` wrote to.

    Raises:
        TrainError: There is no complete checkpoint.
    """
    checkpoints = Checkpoints(run, keep=1)
    identity = checkpoints.identity()
    newest = checkpoints.newest() if identity is not None else None
    if identity is None or newest is None:
        raise TrainError(f"{run}: holds no checkpoint; name the --output folder of `curate train`")
    progress, tensors, path = newest
    config = parse(TrainConfig, _nested(identity.settings), str(run / "train.json"))
    return StoredRun(config, progress.step, tensors, path)


def read_backbone(run: Path, network: str = "teacher") -> tuple[VisionTransformer, TrainConfig, int]:
    """Return the backbone of a training run's newest checkpoint, its settings and the finished steps.

    Args:
        run: The folder that ``curate train`` wrote to.
        network: ``teacher`` or ``student``.

    Raises:
        TrainError: There is no complete checkpoint, or its tensors are not what its settings make.
    """
    stored = read_run(run)
    backbone = VisionTransformer(stored.config.model, stored.config.crops.global_px)
    try:
        backbone.load_state_dict(stored.under(f"{network}/backbone."))
    except RuntimeError as error:
        raise TrainError(f"{stored.path}: is not what its settings make: {error}") from error
    return backbone.eval().requires_grad_(False), stored.config, stored.step


def export_timm(backbone: VisionTransformer, config: TrainConfig, step: int, output: Path) -> None:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    It takes images of any size, unless position embeddings are resized in a way that timm has not: with an offset, or
    without antialiasing.
    """
    arguments = timm_arguments(backbone)
    gated, registers = backbone.config.ffn == "swiglu", bool(backbone.config.registers)
    size = "giant" if gated else "small"  # which layers it has; every width is among the arguments
    arguments |= {"dynamic_img_size": backbone.config.pos_embed_antialias and not backbone.config.pos_embed_offset}
    side_px = backbone.grid * backbone.config.patch_px
    about = {
        "architecture": f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": backbone.config.shape.dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [backbone.config.channels, side_px, side_px],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(config.crops.mean),
            "std": list(config.crops.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _folder(output)
    write_tensors(output / "model.safetensors", timm_state(backbone), metadata(backbone, step))
    write_json(output / "config.json", about)


def export_transformers(backbone: VisionTransformer, config: TrainConfig, step: int, output: Path) -> None:
    """Write a folder that ``transformers.AutoModel.from_pretrained`` loads.

    ``Dinov2Model`` resizes position embeddings without antialiasing, ``Dinov2WithRegistersModel`` with it: the class
    is chosen by that, and may have no registers.

    Raises:
        TrainError: Position embeddings are resized in a way that transformers has not for such a model.
    """
    model = backbone.config
    if model.pos_embed_offset:
        raise TrainError(
            f"model.pos_embed_offset {model.pos_embed_offset}: transformers knows no offset, so sizes other than the "
            "trained one would differ; use --format timm or torchscript"
        )
    if model.registers and not model.pos_embed_antialias:
        raise TrainError(
            "model.pos_embed_antialias false: transformers always antialiases where there are registers, so sizes "
            "other than the trained one would differ; use --format timm or torchscript"
        )
    if model.mlp_ratio != int(model.mlp_ratio):
        raise TrainError(
            f"model.mlp_ratio {model.mlp_ratio}: transformers takes whole numbers; use --format timm or torchscript"
        )
    with_registers = bool(model.registers) or model.pos_embed_antialias
    side_px = backbone.grid * model.patch_px
    state = {name: value.cpu().contiguous() for name, value in names.to_transformers(backbone.state_dict()).items()}
    about: dict[str, Any] = {
        "architectures": ["Dinov2WithRegistersModel" if with_registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if with_registers else "dinov2",
        "hidden_size": model.shape.dim,
        "num_hidden_layers": model.shape.depth,
        "num_attention_heads": model.shape.heads,
        "mlp_ratio": int(model.mlp_ratio),
        "use_swiglu_ffn": model.ffn == "swiglu",
        "image_size": side_px,
        "patch_size": model.patch_px,
        "num_channels": model.channels,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }
    if with_registers:
        about["num_register_tokens"] = model.registers
        state.setdefault("embeddings.register_tokens", torch.zeros(1, 0, model.shape.dim))
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side_px},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side_px, "width": side_px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.crops.mean),
        "image_std": list(config.crops.std),
    }
    _folder(output)
    write_tensors(output / "model.safetensors", state, {"format": "pt", "step": str(step)})
    write_json(output / "preprocessor_config.json", preprocessing)
    write_json(output / "config.json", about)


def at_size(backbone: VisionTransformer, image_px: int) -> VisionTransformer:
    """Return the backbone with position embeddings for images of another size.

    Raises:
        TrainError: The size is no multiple of the patch, or larger than any image.
    """
    if image_px % backbone.config.patch_px or image_px > _MAX_IMAGE_PX:
        raise TrainError(
            f"--image-px {image_px} must be a multiple of the patch, {backbone.config.patch_px}, of at most "
            f"{_MAX_IMAGE_PX}"
        )
    other = VisionTransformer(backbone.config, image_px)
    state = {**backbone.state_dict(), "pos_embed": backbone.positions(other.grid, other.grid)}
    other.load_state_dict(state)
    return other.eval().requires_grad_(False)


class Plain(nn.Module):
    """A backbone as a function of one batch: normalised class and patch tokens."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return class tokens (N, D) and patch tokens (N, P, D)."""
        features = self.backbone([x_NCHW])[0]
        return features.cls_ND, features.patches_NPD


def export_torchscript(backbone: VisionTransformer, config: TrainConfig, step: int, output: Path) -> None:
    """Write a TorchScript file: any number of images of the grid's size give class and patch tokens."""
    side_px = backbone.grid * backbone.config.patch_px
    about = {"curation.json": json.dumps({"mean": config.crops.mean, "std": config.crops.std, "step": step})}
    content = io.BytesIO()  # PyTorch's own writer ends the process on a full disk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather have another format, and traces shapes as constants
        trace: Callable[..., torch.jit.ScriptModule] = torch.jit.trace  # typed in some builds of PyTorch only
        traced = trace(Plain(backbone).eval(), torch.zeros(2, backbone.config.channels, side_px, side_px))
        torch.jit.save(traced, content, _extra_files=about)
    _folder(output.parent)
    write_whole(output, lambda temporary: temporary.write_bytes(content.getbuffer()))


def export_onnx(backbone: VisionTransformer, config: TrainConfig, step: int, output: Path) -> None:
    """Write an ONNX file: any number of images of the grid's size, ``images``, give ``cls`` and ``patches``.

    Raises:
        TrainError: The packages that PyTorch writes ONNX with are missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise TrainError("--format onnx needs the packages onnx and onnxscript: pip install onnx onnxscript")
    side_px = backbone.grid * backbone.config.patch_px
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = torch.onnx.export(
            Plain(backbone).eval(),
            (torch.zeros(2, backbone.config.channels, side_px, side_px),),
            input_names=["images"],
            output_names=["cls", "patches"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise TrainError("PyTorch made no ONNX program of this backbone")
    about = {"mean": json.dumps(config.crops.mean), "std": json.dumps(config.crops.std), "step": str(step)}
    program.model.metadata_props.update(about)
    _folder(output.parent)
    with clear_errors(output, output.name), TemporaryDirectory(prefix=".", dir=output.parent) as folder:
        program.save(Path(folder) / output.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights of large models lie beside: first
            file.replace(output.with_name(file.name))


FORMATS: Mapping[str, Callable[[VisionTransformer, TrainConfig, int, Path], None]] = {
    "timm": export_timm,
    "transformers": export_transformers,
    "torchscript": export_torchscript,
    "onnx": export_onnx,
}


def _folder(path: Path) -> None:
    with clear_errors(path, "the folder"):
        path.mkdir(parents=True, exist_ok=True)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
