"""Open-NSFW: the probability that an image is not safe for work.

The published preprocessing, exactly: 256 x 256 bilinear, centre crop of 224, a JPEG round trip, BGR less the training
mean. Leaving out the JPEG round trip moves scores by up to 0.13.
"""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.errors import DimensionError, WeightsError
from curation.models.onnx_session import open_session
from curation.models.weights import Weights

_RESIZE_PX = 256
_CROP_PX = 224
_MEAN_BGR = np.array([104, 117, 123], dtype=np.float32)


class NsfwScorer:
    """Batched scores of Open-NSFW on ONNX Runtime.

    Attributes:
        batch_size: Images per forward pass; smaller batches are padded.
    """

    def __init__(self, weights: Weights, batch_size: int = 16, num_threads: int = 1, device: str = "cpu") -> None:
        """Load the model.

        Args:
            weights: Open-NSFW in ONNX: input (B, 224, 224, 3) float32, output (B, 2).
            batch_size: Images per forward pass.
            num_threads: Threads inside an operator.
            device: ``cpu`` or ``cuda``.

        Raises:
            WeightsError: Another model than that.
        """
        self.batch_size = batch_size
        self._session = open_session(weights, num_threads, device)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if list(inputs[0].shape[1:]) != [_CROP_PX, _CROP_PX, 3] or outputs[0].shape[-1] != 2:
            raise WeightsError(
                f"weights {weights.path}: not Open-NSFW; its input is (B, 224, 224, 3), its output (B, 2)"
            )
        self._input = inputs[0].name

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image, shape (224, 224, 3), uint8 RGB."""
        offset = (_RESIZE_PX - _CROP_PX) // 2
        box = (offset, offset, offset + _CROP_PX, offset + _CROP_PX)
        resized = Image.fromarray(rgb_HW3).resize((_RESIZE_PX, _RESIZE_PX), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        resized.crop(box).save(buffer, "JPEG")  # Pillow's defaults, as in the published scorer
        return np.asarray(Image.open(buffer, formats=("JPEG",)), dtype=np.uint8)

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return the probability of each prepared image, shape (B,), float32 in [0, 1].

        Raises:
            DimensionError: More than ``batch_size`` images, or one that was not prepared.
        """
        if not batch:
            return np.zeros(0, dtype=np.float32)
        if len(batch) > self.batch_size or any(crop.shape != (_CROP_PX, _CROP_PX, 3) for crop in batch):
            shapes = sorted({crop.shape for crop in batch})
            raise DimensionError(
                f"nsfw: takes at most {self.batch_size} images of (224, 224, 3), got {len(batch)} of {shapes}"
            )
        x_BHWC = np.zeros((self.batch_size, _CROP_PX, _CROP_PX, 3), dtype=np.float32)
        for row, crop_HW3 in enumerate(batch):
            x_BHWC[row] = crop_HW3[:, :, ::-1] - _MEAN_BGR
        probabilities_B2 = self._session.run(None, {self._input: x_BHWC})[0]
        return np.array(probabilities_B2[: len(batch), 1], dtype=np.float32)
