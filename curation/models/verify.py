"""Look at weights again: the digest, and what the file holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.errors import WeightsError
from curation.models.formats import check_file
from curation.models.registry import Entry, registry
from curation.models.weights import default_cache_dir, locate, resolve


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
        names: Registered names or paths; none: every registered file that is here.
        entries: Entries by name; None: those of this package.
        cache_dir: None: see ``default_cache_dir``.

    Raises:
        WeightsError: The user's lock file is broken.
    """
    entries = registry() if entries is None else entries
    cache_dir = cache_dir or default_cache_dir()
    here = [name for name in sorted(entries) if locate(entries[name], cache_dir).path is not None]
    return [_verified(name, entries, cache_dir) for name in (names or here)]


def _verified(name: str, entries: Mapping[str, Entry], cache_dir: Path) -> Verified:
    licenses: list[str] = []
    if name in entries:
        where = locate(entries[name], cache_dir)
        if where.path is None:
            return Verified(name, False, where.advice)
        licenses.append(entries[name].license)  # looking is not using
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
