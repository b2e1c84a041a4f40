"""One process of ``process_runner`` that does units, and how it is started.

What a worker needs takes most of a second to import. One process, the server, imports it once (``worker_imports.py``);
workers are forked from it in milliseconds, and share its memory. The command line starts it before it knows what there
is to do, and imports its own meanwhile: this module itself imports next to nothing.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from curation.errors import CurationError
from curation.processes import log_to_stderr, start_fork_server, without_main

if TYPE_CHECKING:
    from curation.pipelines.units import Unit

_IMPORTS = "curation.pipelines.worker_imports"
_STDERR = 2
_ROWS_AFTER_S = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass
class WorkerProcess:
    """A process, the pipe to it, and the unit that it is at work on."""

    process: Any
    pipe: Connection
    unit: "Unit | None" = None

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Spawner:
    """Starts workers.

    Attributes:
        stop: Once it is set, workers stop at the next image.
    """

    def __init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload([_IMPORTS])
        self.stop = self._processes.Event()

    def start_ahead(self) -> None:
        """Start the server, without waiting until it is ready.

        Raises:
            CurationError: It cannot be started.
        """
        try:
            start_fork_server({signal.SIGINT})  # Ctrl-C is for the process of the run alone
        except OSError as error:
            raise CurationError(f"no worker can be started: {error}") from error

    def spawn(self, url: str, config: str, fence: str) -> WorkerProcess:
        """Return a worker for a run.

        Args:
            url: The run's.
            config: Its settings, as YAML.
            fence: Token of its lease.

        Raises:
            CurationError: None can be started.
        """
        self.start_ahead()
        ours, theirs = self._processes.Pipe()
        level = logging.getLogger().level
        log_to = Connection(os.dup(_STDERR), readable=False)  # that of the server may be another one
        process = self._processes.Process(
            target=_serve,
            args=(theirs, self.stop, log_to, level, (url, config, fence)),
            name="curation-worker",
            daemon=True,
        )
        try:
            with without_main():
                process.start()
        except (EOFError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
            raise CurationError(f"no worker can be started, the process that does so has ended ({said})") from error
        finally:
            theirs.close()
            log_to.close()
        return WorkerProcess(process, ours)


def _serve(pipe: Connection, stop: Any, log_to: Connection, log_level: int, run: tuple[str, str, str]) -> None:
    """Do units until the pipe closes, and leave at once: tearing libraries down takes a fifth of a second."""
    _die_with_parent()
    os.dup2(log_to.fileno(), _STDERR)
    log_to.close()
    log_to_stderr(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever wanted it has ended
        _do_units(pipe, stop, *run)
    os._exit(0)


def _do_units(pipe: Connection, stop: Any, url: str, config: str, fence: str) -> None:
    import yaml

    from curation import settings
    from curation.config import RunConfig
    from curation.crashes import watch
    from curation.pipelines.context import Context
    from curation.pipelines.lvd142m import build_plan
    from curation.pipelines.work import execute
    from curation.store import Run

    watch().enforce_deadlines()
    run = Run(url)
    run.fence = fence
    parsed = settings.parse(RunConfig, yaml.safe_load(config), "run.yaml")
    plan = build_plan(parsed)
    step, context, rows = "", Context(run, parsed), _RowsDone(pipe)
    while True:
        unit, num_cores = pipe.recv()
        if unit.step != step:  # let the model of the step before go
            step, context = unit.step, Context(run, parsed, stop.is_set)
            context.on_rows = rows.add
        context.num_cores = num_cores
        try:
            message: tuple[str, Any] = ("done", execute(context, plan, unit))
        except InterruptedError:
            message = ("stopped", None)
        except CurationError as error:
            message = ("error", error)
        rows.flush()
        pipe.send(message)


class _RowsDone:
    """Tells of rows as they are done, but not of each: a message costs both sides 50 µs, and some rows little more."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._num_rows = 0
        self._told_at = 0.0

    def add(self, num_rows: int) -> None:
        """Note that so many more rows are done."""
        self._num_rows += num_rows
        if time.monotonic() - self._told_at > _ROWS_AFTER_S:
            self.flush()

    def flush(self) -> None:
        """Tell of those that were not told of."""
        if self._num_rows:
            self._pipe.send(("rows", self._num_rows))
        self._num_rows, self._told_at = 0, time.monotonic()


def _die_with_parent() -> None:
    """End with the server, which ends with the process of the run: what an orphan writes would meet the next run."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it ended before this line
        os._exit(1)
