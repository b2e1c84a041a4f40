"""The processes that train together, and which images of a step are whose."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from curation.errors import TrainError

_LETTING_GO_S = 0.2


@dataclass(frozen=True)
class World:
    """This process among those that train together; alone it needs no process group.

    Attributes:
        rank: Number of this process, from 0.
        size: Processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Return the world that torchrun or Ray Train started this process in; it joins the others.

        Raises:
            TrainError: The processes cannot reach each other.
        """
        if distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise TrainError(f"cannot join {os.environ['WORLD_SIZE']} processes: {error}") from error
        return cls(distributed.get_rank(), distributed.get_world_size())

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1 and distributed.is_initialized():
            # A thread of gloo may still need the interpreter to let go of the last tensor that was sent. The end of
            # the group waits for that thread with the interpreter in hand: seen to hang four runs of nine.
            time.sleep(_LETTING_GO_S)
            distributed.destroy_process_group()

    def parts(self, batch_size: int, micro_batches: int) -> list[range]:
        """Return which images of a step's batch this process works on, in equal parts one after the other.

        Raises:
            TrainError: The batch cannot be cut into equal parts.
        """
        num_parts = self.size * micro_batches
        if batch_size % num_parts:
            raise TrainError(
                f"data.batch_size {batch_size} is the whole step's and must be a multiple of {self.size} processes x "
                f"{micro_batches} micro-batches = {num_parts}"
            )
        length = batch_size // num_parts
        first = self.rank * micro_batches
        return [range(part * length, (part + 1) * length) for part in range(first, first + micro_batches)]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over processes."""
        if self.size > 1:
            x = x.clone()
            distributed.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over processes."""
        return self.sum(x) / self.size

    def logsumexp(self, x: Tensor) -> Tensor:
        """Return log Σ exp over processes, element by element; the memory is one tensor however many there are."""
        if self.size == 1:
            return x
        most = x.clone()
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return most + self.sum(torch.exp(x - most)).log()

    def gather(self, x_N: Tensor) -> Tensor:
        """Return the rows of all processes, (size · N, ...), by rank; each has as many."""
        if self.size == 1:
            return x_N
        rows = [torch.empty_like(x_N) for _ in range(self.size)]
        distributed.all_gather(rows, x_N.contiguous())
        return torch.cat(rows)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a part that one process may fail at: then all of them stop, and none waits for it.

        Raises:
            TrainError: Another process failed; its own error says why.
        """
        failed = True
        num_failed = 0.0
        try:
            yield
            failed = False
        finally:  # whatever it was that failed: the others are waiting
            if self.size > 1:
                num_failed = float(self.sum(torch.tensor(float(failed), device=self._device())))
        if num_failed:
            raise TrainError("another process failed; its message says why")

    def _device(self) -> torch.device:
        return torch.device("cuda" if "nccl" in distributed.get_backend() else "cpu")


ALONE = World()
