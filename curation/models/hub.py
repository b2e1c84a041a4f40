"""Models as timm and the Hugging Face hub publish them: licence first, clear errors, offline only what is cached.

Two kinds of names: timm's own (``vit_base_patch16_224.augreg_in21k``), whose licence timm states, and
``hf-hub:organisation/name``, a timm model in anybody's repository, whose licence its model card states. A licence that
is stated nowhere is treated as one that was not accepted. In settings and fingerprints the weights of the first kind
are called ``timm:name``; both kinds are files in the hub client's or torch's cache, known by their sha256.
"""

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
from curation.models.installed import file_digest
from curation.models.registry import UNKNOWN_LICENSE
from curation.models.transport import offline_variable, redacted_text
from curation.models.weights import HF_PREFIX, TIMM_PREFIX, Weights, check_license

# Free for companies, but under conditions that somebody has to agree to.
_AGREEMENTS = frozenset({"dinov3-license", "gemma", "llama3", "llama3.1", "llama3.2", "openrail"})
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


def published(name: str, accept_licenses: Sequence[str]) -> Weights:
    """Return the file that is published for a model, downloaded if need be.

    Args:
        name: ``timm:`` and a timm name, or ``hf-hub:organisation/name``, with ``@revision`` where one is meant.
        accept_licenses: Licences that the user accepts: non-commercial ones, agreements, and ``unknown``.

    Raises:
        WeightsError: No such model, a licence not accepted, no network, or offline and not cached.
    """
    model = name.removeprefix(TIMM_PREFIX)
    prepare(model)
    license_id = _license_of_repository(model) if model.startswith(HF_PREFIX) else _license_of_timm(model)
    accepted = {accepted_id.lower() for accepted_id in accept_licenses}
    if license_id == UNKNOWN_LICENSE and UNKNOWN_LICENSE not in accepted:
        raise WeightsError(
            f"embed.model {model}: states no licence; add {UNKNOWN_LICENSE} to accept_licenses to use it"
        )
    if license_id.lower() in _AGREEMENTS and license_id.lower() not in accepted:
        raise WeightsError(
            f"embed.model {model}: {license_id} is an agreement with conditions of its own; read it, and add it to "
            "accept_licenses to use the model"
        )
    check_license(model, license_id, is_non_commercial(license_id), accept_licenses)
    try:
        path = _file(model)
    except _HUB_FAILURES as error:
        raise _failed(model, error) from error
    return Weights(path, file_digest(path, ""), license_id, name)


def is_non_commercial(license_id: str) -> bool:
    """Return whether a licence's name says that it is for research or not for commerce."""
    return _NON_COMMERCIAL.search(license_id) is not None


def prepare(model: str) -> None:
    """Make timm and the hub's client ready for a model.

    ``CURATION_OFFLINE`` holds for the client too, which has read its own variable at import.

    Raises:
        WeightsError: timm knows no such model, or this is no name of a repository.
    """
    torchvision_shim.prepare()
    import timm

    if model.startswith(HF_PREFIX):
        if not _REPOSITORY.fullmatch(model.removeprefix(HF_PREFIX)):
            raise WeightsError(
                f"embed.model {model}: write {HF_PREFIX}organisation/name, or {HF_PREFIX}organisation/name@revision"
            )
    elif not timm.is_model(model.partition(".")[0]):
        raise WeightsError(f"embed.model {model}: timm {timm.__version__} knows no such model")
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

    repository = model.removeprefix(HF_PREFIX)
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


def _file(model: str) -> Path:
    """Return the published file, as timm would choose it: safetensors where there are some."""
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, download_cached_file, hf_split

    if model.startswith(HF_PREFIX):
        repository, filename = model.removeprefix(HF_PREFIX), HF_WEIGHTS_NAME
    else:
        config: Any = timm.get_pretrained_cfg(model, allow_unregistered=False)
        if not config.hf_hub_id:
            return Path(download_cached_file(str(config.url)))
        repository, filename = str(config.hf_hub_id), str(config.hf_hub_filename or HF_WEIGHTS_NAME)
    name, revision = hf_split(repository)
    if not filename.endswith(".safetensors"):
        for safe in _get_safe_alternatives(filename):
            try:
                return Path(hf_hub_download(name, safe, revision=revision))
            except EntryNotFoundError:
                continue
    return Path(hf_hub_download(name, filename, revision=revision))


def _failed(model: str, error: Exception) -> WeightsError:
    offline = offline_variable()
    because = f" ({offline} forbids to download)" if offline else ""
    return WeightsError(
        f"embed.model {model}: no weights from the hub{because}: {redacted_text(str(error))}; "
        "set embed.weights to the path of a file that you have"
    )
