"""One writer a run: a lease that expires, so that a killed process locks nobody out.

``lease.json`` names its holder and when it ends. The holder renews it from a thread; when the holder is a dead process
of this machine the lease is taken at once, otherwise when it has ended. Object stores have no lock, so the lease is
read again a moment after it was written: of several that came at the same time only the one that wrote last goes on.
"""

import json
import os
import secrets
import socket
import threading
import time
from typing import Any, Self

from curation.errors import LeaseError, StoreError
from curation.files import Files
from curation.processes import start_time

_DURATION_S = 60.0
_RENEW_S = 15.0
_SETTLE_S = 0.05


class Lease:
    """Hold a run while the ``with`` block runs.

    Raises:
        LeaseError: If another living process holds it.
    """

    def __init__(self, files: Files, name: str = "lease.json") -> None:
        self._files = files
        self._name = name
        self.token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()  # set when somebody else has taken the lease

    def __enter__(self) -> Self:
        held = self._read()
        if held is not None and not _is_over(held):
            raise LeaseError(
                f"another process is writing this run: {held.get('host')} process {held.get('pid')}; "
                f"wait for it, or end it (its lease ends in {max(0, held['expires'] - time.time()):.0f} s)"
            )
        self._write()
        time.sleep(_SETTLE_S)
        if (self._read() or {}).get("token") != self.token:
            raise LeaseError("another process took this run at the same moment; run again when it has ended")
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if (self._read() or {}).get("token") == self.token:
            self._files.remove(self._name)

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            try:
                if (self._read() or {}).get("token", self.token) != self.token:
                    self.lost.set()
                    return
                self._write()
            except (OSError, StoreError):
                continue  # a full disk must not end the thread: the next renewal may succeed

    def _read(self) -> dict[str, Any] | None:
        try:
            held = json.loads(self._files.read_bytes(self._name))
        except (FileNotFoundError, ValueError):
            return None
        return held if isinstance(held, dict) and isinstance(held.get("expires"), (int, float)) else None

    def _write(self) -> None:
        holder = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "expires": time.time() + _DURATION_S,
        }
        self._files.write_bytes(self._name, json.dumps(holder).encode())


def _is_over(held: dict[str, Any]) -> bool:
    if held["expires"] < time.time():
        return True
    here = held.get("host") == socket.gethostname()
    return here and isinstance(held.get("pid"), int) and start_time(held["pid"]) != held.get("started")
