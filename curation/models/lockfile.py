"""Lock files: name → digest and size. One ships with the package; one of the user's lies in the cache.

Each entry is a TOML table::

    [sscd_disc_mixup]
    sha256 = "<64 hex digits>"      # of the model's bytes
    num_bytes = 98591332            # optional
    url = "https://…"               # where it came from, without its query; for the reader
    trusted = "first download"      # or "given": how the digest got here; for the reader
"""

import json
import os
import re
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curation.errors import WeightsError
from curation.models.file_lock import locked

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # what TOML takes as a bare key
_HEADER = "# Digests of weights that their user trusts; written by `curate models fetch`. See docs/models.md.\n"


@dataclass(frozen=True)
class Pin:
    """What a file has to be.

    Attributes:
        sha256: Digest, 64 hex digits.
        num_bytes: Size; 0 where it is not known.
        url: Where it came from.
        trusted: How the digest became known.
    """

    sha256: str
    num_bytes: int = 0
    url: str = ""
    trusted: str = ""


def parse_sha256(text: str) -> str:
    """Return a digest in lower case.

    Raises:
        WeightsError: It is none.
    """
    digest = text.strip().lower().removeprefix("sha256:")
    if not _SHA256.fullmatch(digest):
        raise WeightsError(f"{text[:80]!r} is no sha256: 64 hex digits are expected")
    return digest


def parse_pins(text: str, where: str) -> dict[str, Pin]:
    """Return the pins of a lock file's text.

    Raises:
        WeightsError: It is not such a file.
    """
    try:
        return {name: _pin(table) for name, table in tomllib.loads(text).items()}
    except (tomllib.TOMLDecodeError, TypeError, ValueError, WeightsError) as error:
        raise WeightsError(f"{where}: not a lock file of weights: {error}") from error


def read_pins(path: Path) -> dict[str, Pin]:
    """Return the pins of a lock file; none where there is no such file.

    Raises:
        WeightsError: It cannot be read.
    """
    try:
        return parse_pins(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error


def write_pin(path: Path, name: str, pin: Pin) -> None:
    """Add or replace a pin; the file changes in one step, whoever else writes it.

    Raises:
        WeightsError: A name that is no key, or a file that cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise WeightsError(f"weights {name}: cannot be pinned under this name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            _replace(path, read_pins(path) | {name: pin})
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error.strerror}") from error


def _pin(table: Any) -> Pin:
    pin = Pin(**table)
    if not all(isinstance(text, str) for text in (pin.sha256, pin.url, pin.trusted)) or type(pin.num_bytes) is not int:
        raise TypeError("sha256, url and trusted are strings, num_bytes is a whole number")
    if pin.num_bytes < 0:
        raise ValueError("num_bytes is negative")
    return Pin(parse_sha256(pin.sha256), pin.num_bytes, pin.url, pin.trusted)


def _replace(path: Path, pins: dict[str, Pin]) -> None:
    lines = [_HEADER]
    for name, pin in sorted(pins.items()):
        # A JSON string of ASCII is a TOML string, too.
        given = {key: value for key, value in asdict(pin).items() if value}
        lines.append("\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items()), ""]))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
