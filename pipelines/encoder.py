"""The encoder of the settings: what loads it, and what shapes its features."""

from typing import TYPE_CHECKING, Any

from curation.config import RunConfig
from curation.config.selection import EmbedConfig
from curation.encoder_presets import HUB
from curation.models.weights import HF_PREFIX, TIMM_PREFIX
from curation.pipelines.context import Context
from curation.pipelines.step_settings import plain

if TYPE_CHECKING:
    from curation.models.encoder import ImageEncoder


def encoder(context: Context, stage: str) -> "ImageEncoder":
    """Load the encoder on the device of a stage."""
    from curation.models.encoder import ImageEncoder  # takes torch and timm

    (weights,) = encoder_weights(context.config)
    return ImageEncoder(context.config.embed, context.weights(weights), device=context.device(stage))


def encoder_weights(config: RunConfig) -> tuple[str, ...]:
    """Return the name of the encoder's weights; those of the hub are named after the model."""
    model, weights = config.embed.model, config.embed.weights
    if weights != HUB:
        return (weights,)
    return (model if model.startswith(HF_PREFIX) else f"{TIMM_PREFIX}{model}",)


def encoder_settings(config: RunConfig) -> dict[str, Any]:
    """Return what shapes its features, as plain values."""
    return plain(config.embed, "preset", "weights")  # weights count by their digest


def check_encoder(config: RunConfig) -> None:
    """Refuse an encoder that cannot work; the default one can, and timm takes seconds to import."""
    default = EmbedConfig()
    if (config.embed.model, config.embed.features, config.embed.side_px) != (default.model, default.features, None):
        from curation.models import networks  # takes torch and timm

        networks.check(config.embed)
