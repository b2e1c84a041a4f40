"""What of the settings shapes the output of a step, as plain values for its fingerprint."""

from typing import Any

from curation.config import RunConfig
from curation.settings import Settings


def plain(settings: Settings, *without: str) -> dict[str, Any]:
    """Return settings as plain values, but for the names in ``without``."""
    return settings.model_dump(mode="json", exclude=set(without))


def limits(config: RunConfig) -> dict[str, Any]:
    """Return what images are refused for; threads and deadlines change no pixel."""
    return plain(config.images, "decode_threads", "decode_timeout_s", "prepare_timeout_s")
