"""Whether a process of this machine still lives."""

import os
from pathlib import Path


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
