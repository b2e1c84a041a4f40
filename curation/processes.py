"""Processes of this machine: how ours are started, where they log, what they need not load, whether one still lives.

Processes that work for another one are forked from a server that has imported what they need, once. It has no threads
at work, so nothing is forked half way.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from threading import Lock
from types import ModuleType

_SAFE_PATH = "PYTHONSAFEPATH"
_MAX_SOCKET_FOLDER_BYTES = 103 - len("/pymp-01234567/listener-01234567")  # 107 on Linux
_without_main = Lock()


def start_fork_server(blocked: Collection[signal.Signals]) -> None:
    """Start the server that processes are forked from, unless it runs; does not wait until it is ready.

    Args:
        blocked: Signals that neither it nor a process forked from it gets: those that a terminal or a scheduler sends
            to all processes, of which the one at the top decides when the others end.

    Raises:
        OSError: It cannot be started.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"  # what lies in the current folder is not imported in place of what is installed
    resource_tracker.ensure_running()  # the server would start it, which unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # inherited
    try:
        with _short_temporary_folder():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Keep the server's socket out of a folder for temporary files whose name is longer than sockets' may be."""
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _MAX_SOCKET_FOLDER_BYTES:
        tempfile.tempdir = "/tmp"  # noqa: S108  # a folder that only this user may enter is made there
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def without_main() -> Iterator[None]:
    """Keep processes that are started meanwhile from running the main script of this one again.

    All that ours run lies in the package. A script that calls it needs no ``if __name__ == "__main__"``.
    """
    with _without_main:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def log_to_stderr(level: int) -> None:
    """Log what is at least of a level, as every process of ours does."""
    logging.basicConfig(level=level, format="%(name)s: %(message)s")


def leave_pandas_out() -> None:
    """Keep pandas from being imported in this process, where it is not needed.

    Arrow imports it, where it is installed, as soon as an array is made of a list, to see whether the list is a pandas
    object: half a second in each process. Only for processes that are ours alone: nothing of this package uses it.
    """
    if not any(isinstance(finder, _WithoutPandas) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutPandas())


class _WithoutPandas(MetaPathFinder, Loader):
    """Finds a pandas that cannot be imported: to look whether it is there, as PyTorch does, is no error."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "pandas" else None

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError("pandas is left out of this process", name=module.__name__)


def start_time(pid: int) -> str | None:
    """Return when a process started, as text (process ids come again), or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:  # no /proc (macOS): only whether it lives can be known
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]
