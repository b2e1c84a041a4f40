"""Look at weights again: the digest, and what the file holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from curation.errors import WeightsError
from curation.models.download import cached_files
from curation.models.formats import check_file
from curation.models.installed import file_digest
from curation.models.registry import Entry, registry
from curation.models.transport import redacted
from curation.models.weights import default_cache_dir, entry_of, is_url, locate, resolve


@dataclass(frozen=True)
class Verified:
    """The outcome for one file.

    Attributes:
        name: As asked for.
        ok: Whether the file is here, is what is pinned, and holds nothing that is refused.
        detail: Digest, path and what was looked at; or what is wrong.
    """

    name: str
    ok: bool
    detail: str


def verify(
    names: Sequence[str], *, entries: Mapping[str, Entry] | None = None, cache_dir: Path | None = None
) -> list[Verified]:
    """Verify weights; downloads nothing.

    Args:
        names: Registered names, paths, or URLs with their digest; none: every registered file that is here, and
            whatever else has been downloaded.
        entries: Entries by name; None: those of this package.
        cache_dir: None: see ``default_cache_dir``.

    Raises:
        WeightsError: The user's lock file is broken.
    """
    entries = registry() if entries is None else entries
    cache_dir = cache_dir or default_cache_dir()
    if names:
        return [_verified(name, entries, cache_dir) for name in names]
    places = {name: locate(entries[name], cache_dir).path for name in sorted(entries)}
    registered = [_verified(name, entries, cache_dir) for name, path in places.items() if path is not None]
    others = cached_files(cache_dir).items()  # of URLs, which the names of their files do not tell
    return registered + [_verified_download(path, digits) for path, digits in others if path not in places.values()]


def _verified_download(path: Path, digits: str) -> Verified:
    digest = file_digest(path, "")
    if not digest.startswith(digits):
        return Verified(path.name, False, f"{path} has sha256 {digest}, not {digits}...; delete it")
    try:
        looked = check_file(path, path.read_bytes())
    except WeightsError as error:
        return Verified(path.name, False, str(error))
    return Verified(path.name, True, f"{digest}  {path}  ({looked})")


def _verified(name: str, entries: Mapping[str, Entry], cache_dir: Path) -> Verified:
    licenses: list[str] = []
    if name in entries:
        where = locate(entries[name], cache_dir)
        if where.path is None:
            return Verified(name, False, where.advice)
        licenses.append(entries[name].license)  # looking is not using
    elif is_url(name):
        return _verified_url(name, entries, cache_dir)
    elif not Path(name).expanduser().is_file():
        return Verified(name, False, f"neither a file nor a registered name ({', '.join(sorted(entries))})")
    else:
        licenses.extend(entry.license for entry in entries.values())
    try:
        weights = resolve(name, licenses, registry=entries, cache_dir=cache_dir)
        looked = check_file(weights.path.with_suffix(".onnx") if weights.literal else weights.path, weights.read())
    except WeightsError as error:
        return Verified(name, False, str(error))
    return Verified(name, True, f"{weights.sha256}  {weights.path}  ({looked})")


def _verified_url(url: str, entries: Mapping[str, Entry], cache_dir: Path) -> Verified:
    try:
        where = locate(entry_of(url, entries, cache_dir), cache_dir)
    except WeightsError as error:
        return Verified(redacted(url), False, str(error))
    if where.path is None:
        return Verified(redacted(url), False, f"not here: run `curate models fetch {redacted(url)}#sha256=...`")
    digits = cached_files(cache_dir)[where.path]
    return replace(_verified_download(where.path, digits), name=redacted(url))
