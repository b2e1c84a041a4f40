"""Arrays in .npz files, without pickles; one that was cut short or is something else is a clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from curation.errors import CorruptError


@contextmanager
def reading(path: Path, what: str) -> Iterator[Any]:
    """Give the arrays of a file by name.

    Args:
        path: The file.
        what: What it should hold, for the error.

    Raises:
        CorruptError: The file cannot be read, or an array is missing or not what the block inside makes of it.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            yield found
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, BadZipFile) as error:
        raise CorruptError(f"{path}: not {what}: {error}") from error
