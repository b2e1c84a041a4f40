"""The device that a network runs on, by the name that people give it, and how much of its memory was taken."""

import os
import resource

import torch

from curation.errors import TrainError


def device_of(name: str | None) -> torch.device:
    """Return a device that can be used; None: a GPU if there is one, this process's own of several.

    Raises:
        TrainError: There is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:  # torchrun numbers the processes of a machine
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # float32 is asked for: convolutions are as exact as products
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either for a device that is not there
        raise TrainError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try cpu") from error
    return device


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was taken so far: of a GPU by tensors, else of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
