"""Processes of this machine: whether one still lives, and what ours need not load."""

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


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
