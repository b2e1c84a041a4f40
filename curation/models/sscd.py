"""SSCD: 512 numbers that stay close when an image is copied and edited.

Three kinds of files, told apart by what they say: an int8 ONNX that eats uint8 (B, H, W, 3), a float ONNX and Meta's
TorchScript that both eat ImageNet-normalised float32 (B, 3, H, W).

Source:
    Pizzi et al. 2022, "A self-supervised descriptor for image copy detection".
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import DimensionError, WeightsError
from curation.models.formats import check_torchscript
from curation.models.onnx_session import open_session
from curation.models.vectors import normalised
from curation.models.weights import Weights

DIM = 512
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32) * 255
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32) * 255


class SscdEncoder:
    """Batched copy-detection descriptors.

    Attributes:
        batch_size: Images per forward pass; smaller batches are padded.
        dim: 512.
    """

    def __init__(
        self, weights: Weights, batch_size: int = 8, side_px: int = 288, num_threads: int = 1, device: str = "cpu"
    ) -> None:
        """Load the model.

        Args:
            weights: ``.onnx``, or TorchScript (``.pt``, ``.torchscript``).
            batch_size: Images per forward pass.
            side_px: Images are resized to this square.
            num_threads: Threads inside an operator.
            device: ``cpu`` or ``cuda``.

        Raises:
            WeightsError: The file is neither.
        """
        self.batch_size = batch_size
        self.dim = DIM
        self._side_px = side_px
        is_onnx = weights.path.suffix == ".onnx"
        self._forward = (_onnx if is_onnx else _torchscript)(weights, num_threads, device)

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return one image as the model sees it, shape (side_px, side_px, 3), uint8 RGB."""
        size = (self._side_px, self._side_px)
        return np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return L2-normalised descriptors of prepared images, shape (B, 512), float32; NaN where there is none.

        Raises:
            DimensionError: The model does not give 512 numbers an image.
        """
        x_BHWC = np.zeros((self.batch_size, self._side_px, self._side_px, 3), dtype=np.uint8)
        for row, image_HW3 in enumerate(batch):
            x_BHWC[row] = image_HW3
        y_BD = self._forward(x_BHWC)
        if y_BD.shape != (self.batch_size, DIM):
            raise DimensionError(f"the SSCD model gave {y_BD.shape} for {self.batch_size} images, not (B, {DIM})")
        return normalised(y_BD[: len(batch)])


_Forward = Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]


def _onnx(weights: Weights, num_threads: int, device: str) -> _Forward:
    session = open_session(weights, num_threads, device)
    eats = session.get_inputs()[0]
    eats_pixels = eats.type == "tensor(uint8)"

    def forward(x_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        y_BD: npt.NDArray[Any] = session.run(None, {eats.name: x_BHWC if eats_pixels else _standardised(x_BHWC)})[0]
        return y_BD

    return forward


def _torchscript(weights: Weights, num_threads: int, device: str) -> _Forward:
    import torch

    torch.set_num_threads(num_threads)
    data = weights.read()  # the bytes that were checked are those that are loaded: this format is a program
    check_torchscript(data, weights.path)
    try:
        with warnings.catch_warnings():
            # Deprecated since torch 2.9, but the only format in which SSCD is published.
            warnings.simplefilter("ignore", DeprecationWarning)
            model = torch.jit.load(io.BytesIO(data), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"weights {weights.path}: not a TorchScript file: {str(error).splitlines()[0]}") from error

    def forward(x_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        with torch.inference_mode():
            y_BD: npt.NDArray[Any] = model(torch.from_numpy(_standardised(x_BHWC)).to(device)).float().cpu().numpy()
        return y_BD

    return forward


def _standardised(x_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(((x_BHWC - _MEAN) / _STD).transpose(0, 3, 1, 2), dtype=np.float32)
