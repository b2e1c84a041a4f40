"""Find the image that crashes or hangs its process, so that it costs a row and not a shard.

While images are at work their ids stand in the journal of the process (``journal.py``). A process that dies leaves it
behind, and whoever refreshes a watch on this machine next turns it into marks on images:

1. Images that were at work together are suspects. One that is met again is first decoded in a process of its own
   (``python -m curation.crashes``); an image that kills that process too, or does not end in time, is refused.
2. One that passes may still crash what a stage makes of it, so it is worked on next with no other image at work. When
   that ends it is no suspect any more; when two processes have died of it alone, it is refused.

So each poisonous image ends as a row, after three processes at most, and a process that was killed for another reason
leaves suspects that pass, and no more. An image that takes too long ends its process, where deadlines are enforced, and
then goes the same way.
"""

import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from curation.config.images import ImagesConfig
from curation.errors import ImageError
from curation.images import decode
from curation.journal import Journal, clear_up, last_words
from curation.settings import dump, parse

logger = logging.getLogger(__name__)

CRASH, LATE = "crashes_decoder", "decode_timeout"
_DEATHS_ALONE = 2  # one may be chance: the kernel's out-of-memory killer, a machine that is taken away
_BEGAN, _LIVED = b"began ", b"lived"
_TRIAL_START_S = 60.0  # of an interpreter, on a busy machine
_KEPT_S = 7 * 24 * 3600.0
_making = threading.Lock()  # a second file of the same name would cut the first one off under its map


class Watch:
    """What this process is working on, and what others were working on when they died.

    Args:
        folder: Shared by the processes of this machine; nobody else may write there. Beside journals it holds empty
            files: ``<image>.<process>.company``, ``.crashed`` and ``.late`` say how a process died, in company or of
            this image alone; ``<image>.<reason>`` says that a trial has shown why to refuse it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = self._open_journal()
        self._changed = threading.Condition(threading.Lock())
        self._num_at_work = self._num_waiting_alone = 0
        self._is_alone = False
        self._suspects: set[str] = set()
        self._struck: set[str] = set()
        self._refused: dict[str, str] = {}
        self.refresh()

    def _open_journal(self) -> Journal:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_ours(self._folder)
            return Journal(self._folder)
        except OSError as error:
            logger.warning("%s: %s; an image that crashes its decoder cannot be found", self._folder, error)
            self._folder = Path(os.devnull)  # what others may have put there is not believed
            return Journal(None)

    def enforce_deadlines(self) -> None:
        """End this process, from now on, when an image takes too long; only for processes that may be ended."""
        self._journal.enforce()

    def num_findings(self) -> int:
        """Return how many deaths on this machine are laid to one image alone, and how many trials have failed."""
        self.refresh()
        return sum(path.suffix != ".company" for path in self._marks())

    def refresh(self) -> None:
        """Look for processes that have died since; called before each unit of work."""
        for path in self._folder.glob("*.ids"):
            with suppress(OSError):  # another process clears it up at the same moment
                self._bury(path)
        suspects: set[str] = set()
        refused: dict[str, str] = {}
        crashed, late = Counter[str](), Counter[str]()
        for path in self._marks():
            image_id, kind = path.name[:32], path.suffix[1:]
            suspects.add(image_id)
            if kind == "crashed":
                crashed[image_id] += 1
            elif kind == "late":
                late[image_id] += 1
            elif kind != "company":
                refused[image_id] = min(kind, refused.get(image_id, kind))
        struck = set(crashed | late)
        for image_id in struck:
            if crashed[image_id] + late[image_id] >= _DEATHS_ALONE:
                refused.setdefault(image_id, CRASH if crashed[image_id] else LATE)
        self._suspects, self._struck, self._refused = suspects, struck, refused

    def _bury(self, journal: Path) -> None:
        """Turn the journal of a process that has died into marks on images; the same ones whoever does it."""
        words = last_words(journal)
        if words is None:
            return
        kind = ("late" if words.is_late else "crashed") if words.were_alone else "company"
        if time.time() - journal.stat().st_mtime < _KEPT_S:
            for image_id in words.images:
                (self._folder / f"{image_id}.{journal.stem}.{kind}").touch()
        clear_up(journal)

    def _marks(self) -> Iterator[Path]:
        """Yield the marks on images; those too old to mean anything go."""
        for path in self._folder.glob("[0-9a-f]" * 32 + ".*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime < _KEPT_S:
                    yield path
                else:
                    path.unlink()

    @contextmanager
    def at_work(self, image_id: str, data: bytes, limits: ImagesConfig) -> Iterator[Callable[[], None]]:
        """Note that an image is being decoded; a crash inside the block leaves the note. Not to be nested.

        Yields:
            What to call when it is decoded and stages have it: their deadline is another one.

        Raises:
            ImageError: ``crashes_decoder`` or ``decode_timeout``: it has ended processes before.
        """
        is_suspect = image_id in self._suspects
        if is_suspect:
            self._try(image_id, data, limits)
        with self._place(is_suspect):
            slot = self._journal.enter(image_id, is_suspect, limits.decode_timeout_s)
            try:
                yield partial(self._journal.postpone, slot, limits.prepare_timeout_s)
            finally:
                self._journal.leave(slot)
                if is_suspect:
                    self._acquit(image_id)

    @contextmanager
    def in_company(self) -> Iterator[None]:
        """Keep what belongs to many images (a batch in a model) from running beside an image that works alone."""
        with self._place(is_alone=False):
            yield

    @contextmanager
    def _place(self, is_alone: bool) -> Iterator[None]:
        """Wait until no image works alone; to work alone, until none is at work and before any other begins."""
        with self._changed:
            if is_alone:
                self._num_waiting_alone += 1
                self._changed.wait_for(lambda: not self._num_at_work)
                self._num_waiting_alone -= 1
            elif self._is_alone or self._num_waiting_alone:
                self._changed.wait_for(lambda: not (self._is_alone or self._num_waiting_alone))
            self._num_at_work += 1
            self._is_alone = is_alone
        try:
            yield
        finally:
            with self._changed:
                self._num_at_work -= 1
                self._is_alone = False
                if not self._num_at_work:
                    self._changed.notify_all()

    def _try(self, image_id: str, data: bytes, limits: ImagesConfig) -> None:
        """Refuse what has been found out; decode what has not been alone yet in a process of its own."""
        reason = self._refused.get(image_id)
        if reason is None and image_id not in self._struck:
            reason = _trial(data, limits)
            if reason is not None:
                with suppress(OSError):
                    (self._folder / f"{image_id}.{reason}").touch()
        if reason is not None:
            raise ImageError(
                reason, "ends the process that works on it" if reason == CRASH else "does not end within its deadline"
            )

    def _acquit(self, image_id: str) -> None:
        """It has survived alone; deaths that were laid to it alone stay on record."""
        for path in self._folder.glob(f"{image_id}.*.company"):
            with suppress(OSError):
                path.unlink()
        self._suspects.discard(image_id)


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


def _trial(data: bytes, limits: ImagesConfig) -> str | None:
    """Decode in a process of its own, and return why the image is to be refused, or None: nothing has been shown."""
    command = [sys.executable, "-m", "curation.crashes", dump(limits)]
    patience_s = _TRIAL_START_S + 3 * limits.decode_timeout_s
    try:
        done = subprocess.run(  # noqa: S603  # this module, and plain settings
            command, input=data, capture_output=True, timeout=patience_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # it could not start
        return None
    if _BEGAN not in done.stdout or done.stdout.endswith(_LIVED):
        return None
    return LATE if done.returncode == -signal.SIGALRM else CRASH  # a decoder may also end in an orderly way


def _main(limits: str) -> int:
    """Decode what stands on standard input in every way that the pipeline does, and say so at the end."""
    import yaml

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for those who wait for the outcome
    data, checked = sys.stdin.buffer.read(), parse(ImagesConfig, yaml.safe_load(limits), "limits")
    os.write(sys.stdout.fileno(), _BEGAN)
    for min_side_px in (None, 1):
        signal.setitimer(signal.ITIMER_REAL, checked.decode_timeout_s)  # nobody handles it: the process ends
        with suppress(ImageError):
            decode(data, checked, min_side_px)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(sys.stdout.fileno(), _LIVED)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
