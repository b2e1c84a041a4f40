"""Mild edits: what happens to a photo on its way from site to site."""

import io
from collections.abc import Callable

from PIL import Image, ImageOps

from curation.edits import blurred, brighter, cropped, jpeg, scaled

ORIGINAL_QUALITY = 95  # above a copy's, so that of two equally large images the original has more bytes and is kept


def original(image: Image.Image, suffix: str) -> bytes:
    """Return the image as its owner would publish it: ``.jpg``, ``.png`` or ``.webp``."""
    out = io.BytesIO()
    if suffix == ".png":
        image.save(out, "PNG")
    elif suffix == ".webp":
        image.save(out, "WEBP", quality=ORIGINAL_QUALITY)
    else:
        image.save(out, "JPEG", quality=ORIGINAL_QUALITY, subsampling=0)
    return out.getvalue()


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg_q30": lambda image: jpeg(image, 30),
    "jpeg_q50": lambda image: jpeg(image, 50),
    "jpeg_q70": lambda image: jpeg(image, 70),
    "resize_50": lambda image: jpeg(scaled(image, 0.5)),
    "resize_75": lambda image: jpeg(scaled(image, 0.75)),
    "flip": lambda image: jpeg(ImageOps.mirror(image)),
    "grey": lambda image: jpeg(ImageOps.grayscale(image)),
    "blur": lambda image: jpeg(blurred(image, 1.5)),
    "brighter": lambda image: jpeg(brighter(image, 1.3)),
    "darker": lambda image: jpeg(brighter(image, 0.7)),
    "crop_80": lambda image: jpeg(cropped(image, 0.8, 0.12, 0.08)),  # off-centre, as people crop
}
