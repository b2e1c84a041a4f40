"""Write pixels as a JPEG quantised like another one: no coarser, which would blur, and no finer, which would bloat.

Blocks whose pixels did not change then fall on the same quantisation steps again (``jpeg_edit``).
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

from curation.colours import BROKEN
from curation.errors import ImageError
from curation.prescan import lean

_SUBSAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
_MAX_STEP = 255  # of a baseline JPEG


@dataclass(frozen=True)
class JpegCoding:
    """How a JPEG is quantised.

    Attributes:
        tables: Quantisation steps of luma, and of chroma where there is any: 64 integers from 1 to 255 each, row by
            row.
        subsampling: Of chroma: ``4:4:4``, ``4:2:2`` or ``4:2:0``.
        grey: Whether there is luma only.
    """

    tables: tuple[tuple[int, ...], ...]
    subsampling: str
    grey: bool


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Yield a JPEG without its metadata, which Pillow reads slowly and stumbles over, and its orientation, 1 to 8.

    Raises:
        ImageError: The bytes are no JPEG, or what is done with them inside the block fails as it does on broken ones.
    """
    seen = lean(data, max_pixels=0)  # of other formats; a JPEG is not asked
    try:
        with Image.open(io.BytesIO(seen.data), formats=("JPEG",)) as image:
            yield image, seen.orientation
    except BROKEN as error:
        raise ImageError("undecodable", f"JPEG: {error}"[:200]) from error


def coding_of(data: bytes) -> JpegCoding | None:
    """Return how a JPEG is quantised; None for CMYK, RGB and what else cannot be written again the same way.

    It is meant for upright pixels: where the orientation turns them by 90 degrees against the coded ones, tables are
    transposed and chroma that is subsampled in one direction only is written in full.

    Args:
        data: A JPEG that ``images.decode`` accepts.

    Raises:
        ImageError: The bytes are no JPEG.
    """
    with opened(data) as (image, orientation):
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            return None
        return _coding(image, turned=orientation >= 5)


def encode_jpeg(rgb_HW3: npt.NDArray[np.uint8], coding: JpegCoding) -> bytes:
    """Encode pixels, shape (H, W, 3), uint8, with these tables and without any metadata.

    Pixels that are not grey are written in colour even where ``coding`` has luma only.

    Raises:
        ImageError: A JPEG cannot hold an image of this size.
    """
    image = Image.fromarray(np.ascontiguousarray(rgb_HW3))
    if coding.grey and bool((rgb_HW3 == rgb_HW3[:, :, :1]).all()):
        image = image.getchannel(0)
    return save_jpeg(image, coding)


def save_jpeg(image: Image.Image, coding: JpegCoding) -> bytes:
    """Encode an image of mode L, RGB or YCbCr as ``encode_jpeg`` does; YCbCr is coded as it is."""
    options: dict[str, Any] = {} if image.mode == "L" else {"subsampling": coding.subsampling}
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", qtables=[list(table) for table in coding.tables], **options)
    except (OSError, ValueError) as error:  # JPEG ends at 65,535 pixels a side
        raise ImageError("undecodable", f"cannot write as jpeg: {error}") from error
    return buffer.getvalue()


def _coding(image: JpegImagePlugin.JpegImageFile, turned: bool) -> JpegCoding | None:
    grey = image.mode == "L"
    components: list[tuple[int, int, int, int]] = list(image.layer)  # id, samples across, samples down, table
    # Adobe's transform 0 says that three components are red, green and blue; so do their ids where there is no JFIF.
    is_rgb = image.info.get("adobe_transform") == 0 or [part[0] for part in components] == [82, 71, 66]
    if not grey and (image.mode != "RGB" or len(components) != 3 or is_rgb):
        return None
    steps = {number: np.clip(np.array(table), 1, _MAX_STEP) for number, table in image.quantization.items()}
    if any(part[3] not in steps or steps[part[3]].shape != (64,) for part in components):
        return None
    luma_64 = steps[components[0][3]]
    # Two tables for chroma are rare; the finer of both loses nothing.
    wanted = [luma_64] if grey else [luma_64, np.minimum(steps[components[1][3]], steps[components[2][3]])]
    if turned:
        wanted = [table.reshape(8, 8).T.ravel() for table in wanted]
    subsampling = _SUBSAMPLING.get(JpegImagePlugin.get_sampling(image), "4:4:4")
    if turned and subsampling == "4:2:2":
        subsampling = "4:4:4"
    return JpegCoding(tuple(tuple(table.tolist()) for table in wanted), subsampling, grey)
