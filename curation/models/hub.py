"""Models as timm and the Hugging Face hub publish them: licence first, clear errors, offline only what is cached.

Two kinds of names: timm's own (``vit_base_patch16_224.augreg_in21k``), whose licence timm states, and
``hf-hub:organisation/name``, a timm model in anybody's repository, whose licence its model card states. A licence that
is stated nowhere is treated as one that was not accepted. Files are read as safetensors, or with ``weights_only``.
"""

import hashlib
import pickle
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from curation.errors import WeightsError
from curation.models import torchvision_shim
from curation.models.registry import UNKNOWN_LICENSE
from curation.models.transport import offline_variable, redacted_text
from curation.models.weights import check_license

PREFIX = "hf-hub:"
_NON_COMMERCIAL = re.compile(r"(?:^|[-_ ])nc(?:[-_ ]|$)|non-?commercial|research", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_MAX_CARD_CHARS = 100_000
# What timm and the hub's client were seen to raise: no network, no file, a file of something else.
_HUB_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SafetensorError,
    pickle.UnpicklingError,
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w.-]+)?")


def load_published(model: str, accept_licenses: Sequence[str]) -> tuple[Any, str, str]:
    """Return a network without its classifier, the digest of its tensors, and their licence.

    Args:
        model: A timm name, or ``hf-hub:organisation/name``, with ``@revision`` where one is meant.
        accept_licenses: Licences that the user accepts: non-commercial ones, and ``unknown``.

    Raises:
        WeightsError: No such model, a licence not accepted, no network, or offline and not cached.
    """
    torchvision_shim.prepare()
    _honour_offline()
    license_id = _license_of_repository(model) if model.startswith(PREFIX) else _license_of_timm(model)
    if license_id == UNKNOWN_LICENSE and UNKNOWN_LICENSE not in accept_licenses:
        raise WeightsError(
            f"embed.model {model}: states no licence; add {UNKNOWN_LICENSE} to accept_licenses to use it"
        )
    check_license(model, license_id, is_non_commercial(license_id), accept_licenses)
    network = _created(model)
    return network, _tensor_digest(network), license_id


def is_non_commercial(license_id: str) -> bool:
    """Return whether a licence's name says that it is for research or not for commerce."""
    return _NON_COMMERCIAL.search(license_id) is not None


def _honour_offline() -> None:
    """Make ``CURATION_OFFLINE`` hold for the hub's client too, which has read its own variable at import."""
    if offline_variable():
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True


def _license_of_timm(model: str) -> str:
    import timm

    published = timm.get_pretrained_cfg(model, allow_unregistered=False)
    if published is None or not published.has_weights:
        raise WeightsError(f"embed.model {model}: timm has no weights on the hub for it")
    if offline_variable() and not published.hf_hub_id and published.url:
        name = Path(urllib.parse.urlsplit(str(published.url)).path).name
        if not (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file():
            raise WeightsError(
                f"embed.model {model}: {name} is not cached, and {offline_variable()} forbids to download it"
            )
    return str(published.license or UNKNOWN_LICENSE)


def _license_of_repository(model: str) -> str:
    """Return what the model card states, else what the model's settings do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from timm.models import load_model_config_from_hf

    repository = model.removeprefix(PREFIX)
    if not _REPOSITORY.fullmatch(repository):
        raise WeightsError(
            f"embed.model {model}: write {PREFIX}organisation/name, or {PREFIX}organisation/name@revision"
        )
    name, _, revision = repository.partition("@")
    try:
        settings, architecture, _ = load_model_config_from_hf(repository)
        stated = str(settings.get("license") or "")
        _check_architecture(model, architecture)
        try:
            card = Path(hf_hub_download(name, "README.md", revision=revision or None))
        except RemoteEntryNotFoundError:
            return stated or UNKNOWN_LICENSE
        return license_in_card(card.read_text(encoding="utf-8", errors="replace")) or stated or UNKNOWN_LICENSE
    except _HUB_FAILURES as error:
        raise _failed(model, error) from error


def license_in_card(text: str) -> str:
    """Return the licence that a model card's front matter states; empty where it states none."""
    matter = _FRONT_MATTER.match(text[:_MAX_CARD_CHARS])
    try:
        stated = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return ""
    if not isinstance(stated, dict):
        return ""
    license_id = stated.get("license")
    if license_id == "other":
        license_id = stated.get("license_name")
    return license_id if isinstance(license_id, str) else ""


def _check_architecture(model: str, architecture: object) -> None:
    import timm

    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise WeightsError(f"embed.model {model}: timm {timm.__version__} does not know its architecture")


def _created(model: str) -> Any:
    import timm

    try:
        return timm.create_model(model, pretrained=True, num_classes=0)
    except _HUB_FAILURES as error:
        raise _failed(model, error) from error


def _failed(model: str, error: Exception) -> WeightsError:
    offline = offline_variable()
    because = f" ({offline} forbids to download)" if offline else ""
    return WeightsError(
        f"embed.model {model}: cannot be made with weights from the hub{because}: {redacted_text(str(error))}; "
        "set embed.weights to the path of a file that you have"
    )


def _tensor_digest(network: torch.nn.Module) -> str:
    """Return the sha256 of all tensors: the hub's files carry no digest that is known before."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
