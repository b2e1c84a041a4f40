"""Who makes samples: this process, or several others that write them into memory that all share.

Threads do not help where images are small: they wait for each other in Python, beside decoding and resizing.
"""

import logging
import mmap
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import fsspec
import torch
from torch import Tensor

from curation.dinov2.config import TrainConfig
from curation.dinov2.cropping import Cropper, PartArrays, Task
from curation.dinov2.manifests import TarFiles
from curation.errors import CurationError, ImageError, TrainError
from curation.processes import log_to_stderr, start_fork_server, without_main

_ENDING_S = 1.0
_TO_ALL_PROCESSES = {signal.SIGINT, signal.SIGTERM}  # of a terminal and a scheduler: the last step is still finished


class Makers(Protocol):
    """Whoever makes samples."""

    def make(self, task: Task) -> dict[int, ImageError]:
        """Make samples; return what is wrong with those that cannot be made, by their places in the batch.

        Raises:
            TrainError: A tar cannot be read, or who was at work is gone.
        """

    def taken(self, slot: int) -> PartArrays:
        """Return what was made there. What is made there later goes elsewhere."""


class OwnMaker:
    """Makes samples in this process; each part of a step has memory of its own.

    Args:
        config: Settings of the run.
        files: The tars of each manifest.
        num_images: Of a part of a step.
    """

    def __init__(self, config: TrainConfig, files: Sequence[TarFiles], num_images: int) -> None:
        self._config, self._num_images = config, num_images
        self._cropper = Cropper(config, files)
        self._arrays = self._fresh()

    def make(self, task: Task) -> dict[int, ImageError]:
        """Make samples."""
        return self._cropper.make(task, self._arrays)

    def taken(self, slot: int) -> PartArrays:
        """Return the latest part's samples."""
        made, self._arrays = self._arrays, self._fresh()
        return made

    def _fresh(self) -> PartArrays:
        memory = torch.empty(PartArrays.num_bytes(self._config, self._num_images), dtype=torch.uint8)
        return PartArrays.over(memory, self._config, self._num_images)


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


class CropWorkers:
    """Makes samples in processes of their own, one for each thread that asks.

    The memory that they share is not that of ``/dev/shm``, of which containers have little.

    Args:
        num_workers: Processes.
        config: Settings of the run.
        files: The tars of each manifest; those that only this process can read are not asked for.
        num_images: Of a part of a step.
        num_slots: Parts that are in memory at a time.
        device: What samples are for; None: a CPU.

    Raises:
        TrainError: They cannot be started.
    """

    def __init__(
        self,
        num_workers: int,
        config: TrainConfig,
        files: Sequence[TarFiles],
        num_images: int,
        num_slots: int,
        device: torch.device | None = None,
    ) -> None:
        self._config, self._num_images, self._device = config, num_images, device
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers: list[_Worker] = []
        readable = [None if tars.are_of_this_process() else tars for tars in files]
        try:
            start_ahead()
            shared = _shared_memory(num_slots * PartArrays.num_bytes(config, num_images))
            try:
                self._slots = _slots(shared, num_slots)
                for _ in range(num_workers):
                    worker = _started(config, readable, num_images, num_slots, shared)
                    self._workers.append(worker)
                    self._idle.put(worker)
            finally:
                os.close(shared)
        except (OSError, EOFError, AssertionError) as error:  # the last one of a process that must have no children
            self.close()
            raise TrainError(
                f"{num_workers} processes that decode cannot be started ({error}); lower data.workers, or do without: 0"
            ) from error

    def make(self, task: Task) -> dict[int, ImageError]:
        """Make samples."""
        worker = self._idle.get()
        try:
            worker.pipe.send(task)
            found = worker.pipe.recv()
        except (EOFError, OSError) as error:
            worker.process.join(_ENDING_S)
            raise TrainError(
                f"a process that decodes images has ended ({_end(worker.process.exitcode)}) at images "
                f"{[source.image for source in task.sources]} of step {task.step + 1}; if there was no memory left, "
                "lower data.workers or data.prefetch_batches, and go on with --resume"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(found, CurationError):
            raise found
        failures: dict[int, ImageError] = found
        return failures

    def taken(self, slot: int) -> PartArrays:
        """Return a copy of what was made; for a GPU in memory that it can read while it computes."""
        made = self._slots[slot]
        pinned = self._device is not None and self._device.type == "cuda"
        with torch.cuda.device(self._device) if pinned else nullcontext():
            memory = torch.empty(len(made), dtype=torch.uint8, pin_memory=pinned)
        return PartArrays.over(memory.copy_(made), self._config, self._num_images)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(_ENDING_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def start_ahead() -> None:
    """Start the server that workers are forked from, which imports what they need, without waiting for it.

    Raises:
        OSError: It cannot be started.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    start_fork_server(_TO_ALL_PROCESSES)


def _slots(shared: int, num_slots: int) -> tuple[Tensor, ...]:
    """Return shared memory in equal parts."""
    return torch.frombuffer(mmap.mmap(shared, 0), dtype=torch.uint8).chunk(num_slots)


def _shared_memory(num_bytes: int) -> int:
    """Return the descriptor of memory that goes when nobody has it any more."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("curation-crops")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _started(
    config: TrainConfig, files: list[TarFiles | None], num_images: int, num_slots: int, shared: int
) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    log_to = Connection(os.dup(2), readable=False)  # that of the server may be another one
    process = context.Process(
        target=_serve,
        args=(theirs, log_to, logging.getLogger().level, _surroundings(), config, files, num_images, num_slots),
        name="curation-crops",
        daemon=True,
    )
    try:
        with without_main():
            process.start()
        reduction.send_handle(ours, shared, process.pid)
    finally:
        theirs.close()
        log_to.close()
    return _Worker(process, ours)


def _surroundings() -> tuple[dict[str, str], dict[str, Any]]:
    """Return what file systems are opened with, such as credentials: the server may have been started before it was."""
    return dict(os.environ), fsspec.config.conf


def _serve(
    pipe: Connection,
    log_to: Connection,
    log_level: int,
    surroundings: tuple[dict[str, str], dict[str, Any]],
    config: TrainConfig,
    files: list[TarFiles | None],
    num_images: int,
    num_slots: int,
) -> None:
    """Make samples until the pipe closes, as it does when the process at the other end is gone."""
    for number in _TO_ALL_PROCESSES:  # the server may have been started by somebody else, who does not block them
        signal.signal(number, signal.SIG_IGN)
    os.dup2(log_to.fileno(), 2)
    log_to.close()
    log_to_stderr(log_level)
    os.environ.update(surroundings[0])
    fsspec.config.conf.update(surroundings[1])
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        shared = reduction.recv_handle(pipe)
        slots = [PartArrays.over(memory, config, num_images) for memory in _slots(shared, num_slots)]
        os.close(shared)
        cropper = Cropper(config, files)
        while True:
            task = pipe.recv()
            try:
                answer: dict[int, ImageError] | CurationError = cropper.make(task, slots[task.slot])
            except CurationError as error:
                answer = error
            pipe.send(answer)
    os._exit(0)  # tearing libraries down takes a fifth of a second


def _end(exit_code: int | None) -> str:
    if exit_code is None:
        return "its pipe is closed"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"status {exit_code}"
