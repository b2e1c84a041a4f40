"""Find the image that crashes a decoder, so that it costs a row and not a shard.

While images are decoded their ids stand in a small memory-mapped file of the process. A process that dies leaves it
behind. Whoever meets one of those images next on this machine first decodes it in a process of its own
(``python -m curation.crashes``): an image that kills that process too is refused as ``crashes_decoder`` from then on. A
process that was killed for another reason leaves suspects that pass the trial, and no more.
"""

import logging
import mmap
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from curation.config import ImagesConfig, dump, parse
from curation.errors import ImageError
from curation.images import decode
from curation.processes import start_time

logger = logging.getLogger(__name__)

REASON = "crashes_decoder"
_ID_BYTES = 32
_EMPTY = b"-" * _ID_BYTES
_NUM_SLOTS = 1024
_LIVED = b"lived"
_making = threading.Lock()  # a second file of the same name would cut the first one off under its map
_TRIAL_S = 60.0
_KEPT_S = 7 * 24 * 3600.0
_IMAGE_ID = re.compile(rb"[0-9a-f]{32}")


class Watch:
    """What this process is decoding, and what others were decoding when they died.

    Args:
        folder: Shared by the processes of this machine; nobody else may write there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._slots = self._open_slots()
        self._free = list(range(_NUM_SLOTS))
        self._lock = threading.Lock()
        self._passed: set[str] = set()
        self._suspects: set[str] = set()
        self.refresh()

    def _open_slots(self) -> mmap.mmap:
        path = self._folder / f"{os.getpid()}-{start_time(os.getpid())}.ids"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_ours(self._folder)
            path.write_bytes(_EMPTY * _NUM_SLOTS)
            with path.open("r+b") as file:
                return mmap.mmap(file.fileno(), 0)
        except OSError as error:
            logger.warning("%s: %s; an image that crashes its decoder cannot be found", path, error)
            self._folder = Path(os.devnull)  # what others may have put there is not believed
            return mmap.mmap(-1, _ID_BYTES * _NUM_SLOTS)

    def num_condemned(self) -> int:
        """Return how many images have been found to crash a decoder on this machine."""
        return sum(1 for _ in self._folder.glob("*.crashes"))

    def refresh(self) -> None:
        """Look for processes that have died since; called before each unit of work."""
        suspects: set[str] = set()
        for path in self._folder.glob("*.ids"):
            pid, _, started = path.stem.partition("-")
            if not pid.isdigit() or start_time(int(pid)) == started:
                continue
            with suppress(OSError):  # another process has cleared it up at the same moment
                found = {image_id.decode() for image_id in _IMAGE_ID.findall(path.read_bytes())}
                if found <= self._passed or time.time() - path.stat().st_mtime > _KEPT_S:
                    path.unlink(missing_ok=True)
                suspects |= found
        self._suspects = suspects

    @contextmanager
    def at_work(self, image_id: str, data: bytes, limits: ImagesConfig) -> Iterator[None]:
        """Note that an image is being decoded; a crash inside the block leaves the note.

        Raises:
            ImageError: ``crashes_decoder``: the image has killed a process before, and another one on trial.
        """
        if image_id in self._suspects and image_id not in self._passed:
            self._try(image_id, data, limits)
        with self._lock:
            slot = self._free.pop() * _ID_BYTES
        self._slots[slot : slot + _ID_BYTES] = image_id.encode()
        try:
            yield
        finally:
            self._slots[slot : slot + _ID_BYTES] = _EMPTY
            with self._lock:
                self._free.append(slot // _ID_BYTES)

    def _try(self, image_id: str, data: bytes, limits: ImagesConfig) -> None:
        condemned = self._folder / f"{image_id}.crashes"
        if not condemned.exists() and _survives(data, limits):
            self._passed.add(image_id)
            return
        with suppress(OSError):
            condemned.touch()
        raise ImageError(REASON, "kills the process that decodes it")


def _check_ours(folder: Path) -> None:
    """Refuse a folder that somebody else could write to: whoever can may condemn images."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} is not a private folder of this user")


def watch() -> Watch:
    """Return the watch of this process, made by the first thread that asks."""
    with _making:
        return _watch()


@cache
def _watch() -> Watch:
    return Watch(Path(tempfile.gettempdir()) / f"curation-decoding-{os.getuid()}")


def _survives(data: bytes, limits: ImagesConfig) -> bool:
    command = [sys.executable, "-m", "curation.crashes", dump(limits)]
    try:
        done = subprocess.run(  # noqa: S603  # this module, and plain settings
            command, input=data, capture_output=True, timeout=_TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout == _LIVED  # a decoder may also end its process in an orderly way


def _main(limits: str) -> int:
    """Decode what stands on standard input in every way that the pipeline does, and say so at the end."""
    import yaml

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for those who wait for the outcome
    data, checked = sys.stdin.buffer.read(), parse(ImagesConfig, yaml.safe_load(limits), "limits")
    for min_side_px in (None, 1):
        with suppress(ImageError):
            decode(data, checked, min_side_px)
    sys.stdout.buffer.write(_LIVED)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
