"""Arrays in .npz files, without pickles; one that was cut short or is something else is a clear error."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from curation.errors import CorruptError

# What numpy and zipfile were seen to raise on damaged files: flipped bits also ask for encryption, or for other
# compression (RuntimeError, NotImplementedError), or for more memory than there is.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    BadZipFile,
    RuntimeError,
    SyntaxError,
    TokenError,
    MemoryError,
    zlib.error,
)


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
    except UNREADABLE as error:
        raise CorruptError(f"{path}: not {what}: {error}") from error
