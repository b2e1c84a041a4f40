"""The same backbone under the names that others give its weights, both ways.

Ours are those of the published DINOv2 checkpoints, whose blocks may also be numbered within chunks
(``blocks.<chunk>.<block>``). Conversions copy nothing but what has to be put together or taken apart.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_TIMM = (("register_tokens", "reg_token"), (".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))
_TRANSFORMERS = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)
_QKV = ("query", "key", "value")


def to_timm(state: State) -> dict[str, Tensor]:
    """Return the names of timm's ``vit_*_dinov2`` and, with registers, ``vit_*_reg4_dinov2`` models.

    timm has no mask token. With registers it keeps no position embedding of the class token, which is added to the
    token itself: the same sum.
    """
    state = {name: value for name, value in state.items() if name != "mask_token"}
    if "register_tokens" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return {_renamed(name, _TIMM): value for name, value in state.items()}


def from_timm(state: State) -> dict[str, Tensor]:
    """Return our names of a timm model; the mask token, which timm has not, is zero."""
    has_registers = "reg_token" in state
    is_gated = _is_gated(state, "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    table = _TIMM if is_gated else _TIMM[:1]
    ours = {_renamed(name, table, back=True): value for name, value in state.items()}
    if has_registers:
        ours["pos_embed"] = torch.cat([torch.zeros_like(ours["cls_token"]), ours["pos_embed"]], dim=1)
    ours["mask_token"] = torch.zeros_like(ours["cls_token"][0])
    return ours


def to_transformers(state: State) -> dict[str, Tensor]:
    """Return the names of the files of transformers' ``Dinov2Model`` and ``Dinov2WithRegistersModel``.

    The latter's has a register embedding even where there are no registers: of no rows.
    """
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        renamed = _renamed(name, _TRANSFORMERS)
        if ".attn.qkv." in renamed:
            for part, third in zip(_QKV, value.chunk(3), strict=True):
                named[renamed.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        elif name.startswith("norm."):
            named[f"layer{name}"] = value
        else:
            named[renamed] = value
    return named


def from_transformers(state: State) -> dict[str, Tensor]:
    """Return our names of the file of a transformers model."""
    parts = {name for name in state if ".attention.attention.query." in name}
    ours = {
        name.replace(".attention.attention.query.", ".attn.qkv."): torch.cat(
            [state[name.replace(".query.", f".{part}.")] for part in _QKV]
        )
        for name in parts
    }
    ours |= {name: value for name, value in state.items() if ".attention.attention." not in name}
    renamed = {_renamed(name, _TRANSFORMERS, back=True): value for name, value in ours.items()}
    renamed = {re.sub(r"^layernorm\.", "norm.", name): value for name, value in renamed.items()}
    if "register_tokens" in renamed and not renamed["register_tokens"].shape[1]:
        del renamed["register_tokens"]
    return renamed


def from_published(state: State) -> dict[str, Tensor]:
    """Return our names of a published checkpoint: blocks numbered through, whether they were in chunks or not."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in state.items()}


def ours(state: State) -> dict[str, Tensor]:
    """Return our names, whichever of the three the weights come with."""
    if "embeddings.cls_token" in state:
        return from_transformers(state)
    return from_published(state) if "mask_token" in state else from_timm(state)


def _is_gated(state: State, first: str, second: str) -> bool:
    """Whether a feed-forward layer has a gate: its first matrix then makes twice what its second takes."""
    return first in state and state[first].shape[0] == 2 * state[second].shape[1]


def _renamed(name: str, table: tuple[tuple[str, str], ...], *, back: bool = False) -> str:
    for ours_, theirs in table:
        old, new = (theirs, ours_) if back else (ours_, theirs)
        if old in name:
            name = name.replace(old, new)
    return name
