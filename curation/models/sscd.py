"""SSCD: 512 numbers that stay close when an image is copied and edited.

Three kinds of files, told apart by what they say: an int8 ONNX that eats uint8 (B, H, W, 3), a float ONNX and Meta's
TorchScript that both eat ImageNet-normalised floats (B, 3, H, W).

Images are squashed to a square. The authors publish two ways, short side 288 or a square of 320, and say that a
square is better for batches and that images should then be resized to it directly, without keeping their shape. With
the short side alone images of different shapes cannot share a batch, and what a batch is padded with would be seen; so
it is the square: 320 for TorchScript, as published, and 288 for ONNX, at which the registered int8 file was measured,
unless the file itself or ``side_px`` says otherwise.

Source:
    Pizzi et al. 2022, "A self-supervised descriptor for image copy detection"; preprocessing as in the README of
    facebookresearch/sscd-copy-detection.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import DimensionError, WeightsError
from curation.models.formats import check_torchscript
from curation.models.onnx_session import FAILURES, open_session
from curation.models.vectors import normalised
from curation.models.weights import Weights

DIM = 512
TORCHSCRIPT_SIDE_PX, ONNX_SIDE_PX = 320, 288
_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32) * 255
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32) * 255

Precision = Literal["fp32", "fp16", "bf16"]
_Pixels = npt.NDArray[np.uint8]
_Forward = Callable[[_Pixels], npt.NDArray[Any]]


class SscdEncoder:
    """Batched copy-detection descriptors.

    Attributes:
        batch_size: Images per forward pass; smaller batches are padded.
        dim: 512.
        side_px: Side of the square that images are squashed to.
    """

    def __init__(
        self,
        weights: Weights,
        batch_size: int = 8,
        side_px: int | None = None,
        num_threads: int = 1,
        device: str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        """Load the model.

        Args:
            weights: ``.onnx``, or TorchScript (``.pt``, ``.torchscript``).
            batch_size: Images per forward pass.
            side_px: Images are squashed to this square; None: the file's own, else as published for its kind.
            num_threads: Threads inside an operator.
            device: ``cpu`` or ``cuda``.
            precision: Of matrix products and convolutions of a TorchScript file; sums that need it stay float32.

        Raises:
            WeightsError: The file is neither, or takes other batches, sides or precisions than asked for.
        """
        self.batch_size = batch_size
        self.dim = DIM
        if weights.path.suffix == ".onnx":
            if precision != "fp32":
                raise WeightsError(
                    f"weights {weights.name}: an ONNX file has its own precision; set sscd.precision to fp32, or use a "
                    "file that was exported in that precision"
                )
            self.side_px, self._forward = _onnx(weights, batch_size, side_px, num_threads, device)
        else:
            self.side_px = side_px or TORCHSCRIPT_SIDE_PX
            self._forward = _torchscript(weights, num_threads, device, precision)

    def prepare(self, rgb_HW3: _Pixels) -> _Pixels:
        """Return one image as the model sees it, shape (side_px, side_px, 3), uint8 RGB."""
        size = (self.side_px, self.side_px)
        return np.asarray(Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BILINEAR), dtype=np.uint8)

    def __call__(self, batch: Sequence[_Pixels]) -> npt.NDArray[np.float32]:
        """Return L2-normalised descriptors of prepared images, shape (B, 512), float32; NaN where there is none.

        Raises:
            DimensionError: The model does not give 512 numbers an image.
            WeightsError: The model cannot be run on such a batch.
        """
        x_BHWC = np.zeros((self.batch_size, self.side_px, self.side_px, 3), dtype=np.uint8)
        for row, image_HW3 in enumerate(batch):
            x_BHWC[row] = image_HW3
        y_BD = self._forward(x_BHWC)
        if y_BD.shape != (self.batch_size, DIM):
            raise DimensionError(f"the SSCD model gave {y_BD.shape} for {self.batch_size} images, not (B, {DIM})")
        return normalised(y_BD[: len(batch)])


def _onnx(
    weights: Weights, batch_size: int, side_px: int | None, num_threads: int, device: str
) -> tuple[int, _Forward]:
    """Return the side and the forward pass of an ONNX file, as its input says."""
    session = open_session(weights, num_threads, device)
    eats = session.get_inputs()[0]
    kinds = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    shape = list(eats.shape)
    if eats.type not in kinds or len(shape) != 4 or len(session.get_inputs()) != 1:
        raise WeightsError(
            f"weights {weights.path}: takes {eats.type} {shape}, not one batch of images (uint8 pixels, or float "
            "ImageNet-normalised)"
        )
    kind = kinds[eats.type]
    channels_last = shape[3] == 3 or (shape[1] != 3 and kind is np.uint8)
    fixed = [size if isinstance(size, int) else None for size in (shape[1:3] if channels_last else shape[2:])]
    if isinstance(shape[0], int) and shape[0] != batch_size:
        raise WeightsError(f"weights {weights.path}: takes batches of {shape[0]}; set sscd.batch_size to it")
    if any(size is not None and size != (side_px or fixed[0]) for size in fixed):
        raise WeightsError(f"weights {weights.path}: takes images of {fixed} px, not squares of sscd.side_px {side_px}")

    def forward(x_BHWC: _Pixels) -> npt.NDArray[Any]:
        x_B = x_BHWC if kind is np.uint8 else _standardised(x_BHWC).astype(kind)
        x_B = np.ascontiguousarray(x_B if channels_last else x_B.transpose(0, 3, 1, 2))
        try:
            y_BD: npt.NDArray[Any] = session.run(None, {eats.name: x_B})[0]
        except FAILURES as error:
            raise WeightsError(f"weights {weights.path}: cannot be run on {x_B.shape}: {error}") from error
        return y_BD

    return side_px or fixed[0] or ONNX_SIDE_PX, forward


def _torchscript(weights: Weights, num_threads: int, device: str, precision: Precision) -> _Forward:
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
    # Autocast and not half(): GeM pooling cubes activations, which leaves the range of float16 from 40 on.
    half = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def forward(x_BHWC: _Pixels) -> npt.NDArray[Any]:
        x_BCHW = torch.from_numpy(np.ascontiguousarray(_standardised(x_BHWC).transpose(0, 3, 1, 2))).to(device)
        with torch.inference_mode(), torch.autocast(device, half, enabled=half is not None):
            y_BD: npt.NDArray[Any] = model(x_BCHW).float().cpu().numpy()
        return y_BD

    return forward


def _standardised(x_BHWC: _Pixels) -> npt.NDArray[np.float32]:
    return np.asarray((x_BHWC - _MEAN) / _STD, dtype=np.float32)
