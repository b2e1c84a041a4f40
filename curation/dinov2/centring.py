"""How the teacher's scores become targets: Sinkhorn-Knopp, or a softmax around a running mean of earlier scores."""

from typing import Protocol

import torch
from torch import Tensor

from curation.dinov2 import losses
from curation.dinov2.config import TrainConfig
from curation.dinov2.scores import Assignment, Scores
from curation.dinov2.world import ALONE, World


class Centring(Protocol):
    """Makes targets of one head's scores."""

    def assign(self, scores: Scores, temperature: float) -> Assignment:
        """Return the assignment of each row to the prototypes."""

    def update(self) -> None:
        """Take over what was seen since the last call: the step was taken."""


class SinkhornKnopp:
    """Equal use of all prototypes within the batch of all processes; remembers nothing."""

    def __init__(self, rounds: int, world: World = ALONE) -> None:
        self._rounds = rounds
        self._world = world

    def assign(self, scores: Scores, temperature: float) -> Assignment:
        """Return the assignment of each row to the prototypes."""
        offset_K = losses.sinkhorn_offset(scores, temperature, self._rounds, self._world)
        return Assignment.of(scores, offset_K, temperature)

    def update(self) -> None:
        """Do nothing: there is no state."""


class RunningCentre:
    """Softmax around a running mean of the scores of earlier steps: a step never sees its own mean.

    Args:
        prototypes: Scores of a row.
        momentum: What is kept of the mean in each step.
        device: Where scores are.
        world: Processes that share the mean.
        each_process_equal: Average the processes' means, however many rows each has, as the published code does.

    Attributes:
        value_K: The mean, float32; zero at first.
    """

    def __init__(
        self,
        prototypes: int,
        momentum: float,
        device: torch.device,
        world: World = ALONE,
        *,
        each_process_equal: bool = False,
    ) -> None:
        self.value_K = torch.zeros(prototypes, device=device)
        self._momentum = momentum
        self._world = world
        self._each_process_equal = each_process_equal
        self._pending_K: Tensor | None = None

    def assign(self, scores: Scores, temperature: float) -> Assignment:
        """Return the assignment of each row to the prototypes; remember the rows' mean."""
        mean_K = scores.mean()
        if self._each_process_equal:
            self._pending_K = self._world.mean(mean_K)
        else:
            rows = torch.full((), float(len(scores)), device=scores.device)
            own_K = mean_K * rows if len(scores) else torch.zeros_like(mean_K)
            self._pending_K = self._world.sum(own_K) / self._world.sum(rows)
        return Assignment.of(scores, self.value_K, temperature)

    def update(self) -> None:
        """Move the centre towards the mean of the latest scores."""
        if self._pending_K is not None:
            self.value_K = self._momentum * self.value_K + (1 - self._momentum) * self._pending_K
            self._pending_K = None


class Centrings:
    """The centring of each head's scores: class tokens and masked patches have centres of their own, a shared head too.

    Args:
        config: Settings of the run.
        device: Where scores are.
        world: Processes that train together.
    """

    def __init__(self, config: TrainConfig, device: torch.device, world: World = ALONE) -> None:
        wanted = config.losses
        self._centres: dict[str, RunningCentre] = {}
        if wanted.centring == "sinkhorn_knopp":
            self.dino: Centring = SinkhornKnopp(wanted.sinkhorn_rounds, world)
            self.ibot: Centring = self.dino
            return
        dino = config.heads.dino.prototypes
        ibot = dino if config.heads.ibot is None else config.heads.ibot.prototypes
        equal = wanted.centre_weighting == "processes"
        self._centres = {
            name: RunningCentre(prototypes, wanted.centre_momentum, device, world, each_process_equal=equal)
            for name, prototypes in (("dino", dino), ("ibot", ibot))
        }
        self.dino, self.ibot = self._centres["dino"], self._centres["ibot"]

    def update(self) -> None:
        """Take over what the step saw."""
        self.dino.update()
        self.ibot.update()

    def state(self) -> dict[str, Tensor]:
        """Return the centres as ``centre/<head>``; none with Sinkhorn-Knopp."""
        return {f"centre/{name}": centre.value_K for name, centre in self._centres.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        for name, centre in self._centres.items():
            stored = tensors[f"centre/{name}"]
            if stored.shape != centre.value_K.shape:
                raise KeyError(f"centre/{name} has {len(stored)} prototypes, not {len(centre.value_K)}")
            centre.value_K = stored.to(centre.value_K)
