"""Files of this machine that a path of the settings means."""

import os
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

from curation.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
)


def expand(path: str, suffixes: frozenset[str], what: str) -> tuple[list[Path], Path]:
    """Return the files that a path of the settings means, sorted, and the folder they are below.

    Args:
        path: A file, a folder (searched recursively for ``suffixes``), or a glob.
        suffixes: Lower case, with the dot.
        what: Name of the input, for messages.

    Raises:
        InputError: If there is nothing.
    """
    expanded = Path(path).expanduser()
    if expanded.is_file():
        return [expanded.absolute()], expanded.absolute().parent
    if expanded.is_dir():
        files = [file for file in walk(expanded.absolute()) if file.suffix.lower() in suffixes]
        if not files:
            raise InputError(f"{what} {path}: no file in this folder ends in {', '.join(sorted(suffixes))}")
        return files, expanded.absolute()
    if not has_magic(path):
        raise InputError(f"{what} {path}: does not exist; check the path (it starts at {Path.cwd()})")
    files = sorted(Path(name).absolute() for name in glob(str(expanded), recursive=True) if Path(name).is_file())
    if not files:
        raise InputError(f"{what} {path}: no file matches (the pattern starts at {Path.cwd()})")
    return files, Path(os.path.commonpath([file.parent for file in files]))


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, without hidden ones; links to folders are not followed.

    Raises:
        InputError: If ``folder`` itself cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise InputError(f"folder {folder}: cannot be listed: {error.strerror}; check its permissions") from error
    for name, is_folder in found:
        if name.startswith("."):
            continue
        if is_folder:
            yield from walk(folder / name)
        elif (folder / name).is_file():
            yield folder / name
