"""Collapse and other trouble, said in words when the monitors have seen it several times in a row."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from curation.dinov2.config import TrainConfig

LOOKS_IN_A_ROW = 3
_SAME_POINT = 0.02  # distance on the unit sphere; a healthy run began at 0.2 (docs/training.md)
_ONE_DIRECTION = 1.5  # RankMe; the same run began at 11
_SAYS_NOTHING = 0.99  # share of log K
_GRADIENT_RISE = 100.0
_GRADIENTS_KEPT = 50
_FEWEST_GRADIENTS = 10

_ADVICE = (
    "stop, and begin again in another folder with a lower optim.base_lr or more schedule.warmup_steps (start.run takes "
    "over weights that are still good)"
)


class Alarms:
    """Turns monitored figures into warnings, each once until its reason has gone.

    Nothing is said during the warm-up of the learning rate: all class tokens begin alike.

    Args:
        config: Of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._warmup_steps = config.schedule.warmup_steps
        self._num_prototypes = config.heads.dino.prototypes
        self._num_rows = 2 * config.data.batch_size
        self._seen: dict[str, int] = {}
        self._gradients: dict[str, deque[float]] = {}

    def see(self, step: int, figures: Mapping[str, float | None]) -> tuple[str, ...]:
        """Return what there is to say after one look.

        Args:
            step: Finished steps.
            figures: Of the step; those that are missing or not finite say nothing.
        """
        values = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        signs = {**self._collapse(values), **self._gradient_signs(values)} if step > self._warmup_steps else {}
        self._seen = {name: self._seen.get(name, 0) + 1 for name in signs}
        return tuple(f"step {step}: {signs[name]}" for name, times in self._seen.items() if times == LOOKS_IN_A_ROW)

    def _collapse(self, values: Mapping[str, float]) -> dict[str, str]:
        signs = {}
        distance = values.get("koleo_distance", math.inf)
        if distance < _SAME_POINT:
            signs["point"] = (
                f"features collapse: class tokens of different images lie {distance:.2g} apart on the unit sphere, "
                f"nearly one point; {_ADVICE}"
            )
        rank = values.get("rank", math.inf)
        if rank < _ONE_DIRECTION:
            signs["direction"] = f"features collapse: they use one direction (RankMe {rank:.2f}); {_ADVICE}"
        most = math.log(self._num_prototypes)
        entropy = values.get("teacher_entropy", 0.0)
        if entropy > _SAYS_NOTHING * most:
            signs["uniform"] = (
                f"the teacher tells images no longer apart: entropy {entropy:.2f} of at most {most:.2f}, every "
                f"prototype is as good as any other; {_ADVICE}"
            )
        used = values.get("prototypes_used", math.inf) * min(self._num_rows, self._num_prototypes)
        if used < 1.5:  # one, whatever was rounded
            signs["prototype"] = f"features collapse: all images of a step choose the same prototype; {_ADVICE}"
        return signs

    def _gradient_signs(self, values: Mapping[str, float]) -> dict[str, str]:
        signs = {}
        for name in sorted(name for name in values if name.startswith("grad_norm_")):
            before = self._gradients.setdefault(name, deque(maxlen=_GRADIENTS_KEPT))
            usual = median(before) if len(before) >= _FEWEST_GRADIENTS else math.inf
            if values[name] > _GRADIENT_RISE * usual:
                part = name.removeprefix("grad_norm_")
                signs[name] = (
                    f"gradients of {part} are {values[name]:.3g}, {values[name] / usual:.0f} times the usual "
                    f"{usual:.3g}: training is about to diverge; {_ADVICE}"
                )
            elif values[name] > 0:  # what is unusual must not become usual; a part may learn nothing for a while
                before.append(values[name])
        return signs
