"""The processes that train together, and which images of a step are whose."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from curation.errors import LostProcessError, TrainError

_LETTING_GO_S = 0.2
_MAX_WORDS_BYTES = 4096


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

    def leave(self, *, has_failed: bool) -> None:
        """Part from the others.

        Args:
            has_failed: Whether this process ends with an error. Others may then wait for it, and the end of a group of
                NCCL waits for all of them: it is left to the end of the process, after its words.
        """
        if self.size > 1 and distributed.is_initialized() and not (has_failed and distributed.get_backend() == "nccl"):
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

    def total(self, count: int) -> int:
        """Return the sum of a whole number over processes; alone, no device is waited for."""
        return count if self.size == 1 else int(self.sum(torch.tensor(count, device=self._device())))

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
            TrainError: Another process failed, with its words.
        """
        failure: BaseException | None = None
        told: str | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:  # whatever it was that failed: the others are waiting
            if self.size > 1:
                told = self._failure(failure)
        if told is not None:
            raise TrainError(told)

    def _failure(self, own: BaseException | None) -> str | None:
        """Return what the first process that failed says; None where none did."""
        if not self.total(int(own is not None)):
            return None
        words = "" if own is None else str(own) or type(own).__name__
        told = torch.zeros(1, _MAX_WORDS_BYTES, dtype=torch.uint8)
        encoded = words.encode()[:_MAX_WORDS_BYTES]
        told[0, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else 0
        by_rank = [bytes(row.tolist()).rstrip(b"\0") for row in self.gather(told.to(self._device())).cpu()]
        rank = next(rank for rank, row in enumerate(by_rank) if row)
        return f"process {rank} failed: {by_rank[rank].decode(errors='replace')}"

    def _device(self) -> torch.device:
        return torch.device("cuda" if "nccl" in distributed.get_backend() else "cpu")


@contextmanager
def clear_failures() -> Iterator[None]:
    """Say in words what ends training from outside: memory that is full, and another process that is gone.

    Raises:
        TrainError: There is no memory.
        LostProcessError: Another process is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainError(
            "the device has no memory left; raise data.micro_batches (the losses stay the same), or set "
            "activation_checkpointing: true, precision: bfloat16 or parallel: fsdp, and go on with --resume "
            f"({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):  # whose errors have no class of their own
            raise LostProcessError(
                "another process ended, and its last words say why (killed or out of memory, where it has none); the "
                f"newest checkpoint is kept, and --resume goes on from it ({_first_line(error)})"
            ) from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


ALONE = World()
