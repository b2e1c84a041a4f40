"""Any timm model as an image encoder: features of unit length.

Images are seen as the model was evaluated: short side resized, centre crop (or squashed, where the model was), its own
mean, deviation and interpolation, at any side. ``networks.py`` says what weights may be.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from curation.config.selection import EmbedConfig
from curation.errors import WeightsError
from curation.models import networks
from curation.models.allocator import keep_freed_memory
from curation.models.vectors import normalised
from curation.models.weights import Weights

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ImageEncoder:
    """Batched features of a network.

    Attributes:
        batch_size: Images per forward pass; smaller batches are padded.
        dim: Features an image.
        side_px: Side of the square that the model sees.
        short_px: Short side that an image is resized to before a square is cut out of it.
        identity: What the features depend on: model, weights digest, side, features, precision.
        license: Of the weights.
    """

    def __init__(
        self, config: EmbedConfig, weights: Weights, *, device: str = "cpu", num_threads: int | None = 1
    ) -> None:
        """Load the model.

        Args:
            config: Model, side, features, precision and batch size.
            weights: Its file.
            device: ``cpu`` or ``cuda``.
            num_threads: Threads of torch on a CPU; holds for the process. None: as they are. Workers have one each:
                features then do not depend on a machine's cores, and two workers on one thread are faster than one on
                two (docs/embed.md).

        Raises:
            WeightsError: Unknown model, weights of another model, features that the model does not have, or a device,
                precision or compiler that is not there.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if device == "cpu":
            keep_freed_memory()
        self.batch_size = config.batch_size
        self._features = config.features
        self._dtype = _DTYPES[config.precision]
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format
        if device == "cuda" and not torch.cuda.is_available():
            raise WeightsError("resources.embed.gpus: this torch sees no GPU; install its CUDA build, or set gpus to 0")
        self._device = torch.device(device)
        if config.precision == "float32":
            torch.backends.cudnn.allow_tf32 = False  # else convolutions keep 10 bits of 23
        network = networks.load(config, weights)
        settings = _evaluation_settings(network)
        self.license = weights.license
        self._network = network.to(device=self._device, dtype=self._dtype, memory_format=self._format)
        self.side_px = config.side_px or int(settings["input_size"][-1])
        # A square centre crop of ``side_px`` out of an image whose short side is this.
        self.short_px = math.floor(self.side_px / float(settings["crop_pct"]))
        self._squashes = settings.get("crop_mode") == "squash"
        self._filter = _FILTERS.get(str(settings["interpolation"]), Image.Resampling.BICUBIC)
        self._mean_C11 = torch.tensor(settings["mean"], device=self._device).view(3, 1, 1) * 255
        self._std_C11 = torch.tensor(settings["std"], device=self._device).view(3, 1, 1) * 255
        self._run = torch.compile(self._read, dynamic=False) if config.compile else self._read
        self.dim = self._first_run(config)
        self.identity = f"{config.model}@{weights.sha256}@{self.side_px}@{config.features}@{config.precision}"

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return one image as the model sees it, shape (side_px, side_px, 3), uint8 RGB."""
        height, width = rgb_HW3.shape[:2]
        # Resizing just the part that the crop keeps gives the pixels of resizing all and cropping then.
        kept_px = min(min(height, width) * self.side_px / self.short_px, min(height, width))
        left, top = (width - kept_px) / 2, (height - kept_px) / 2
        box = (0, 0, width, height) if self._squashes else (left, top, left + kept_px, top + kept_px)
        image = Image.fromarray(rgb_HW3).resize((self.side_px, self.side_px), self._filter, box=box)
        return np.asarray(image, dtype=np.uint8)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return L2-normalised features of prepared images, shape (B, dim), float32; NaN where there are none."""
        x_BHWC = self._empty_batch()
        pixels_BHWC = x_BHWC.numpy()
        for row, image_HW3 in enumerate(batch):
            pixels_BHWC[row] = image_HW3
        return _joined([part_BD[: len(batch)] for part_BD in self._forward(x_BHWC)])

    def _empty_batch(self) -> torch.Tensor:
        shape = (self.batch_size, self.side_px, self.side_px, 3)
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _first_run(self, config: EmbedConfig) -> int:
        """Return the number of features; what compilers and devices refuse, they refuse at the first run."""
        try:
            return int(_joined(self._forward(self._empty_batch())).shape[1])
        except (RuntimeError, NotImplementedError, AssertionError, OSError) as error:
            how = f"precision {config.precision}{', compiled,' if config.compile else ''} on {self._device.type}"
            reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
            raise WeightsError(f"embed.model {config.model}: cannot run with {how}: {reason[:300]}") from error

    def _forward(self, x_BHWC: torch.Tensor) -> list[npt.NDArray[np.float32]]:
        with torch.inference_mode():
            x_BCHW = x_BHWC.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
            x_BCHW = ((x_BCHW - self._mean_C11) / self._std_C11).to(self._dtype, memory_format=self._format)
            return [part_BD.float().cpu().numpy() for part_BD in self._run(x_BCHW)]

    def _read(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of the features, each (B, dim)."""
        network = self._network
        is_tokens = networks.has_class_token(network)
        if self._features == "default" or (self._features == "pooled" and not is_tokens):
            return [network(x_BCHW)]
        tokens_BPD = network.forward_features(x_BCHW)
        if tokens_BPD.ndim != 3:
            raise RuntimeError(f"it has no sequence of tokens for embed.features {self._features}")
        parts = []
        if self._features != "pooled":
            parts.append(tokens_BPD[:, 0])
        if self._features != "cls":
            patches_BPD = tokens_BPD[:, getattr(network, "num_prefix_tokens", 1) :]
            if not patches_BPD.shape[1]:  # PiT gives its class token alone
                raise RuntimeError(f"it has no tokens of patches for embed.features {self._features}")
            parts.append(patches_BPD.mean(dim=1))
        # The norm behind the pooling, of models that have it there and none before it.
        norm = getattr(network, "fc_norm", None)
        return [part_BD if norm is None else norm(part_BD) for part_BD in parts]


def _joined(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Return unit rows; of several parts each has unit length before, so that all weigh the same in a cosine."""
    if len(parts) == 1:
        return normalised(parts[0])
    return normalised(np.concatenate([normalised(part_BD) for part_BD in parts], axis=1))


def _evaluation_settings(network: torch.nn.Module) -> Mapping[str, Any]:
    from timm.data.config import resolve_model_data_config

    settings: Mapping[str, Any] = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return settings
