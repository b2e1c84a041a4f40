"""Ctrl-C and SIGTERM."""

import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curation.pipelines.context import Context


class Stop:
    """Ctrl-C and SIGTERM ask for a clean end; a second one ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Return whether an end was asked for."""
        return self._event.is_set()

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        print("curate: stopping; press Ctrl-C again to stop at once", file=sys.stderr)


def interruptible(context: "Context") -> Stop:
    """Return a stop that the work of ``context`` looks at."""
    stop = Stop()
    context.should_stop = stop.is_set
    return stop
