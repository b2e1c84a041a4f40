"""One process at a time: a lock file that the kernel releases when its holder dies."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` as an exclusive lock; wait for whoever holds it, and leave no file behind.

    Raises:
        OSError: The file cannot be made, or its file system has no locks.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: see _acquire
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for the process that holds %s", path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The last holder may have removed the file that was waited for; a lock on it keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed between the two looks at it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
