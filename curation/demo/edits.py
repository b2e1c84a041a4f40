"""Mild edits: what happens to a photo on its way from site to site."""

import io
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

ORIGINAL_QUALITY = 95
COPY_QUALITY = 85  # under the originals', so that of two equally large images the original has more bytes and is kept


def jpeg(image: Image.Image, quality: int = COPY_QUALITY) -> bytes:
    """Return the image as JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


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


def _scaled(share: float) -> Callable[[Image.Image], bytes]:
    def edit(image: Image.Image) -> bytes:
        size = round(image.width * share), round(image.height * share)
        return jpeg(image.resize(size, Image.Resampling.BICUBIC))

    return edit


def _cropped(image: Image.Image) -> bytes:
    left, top = round(image.width * 0.12), round(image.height * 0.08)  # off-centre, as people crop
    return jpeg(image.crop((left, top, left + round(image.width * 0.8), top + round(image.height * 0.8))))


EDITS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg_q30": lambda image: jpeg(image, 30),
    "jpeg_q50": lambda image: jpeg(image, 50),
    "jpeg_q70": lambda image: jpeg(image, 70),
    "resize_50": _scaled(0.5),
    "resize_75": _scaled(0.75),
    "flip": lambda image: jpeg(ImageOps.mirror(image)),
    "grey": lambda image: jpeg(ImageOps.grayscale(image)),
    "blur": lambda image: jpeg(image.filter(ImageFilter.GaussianBlur(1.5))),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.3)),
    "darker": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(0.7)),
    "crop_80": _cropped,
}
