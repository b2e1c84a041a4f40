"""Networks with random weights that depend on a seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_one_at_a_time = Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what PyTorch draws meanwhile from a seed, and leave its random state as it was.

    Initialisers draw from the state of the whole process, so two threads must not do this at once; no device's state
    changes.
    """
    with _one_at_a_time:
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
