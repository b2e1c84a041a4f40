"""Any timm model as an image encoder: pooled features, unit length.

Weights are a file (``.safetensors``, or a ``.pth`` / ``.pt`` state dict, loaded with ``weights_only``) or what timm
publishes on the hub. Images are seen as the model was evaluated: short side resized, centre crop (or squashed,
where the model was), its own mean, deviation and interpolation.
"""

import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from curation.errors import WeightsError
from curation.models import hub, torchvision_shim
from curation.models.vectors import normalised
from curation.models.weights import Weights

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What both readers were seen to raise on files that are something else; they have no common base.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)
# Wrappers in which training scripts save a state dict.
_WRAPPERS = ("state_dict", "model", "teacher", "model_ema")


class ImageEncoder:
    """Batched features of a timm model.

    Attributes:
        batch_size: Images per forward pass; smaller batches are padded.
        dim: Features an image.
        side_px: Side of the square that the model sees.
        short_px: Short side that an image is resized to before a square is cut out of it.
        identity: What the features depend on, for fingerprints: model, weights digest, side.
        license: Of the weights.
    """

    def __init__(
        self,
        model: str,
        weights: Weights | None,
        *,
        accept_licenses: Sequence[str] = (),
        side_px: int | None = None,
        batch_size: int = 16,
        num_threads: int = 1,
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            model: A timm model name; without ``weights`` also ``hf-hub:organisation/name``.
            weights: A state dict's file; None: what is published for the model, see ``hub.py``.
            accept_licenses: Licences that the user accepts; looked at for the hub only.
            side_px: Input side; None: the model's own.
            batch_size: Images per forward pass.
            num_threads: Threads of torch on a CPU; holds for the process.
            device: ``cpu`` or ``cuda``.

        Raises:
            WeightsError: Unknown model, missing weights, weights of another model, or a licence not accepted.
        """
        torch.set_num_threads(num_threads)
        self.batch_size = batch_size
        self._device = torch.device(device)
        network, digest, self.license = _load(model, weights, accept_licenses)
        settings = _evaluation_settings(network)
        if side_px is not None and hasattr(network, "set_input_size"):  # transformers; resamples position embeddings
            network.set_input_size(img_size=side_px)
        self._network = network.eval().to(self._device)
        self.side_px = side_px or int(settings["input_size"][-1])
        # A square centre crop of ``side_px`` out of an image whose short side is this.
        self.short_px = math.floor(self.side_px / float(settings["crop_pct"]))
        self._squashes = settings.get("crop_mode") == "squash"
        self._filter = _FILTERS.get(str(settings["interpolation"]), Image.Resampling.BICUBIC)
        self._mean_C11 = torch.tensor(settings["mean"], device=self._device).view(3, 1, 1) * 255
        self._std_C11 = torch.tensor(settings["std"], device=self._device).view(3, 1, 1) * 255
        self.dim = int(self._forward(np.zeros((1, self.side_px, self.side_px, 3), np.uint8)).shape[1])
        self.identity = f"{model}@{digest}@{self.side_px}"

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
        x_BHWC = np.zeros((self.batch_size, self.side_px, self.side_px, 3), dtype=np.uint8)
        for row, image_HW3 in enumerate(batch):
            x_BHWC[row] = image_HW3
        return normalised(self._forward(x_BHWC)[: len(batch)])

    def _forward(self, x_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            x_BCHW = torch.from_numpy(x_BHWC).to(self._device).permute(0, 3, 1, 2).float()
            y_BD: npt.NDArray[np.float32] = (
                self._network((x_BCHW - self._mean_C11) / self._std_C11).float().cpu().numpy()
            )
        return y_BD


def _evaluation_settings(network: torch.nn.Module) -> Mapping[str, Any]:
    from timm.data.config import resolve_model_data_config

    settings: Mapping[str, Any] = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return settings


def _load(model: str, weights: Weights | None, accept_licenses: Sequence[str]) -> tuple[Any, str, str]:
    """Return the network without its classifier, the digest of its weights and their licence."""
    torchvision_shim.prepare()
    import timm

    if weights is None and model.startswith(hub.PREFIX):
        return hub.load_published(model, accept_licenses)
    if not timm.is_model(model.partition(".")[0]):
        raise WeightsError(f"embed.model {model}: timm {timm.__version__} knows no such model")
    if weights is None:
        return hub.load_published(model, accept_licenses)
    state = _state_dict(weights.path)
    # With its classifier first: a file of the whole model then fits entry by entry.
    num_classes = _num_classes(state)
    network = _create(model, num_classes)
    _fit(network, state, weights.path)
    if num_classes:
        network.reset_classifier(0)
    return network, weights.sha256, weights.license


def _create(model: str, num_classes: int) -> Any:
    import timm

    try:
        return timm.create_model(model, pretrained=False, num_classes=num_classes)
    except (RuntimeError, OSError, ValueError) as error:
        raise WeightsError(f"embed.model {model}: cannot be made: {error}") from error


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors; nothing in the file can run."""
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except _UNREADABLE as error:
        raise WeightsError(f"weights {path}: cannot be read as tensors: {error}") from error
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"weights {path}: not a state dict of tensors")
    return {str(key): value for key, value in loaded.items() if not str(key).endswith("num_batches_tracked")}


def _num_classes(state: Mapping[str, torch.Tensor]) -> int:
    for key in ("_fc.bias", "classifier.bias", "fc.bias", "head.bias", "head.fc.bias"):
        if key in state:
            return int(state[key].shape[0])
    return 0


def _fit(network: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load tensors by name, or by order where names differ but every shape agrees in order.

    The second is how the same architecture's weights from another library fit (EfficientNet-Lite0: 247 tensors).
    """
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    if set(wanted) != set(state):
        if [tuple(value.shape) for value in wanted.values()] != [tuple(value.shape) for value in state.values()]:
            missing = sorted(set(wanted) - set(state))[:3]
            raise WeightsError(
                f"weights {path}: belong to another model; {len(missing)} or more are missing: {missing}"
            )
        state = dict(zip(wanted, state.values(), strict=True))
    try:
        network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"weights {path}: belong to another model: {error}") from error
