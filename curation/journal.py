"""What a process is working on, written where it survives the process, and the deadlines of that work.

A journal is a small memory-mapped file ``<pid>-<start>.ids``: what is stored in it is there for others at once, however
the process ends. One slot is 64 bytes of text: an image id, ``a`` (alone) or ``c`` (in company), and the deadline in
nanoseconds of the monotonic clock; dashes fill what is empty. Where deadlines are enforced, ``<pid>-<start>.late``
beside it is filled by a process that a deadline ends.
"""

import faulthandler
import mmap
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from curation.processes import start_time

_SLOT_BYTES = 64
_EMPTY = b"-" * _SLOT_BYTES
_SLOT = re.compile(rb"([0-9a-f]{32}) ([ac]) (\d{20})")
_NUM_SLOTS = 1024


class Journal:
    """The journal of this process.

    Args:
        folder: Where it lies, beside those of others; None: nowhere, when there is no place for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / f"{os.getpid()}-{start_time(os.getpid())}.ids"
        self._slots = _mapped(self._path)
        self._free = list(range(0, _NUM_SLOTS * _SLOT_BYTES, _SLOT_BYTES))
        self._deadlines: dict[int, float] = {}
        self._is_enforced = False
        self._lock = threading.Lock()

    def enforce(self) -> None:
        """End this process, from now on, when a deadline passes."""
        with self._lock:
            if self._path is not None and not self._is_enforced:
                with suppress(OSError):  # the disk is full: nobody will know why the process ended
                    late = self._path.with_suffix(".late").open("wb", buffering=0)
                    # C code that needs no interpreter, which a hanging decoder may hold: it fills the file, then the
                    # signal ends the process as it would have without a handler.
                    faulthandler.register(signal.SIGALRM, late, all_threads=False, chain=True)
            self._is_enforced = True

    def enter(self, image_id: str, is_alone: bool, timeout_s: float) -> int:
        """Note an image, and return its slot."""
        deadline = time.monotonic() + timeout_s
        note = f"{image_id} {'a' if is_alone else 'c'} {int(deadline * 1e9):020d}".encode()
        with self._lock:
            slot = self._free.pop()
            self._slots[slot : slot + len(note)] = note
            self._deadlines[slot] = deadline
            self._arm()
        return slot

    def postpone(self, slot: int, timeout_s: float) -> None:
        """Set another deadline, from now."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._slots[slot + 35 : slot + 55] = f"{int(deadline * 1e9):020d}".encode()
            self._deadlines[slot] = deadline
            self._arm()

    def leave(self, slot: int) -> None:
        """Clear a slot."""
        with self._lock:
            self._slots[slot : slot + _SLOT_BYTES] = _EMPTY
            del self._deadlines[slot]
            self._free.append(slot)
            self._arm()

    def _arm(self) -> None:
        """Set the kernel's timer to the first deadline."""
        if self._is_enforced:
            first = min(self._deadlines.values(), default=None)
            signal.setitimer(signal.ITIMER_REAL, 0 if first is None else max(first - time.monotonic(), 1e-3))


@dataclass(frozen=True)
class LastWords:
    """What a process that has ended was working on.

    Attributes:
        images: Their ids; of a process that a deadline has ended, only the image whose deadline it was.
        were_alone: Whether there was only one, by intention.
        is_late: Whether a deadline has ended it.
    """

    images: frozenset[str]
    were_alone: bool
    is_late: bool


def last_words(journal: Path) -> LastWords | None:
    """Return what a journal of another process says; None while that process lives.

    Raises:
        OSError: Somebody else has cleared it up.
    """
    pid, _, started = journal.stem.partition("-")
    if not pid.isdigit() or start_time(int(pid)) == started:
        return None
    late = journal.with_suffix(".late")
    is_late = late.exists() and late.stat().st_size > 0
    slots = [(found[3], found[1].decode(), found[2] == b"a") for found in _SLOT.finditer(journal.read_bytes())]
    slots = sorted(slots)[:1] if is_late else slots
    return LastWords(frozenset(name for _, name, _ in slots), any(alone for *_, alone in slots), is_late)


def clear_up(journal: Path) -> None:
    """Delete the journal of a process that has ended."""
    journal.with_suffix(".late").unlink(missing_ok=True)
    journal.unlink(missing_ok=True)


def _mapped(path: Path | None) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, _SLOT_BYTES * _NUM_SLOTS)
    path.write_bytes(_EMPTY * _NUM_SLOTS)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
