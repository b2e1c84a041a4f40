"""Encoders with a short name: ``embed.preset`` stands for a model, its weights, its features and its side."""

from collections.abc import Mapping
from typing import Any

HUB = "hub"  # weights: what timm publishes for the model
TRAINED = "curation-dinov2"  # model: the shape is written in the file that our own trainer exports


def _published(model: str, side_px: int | None, features: str) -> dict[str, Any]:
    return {"model": model, "weights": HUB, "side_px": side_px, "features": features}


# Licences: docs/embed.md. What is loaded is checked against the licence that timm states, not against this table.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "efficientnet-lite0": {
        "model": "tf_efficientnet_lite0",
        "weights": "efficientnet-lite0",
        "side_px": None,
        "features": "pooled",
    },
    "ijepa-vith16": _published("vit_huge_patch16_gap_448.in1k_ijepa", 224, "pooled"),
    "dinov2-vits14": _published("vit_small_patch14_reg4_dinov2.lvd142m", 224, "cls"),
    "dinov2-vitb14": _published("vit_base_patch14_reg4_dinov2.lvd142m", 224, "cls"),
    "dinov2-vitl14": _published("vit_large_patch14_reg4_dinov2.lvd142m", 224, "cls"),
    "dinov2-vitg14": _published("vit_giant_patch14_reg4_dinov2.lvd142m", 224, "cls"),
    "dinov3-vits16": _published("vit_small_patch16_dinov3.lvd1689m", 224, "cls"),
    "dinov3-vitb16": _published("vit_base_patch16_dinov3.lvd1689m", 224, "cls"),
    "dinov3-vitl16": _published("vit_large_patch16_dinov3.lvd1689m", 224, "cls"),
    "dinov3-vith16plus": _published("vit_huge_plus_patch16_dinov3.lvd1689m", 224, "cls"),
    "dinov3-vit7b16": _published("vit_7b_patch16_dinov3.lvd1689m", 224, "cls"),
}


def filled_in(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of ``embed`` with those of its preset where none are given; ``side_px`` may be another.

    Raises:
        ValueError: There is no such preset, or a setting contradicts it.
    """
    name = tree.get("preset")
    if not isinstance(name, str):  # a wrong type is reported with all other mistakes
        return dict(tree)
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name}; presets: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    for key in ("model", "weights", "features"):
        if tree.get(key, preset[key]) != preset[key]:
            raise ValueError(f"preset {name} has {key} {preset[key]}, but {key} is {tree[key]}; leave one of them out")
    return {**preset, **tree}
