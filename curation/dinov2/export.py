"""The teacher's backbone as others load it."""

import json

import torch
from torch import Tensor

from curation.dinov2.model import VisionTransformer
from curation.dinov2.tensors import whole

_TIMM_NAMES = (("register_tokens", "reg_token"), (".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))


def timm_state(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Return the weights under the names of timm's ``vit_*_dinov2`` and, with registers, ``vit_*_reg4_dinov2`` models.

    The mask token is left out. With registers timm keeps no position embedding of the class token, so it is added to
    the token itself: the same sum.
    """
    state = {name: whole(value.detach()).cpu() for name, value in backbone.state_dict().items() if name != "mask_token"}
    if backbone.config.registers:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return {_timm_name(name): value.contiguous() for name, value in state.items()}


def timm_arguments(backbone: VisionTransformer) -> dict[str, object]:
    """Return the arguments of ``timm.models.VisionTransformer`` that build the same network, but for layer classes.

    A SwiGLU model needs ``mlp_layer=timm.layers.SwiGLUPacked`` and ``act_layer=torch.nn.SiLU`` besides.
    """
    config, registers = backbone.config, backbone.config.registers
    hidden = backbone.state_dict()[f"blocks.0.mlp.{'w12' if config.ffn == 'swiglu' else 'fc1'}.weight"].shape[0]
    return {
        "img_size": backbone.grid * config.patch_px,
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


def _timm_name(name: str) -> str:
    for ours, theirs in _TIMM_NAMES:
        name = name.replace(ours, theirs)
    return name
