"""Weights by name: found, checked, and fetched where need be.

A name resolves in this order: an existing path; the file that an installed package ships, found by the package's
metadata and never by importing it; the cache; a download. Whatever is found has to have the pinned sha256. A URL
resolves only with the digest in it (``https://host/model.onnx#sha256=<64 hex digits>``). Files that can run code when
loaded (pickles) are never loaded; ``formats.py`` says what else is refused.
"""

import hashlib
import logging
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from curation.errors import WeightsError
from curation.models.download import Progress, Source, cached_path, download
from curation.models.installed import file_digest, installed_file, model_bytes, ways_out
from curation.models.lockfile import Pin, parse_sha256, write_pin
from curation.models.registry import LOCK_NAME, UNKNOWN_LICENSE, Entry, registered, registry, with_user_pin
from curation.models.transport import check_url, redacted

__all__ = [
    "HF_PREFIX",
    "TIMM_PREFIX",
    "UNKNOWN_LICENSE",
    "Entry",
    "Located",
    "Weights",
    "check_license",
    "default_cache_dir",
    "entry_of",
    "fetch",
    "is_url",
    "locate",
    "registered",
    "resolve",
]

_log = logging.getLogger(__name__)
TIMM_PREFIX, HF_PREFIX = "timm:", "hf-hub:"  # weights that are published with a model, see ``hub.py``
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_url(name: str) -> bool:
    """Whether a setting names a file by its URL."""
    return _URL.match(name) is not None


@dataclass(frozen=True)
class Weights:
    """A file that is there and is what it should be.

    Attributes:
        path: The file.
        sha256: Digest of the model's bytes, hex; the model's identity in fingerprints.
        license: SPDX expression, or ``unknown`` for a path or URL that is not registered.
        name: Registered name, or the file's name.
        literal: See ``Entry.literal``.
    """

    path: Path
    sha256: str
    license: str
    name: str
    literal: str = ""

    def read(self) -> bytes:
        """Return the model's bytes.

        Raises:
            WeightsError: The file has changed since its digest was taken.
        """
        data = model_bytes(self.path, self.literal)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise WeightsError(f"weights {self.name}: {self.path} has changed since it was checked")
        return data


@dataclass(frozen=True)
class Located:
    """Where the file of an entry is, as far as can be said without reading it or asking the network.

    Attributes:
        state: ``installed``, ``cached``, ``not fetched`` (pinned, with a URL), ``not pinned`` (a URL without a
            digest) or ``not installed``.
        path: The file, where there is one.
        advice: What to do where there is none.
    """

    state: str
    path: Path | None
    advice: str = ""


def resolve(
    name_or_path: str,
    accept_licenses: Sequence[str] = (),
    *,
    registry: Mapping[str, Entry] | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Return the weights of a name, path or URL, checked against their digest and licence.

    Args:
        name_or_path: A registered name, a file, or a URL that ends in ``#sha256=<64 hex digits>``. A name that is
            registered wins over a file of that name; write ``./name`` for the file. ``timm:model`` and
            ``hf-hub:organisation/name`` are what is published for a model.
        accept_licenses: Non-commercial licences that the user accepts.
        registry: Entries by name; None: those of this package.
        cache_dir: Where downloads lie; None: see ``default_cache_dir``.
        progress: Told of a download's bytes.

    Raises:
        WeightsError: The file is missing, differs from its digest, cannot be downloaded, or its licence is not
            accepted; the message says what to do.
    """
    if name_or_path.startswith((TIMM_PREFIX, HF_PREFIX)):
        from curation.models import hub  # takes torch and timm

        return hub.published(name_or_path, accept_licenses)
    cache_dir = cache_dir or default_cache_dir()
    entries = _entries(registry)
    if name_or_path not in entries and not is_url(name_or_path):
        return _from_path(name_or_path, accept_licenses, entries)
    entry = entry_of(name_or_path, entries, cache_dir)
    if name_or_path not in entries and "?" in entry.url:
        raise WeightsError(
            f"{redacted(entry.url)}: its query may be a credential, which settings would keep; run `curate models "
            "fetch` with it once, and leave it out in settings: the file is then found in the cache"
        )
    check_license(entry.name, entry.license, entry.non_commercial, accept_licenses)
    found = locate(entry, cache_dir)
    if found.path is not None:
        return _checked(entry, found.path, entry.literal if found.state == "installed" else "")
    if found.state != "not fetched":
        raise WeightsError(f"weights {entry.name}: {found.advice}")
    _log.info("downloading weights %s from %s", entry.name, redacted(entry.url))
    return _downloaded(entry, cache_dir, progress)


def fetch(
    name_or_url: str,
    accept_licenses: Sequence[str] = (),
    *,
    sha256: str = "",
    trust_first_download: bool = False,
    registry: Mapping[str, Entry] | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Bring weights into the cache, and pin their digest where nobody has pinned one.

    Args:
        name_or_url: A registered name, or a URL.
        accept_licenses: Non-commercial licences that the user accepts.
        sha256: The digest that the file has to have; kept in the cache's lock file for a name that has none yet.
        trust_first_download: Take the digest of what arrives, and keep that; for names only.
        registry: Entries by name; None: those of this package.
        cache_dir: None: see ``default_cache_dir``.
        progress: Told of a download's bytes.

    Raises:
        WeightsError: See ``resolve``; also a digest that differs from the pinned one. A cached file that is not
            what is pinned is replaced.
    """
    cache_dir = cache_dir or default_cache_dir()
    entry = entry_of(name_or_url, _entries(registry), cache_dir, sha256)
    given = parse_sha256(sha256) if sha256 else ""
    if given and entry.sha256 and given != entry.sha256:
        raise WeightsError(f"weights {entry.name}: sha256 {given} was given, but {entry.sha256} is pinned")
    check_license(entry.name, entry.license, entry.non_commercial, accept_licenses)
    found = locate(entry, cache_dir)
    if entry.sha256:
        return _fetch_pinned(entry, found, cache_dir, progress)
    if not given and not trust_first_download:
        raise WeightsError(f"weights {entry.name}: {found.advice}")
    weights = _downloaded(replace(entry, sha256=given), cache_dir, progress)
    trusted = "given" if given else "first download"
    pin = Pin(weights.sha256, weights.path.stat().st_size, redacted(entry.url), trusted)
    write_pin(cache_dir / LOCK_NAME, entry.name, pin)
    return weights


def locate(entry: Entry, cache_dir: Path | None = None) -> Located:
    """Return where the file of an entry is; asks no network, hashes nothing.

    Raises:
        WeightsError: The user's lock file is broken.
    """
    cache_dir = cache_dir or default_cache_dir()
    entry = with_user_pin(entry, cache_dir)
    installed = installed_file(entry)
    if installed is not None:
        return Located("installed", installed)
    if entry.url and entry.sha256:
        cached = cached_path(_source(entry), cache_dir)
        if cached.is_file():
            return Located("cached", cached)
        other = f"; or {ways_out(entry)}" if entry.requirement else ""
        return Located("not fetched", None, f"run `curate models fetch {entry.name}`{other}")
    if entry.url:
        return Located(
            "not pinned",
            None,
            f"nobody states the sha256 of {redacted(entry.url)}: run `curate models fetch {entry.name} --sha256 HEX` "
            "if you know it, or `--trust-first-download` to pin what arrives first",
        )
    return Located("not installed", None, ways_out(entry))


def entry_of(name_or_url: str, entries: Mapping[str, Entry], cache_dir: Path, sha256: str = "") -> Entry:
    """Return the entry of a name, with the user's pin, or one made of a URL and its digest.

    Raises:
        WeightsError: No registered name and no URL, or a URL without a digest.
    """
    if name_or_url in entries:
        return with_user_pin(entries[name_or_url], cache_dir)
    if not is_url(name_or_url):
        raise WeightsError(f"weights {name_or_url}: not a registered name ({', '.join(sorted(entries))}) and no URL")
    url, _, fragment = name_or_url.partition("#")
    check_url(url)
    stated = dict(urllib.parse.parse_qsl(fragment)).get("sha256", "") or sha256
    if not stated:
        raise WeightsError(f"{redacted(url)}: add #sha256=<64 hex digits>; a URL without its digest is not downloaded")
    digest = parse_sha256(stated)
    for entry in entries.values():
        if entry.sha256 == digest:
            return replace(entry, url=url, requirement="")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(urllib.parse.urlsplit(url).path).name.partition(".")[0])[:60]
    return Entry(stem or "weights", "", UNKNOWN_LICENSE, False, "", url=url, sha256=digest)


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
    """Return the folder of downloads: ``CURATION_CACHE``, else ``curation`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("CURATION_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "curation"


def _entries(entries: Mapping[str, Entry] | None) -> Mapping[str, Entry]:
    return registry() if entries is None else entries


def _fetch_pinned(entry: Entry, found: Located, cache_dir: Path, progress: Progress | None) -> Weights:
    if found.state == "installed" and found.path is not None:
        return _checked(entry, found.path, entry.literal)
    if found.state == "not installed":
        raise WeightsError(f"weights {entry.name}: {found.advice}")
    if found.path is not None:
        if file_digest(found.path, "") == entry.sha256:
            return Weights(found.path, entry.sha256, entry.license, entry.name)
        _log.warning("%s is not what is pinned; fetching it again", found.path)
        found.path.unlink(missing_ok=True)
    return _downloaded(entry, cache_dir, progress)


def _downloaded(entry: Entry, cache_dir: Path, progress: Progress | None) -> Weights:
    done = download(_source(entry), cache_dir, progress=progress)
    return Weights(done.path, done.sha256, entry.license, entry.name)


def _source(entry: Entry) -> Source:
    return Source(entry.name, entry.url, entry.sha256, entry.num_bytes)


def _checked(entry: Entry, path: Path, literal: str) -> Weights:
    digest = file_digest(path, literal)
    if digest != entry.sha256:
        again = (
            f"install {entry.requirement} again" if literal or not entry.url else f"curate models fetch {entry.name}"
        )
        raise WeightsError(
            f"weights {entry.name}: {path} has sha256 {digest}, but {LOCK_NAME} pins {entry.sha256}; it is not used: "
            f"{again}, or set weights to the path of a file you trust"
        )
    return Weights(path, digest, entry.license, entry.name, literal)


def _from_path(name_or_path: str, accept_licenses: Sequence[str], entries: Mapping[str, Entry]) -> Weights:
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(entries))
        raise WeightsError(f"weights {name_or_path}: neither a file nor a registered name ({names})")
    digest = file_digest(path, "")
    for entry in entries.values():
        if digest == entry.sha256:
            check_license(entry.name, entry.license, entry.non_commercial, accept_licenses)
            return Weights(path, digest, entry.license, entry.name)
    return Weights(path, digest, UNKNOWN_LICENSE, path.name)
