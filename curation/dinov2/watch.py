"""What is looked at every few steps: monitors, a small k-NN of the teacher, and the warnings that follow."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from curation.dinov2 import event_files
from curation.dinov2.alarms import Alarms
from curation.dinov2.config import KnnMonitorConfig, TrainConfig
from curation.dinov2.evaluate.backbones import Backbone, PixelBackbone, Tokens, at_random, normalised
from curation.dinov2.evaluate.config import RAW_SIDE_PX
from curation.dinov2.evaluate.features import View, extract
from curation.dinov2.evaluate.knn import knn_accuracy
from curation.dinov2.evaluate.labelled import open_labelled
from curation.dinov2.log import read
from curation.errors import InputError, VectorError

Encode = Callable[[Tensor], Tensor]  # normalised images (N, 3, H, W) to class tokens (N, D)


class Watch:
    """Decides when to look, looks, and says what it means.

    Args:
        config: Of the run.
        device: Where the teacher is.

    Raises:
        InputError: The labelled set of ``monitors.knn`` cannot be used.
        TrainError: A package that is asked for is missing.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._every = config.monitors.every_steps
        self._last = config.schedule.steps
        self._alarms = Alarms(config)
        self._knn = None if config.monitors.knn is None else SmallKnn(config.monitors.knn, config, device)
        if config.monitors.tensorboard:
            event_files.check()

    def is_due(self, step: int) -> bool:
        """Return whether the step with this number, from 1, is looked at."""
        return step % self._every == 0 or step in (1, self._last)

    def knn_figures(self, step: int, encode: Encode) -> dict[str, float]:
        """Return ``knn_top1`` and ``knn_top5`` of the teacher where it is time; every process must ask.

        Beside them ``knn_top1_random`` and ``knn_top1_pixels``: of the same network with random weights, of raw pixels.
        """
        if self._knn is None or not (step % self._knn.every_steps == 0 or step == self._last):
            return {}
        return self._knn(encode)

    def warnings(self, step: int, figures: Mapping[str, float | None]) -> tuple[str, ...]:
        """Return what the figures of a step give reason to say."""
        return self._alarms.see(step, figures) if self.is_due(step) else ()

    def recall(self, log: Path, step: int) -> None:
        """See again what a run that goes on has seen, so that it warns as if it had never been interrupted."""
        if not log.exists():
            return
        for line in read(log):
            if line["step"] <= step and self.is_due(int(line["step"])):
                self._alarms.see(int(line["step"]), {k: v for k, v in line.items() if isinstance(v, (int, float))})


class SmallKnn:
    """The accuracy of a weighted k-NN on a labelled set; its images are read again each time.

    Args:
        monitor: The set and the classifier.
        config: Of the run: seed, mean and deviation, side, limits of decoding.
        device: Where the teacher is.

    Raises:
        InputError: The set cannot be used, or has fewer images than neighbours.
    """

    def __init__(self, monitor: KnnMonitorConfig, config: TrainConfig, device: torch.device) -> None:
        self.every_steps = monitor.every_steps
        self._monitor = monitor
        self._device = device
        self._mean_std = (config.crops.mean, config.crops.std)
        self._config = config
        self._data = open_labelled(monitor.data, config.seed)
        if len(self._data.train) < monitor.k:
            raise InputError(
                f"{monitor.data.path}: holds {len(self._data.train)} images to learn from, fewer than "
                f"monitors.knn.k = {monitor.k}; lower it"
            )

    def __call__(self, encode: Encode) -> dict[str, float]:
        """Return the accuracy of the class tokens that ``encode`` gives, and of what stands beside.

        Class tokens that are not finite have none (NaN): what is watched does not end a run.
        """
        backbone = _Encoded(encode, self._mean_std, self._device, self._config.crops.global_px)
        try:
            top1, top5 = self._accuracy(backbone)
        except VectorError:
            top1 = top5 = math.nan
        return {"knn_top1": top1, "knn_top5": top5, **self._beside}

    @cached_property
    def _beside(self) -> dict[str, float]:
        """What the same network at random gives, and raw pixels: the same whenever it is asked."""
        config = self._config
        random = at_random(config.model, config.crops.global_px, self._mean_std, self._device, config.seed)
        return {
            "knn_top1_random": self._accuracy(random)[0],
            "knn_top1_pixels": self._accuracy(PixelBackbone(RAW_SIDE_PX, self._device))[0],
        }

    def _accuracy(self, backbone: Backbone) -> tuple[float, float]:
        view = View(backbone.side_px, self._monitor.crop_share, self._config.images)
        train, test = (
            extract(
                backbone,
                part,
                view,
                num_blocks=1,
                batch_size=self._monitor.batch_size,
                workers=self._monitor.workers,
            )
            for part in (self._data.train, self._data.test)
        )
        k = min(self._monitor.k, len(train))  # some may be unreadable
        found = knn_accuracy(train, test, len(self._data.classes), (k,), self._monitor.temperature, self._device)
        return found[k]


class _Encoded:
    """A function from images to class tokens as a backbone."""

    name = "teacher"
    patch_px = 1

    def __init__(
        self, encode: Encode, mean_std: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device, side_px: int
    ) -> None:
        self.side_px = side_px
        self._encode, self._mean_std, self._device = encode, mean_std, device

    def __call__(self, pixels_NHW3: Tensor, num_blocks: int) -> list[Tokens]:
        return [Tokens(self._encode(normalised(pixels_NHW3, *self._mean_std, self._device)), None)]

    def attention(self, pixels_NHW3: Tensor) -> Tensor | None:
        return None
