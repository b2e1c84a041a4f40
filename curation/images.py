"""Encoded bytes to upright 8-bit sRGB pixels, and back, with hostile input in mind.

What an image is decides its content, never its name. Pillow is only ever offered the seven allowed formats; width and
height are checked against the limits before pixels are allocated; whatever Pillow raises on broken input becomes an
``ImageError`` with one of ``schema.IMAGE_REASONS``. Metadata surgery that leaves pixels alone is in ``containers.py``.
"""

import ctypes
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, _imaging

from curation import containers
from curation.colours import BROKEN, narrow_key, profiles, upright_srgb
from curation.config.images import ImagesConfig
from curation.errors import ImageError
from curation.prescan import lean

FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "GIF": "gif", "BMP": "bmp"}
FORMATS["TIFF"] = "tiff"
LOSSLESS = frozenset({"png", "gif", "bmp", "tiff"})

# MPO is what Pillow calls a JPEG with further pictures after its end; it opens as JPEG and is not a plug-in of its own.
_PLUGINS = tuple(name for name in FORMATS if name != "MPO")

_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|....ftypavi[fs]|GIF8[79]a|II\*\0|MM\0\*", re.DOTALL
)


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image says.

    Attributes:
        format: ``jpeg``, ``png``, ``webp``, ``avif``, ``gif``, ``bmp`` or ``tiff``.
        width: Pixels, after EXIF orientation.
        height: Pixels, after EXIF orientation.
    """

    format: str
    width: int
    height: int


def inspect(data: bytes, limits: ImagesConfig) -> ImageInfo:
    """Read the header and check it against the limits, without decoding pixels.

    Args:
        data: Encoded bytes.
        limits: Largest area, shortest side and most extreme aspect that are accepted.

    Raises:
        ImageError: The image is refused; ``reason`` is one of ``schema.IMAGE_REASONS``.
    """
    with _opened(data, limits) as (image, orientation):
        return _info(image, orientation)


def inspect_pixels(data: bytes, limits: ImagesConfig) -> ImageInfo:
    """Like ``inspect``, and decode the pixels to see that they are all there; opened once, so cheaper than both.

    JPEGs are decoded at 1/8 of their size: every coded byte is still read, so damage shows, in a third of the time.

    Raises:
        ImageError: The image is refused; ``reason`` is one of ``schema.IMAGE_REASONS``.
    """
    with _opened(data, limits) as (image, orientation):
        info = _info(image, orientation)
        _load(image, 1)
        if image.mode not in ("RGB", "L") or "icc_profile" in image.info:  # else nothing could go wrong later on
            upright_srgb(image, orientation)
        return info


def decode(
    data: bytes,
    limits: ImagesConfig,
    min_side_px: int | Callable[[int, int], int | None] | None = None,
    headroom: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image (its first frame), shape (H, W, 3), upright sRGB.

    CMYK and embedded ICC profiles are converted to sRGB, then alpha is composited on white. Samples of 12, 16 and 32
    bits keep their highest 8, floating-point samples are taken from [0, 1].

    Args:
        data: Encoded bytes.
        limits: Checked before pixels are allocated.
        min_side_px: The short side that the consumer resizes to. Lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size
            (libjpeg's DCT scaling), see ``docs/images.md`` for what that gains and costs. None decodes in full. A
            function is asked with the upright width and height.
        headroom: The decoded short side keeps at least ``headroom * min_side_px`` pixels: 1 is fastest, 2 leaves the
            last halving to the consumer's own, better filter.

    Raises:
        ImageError: The image is refused; ``reason`` is one of ``schema.IMAGE_REASONS``.
    """
    with _opened(data, limits) as (image, orientation):
        wanted_px = min_side_px(*_upright(image.size, orientation)) if callable(min_side_px) else min_side_px
        _load(image, None if wanted_px is None else max(1, math.ceil(wanted_px * headroom)))
        return upright_srgb(image, orientation)


def _info(image: Image.Image, orientation: int) -> ImageInfo:
    return ImageInfo(FORMATS[image.format or ""], *_upright(image.size, orientation))


def _load(image: Image.Image, min_side_px: int | None) -> None:
    """Decode; a JPEG at the smallest scale whose sides are not below ``min_side_px``."""
    if min_side_px is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (min_side_px, min_side_px))
    narrow_key(image)
    image.load()


def encode(rgb_HW3: npt.NDArray[np.uint8], format: str, quality: int = 92) -> bytes:  # noqa: A002
    """Encode pixels, without any metadata.

    Args:
        rgb_HW3: sRGB pixels, shape (H, W, 3), uint8.
        format: ``jpeg``, ``png`` or ``webp``.
        quality: 1 to 100, of the lossy formats.

    Raises:
        ImageError: The format cannot be written or cannot hold an image of this size.
    """
    return _encoded(Image.fromarray(np.ascontiguousarray(rgb_HW3)), format, quality)


def encode_anew(
    data: bytes,
    limits: ImagesConfig,
    size: Callable[[int, int], tuple[int, int]],
    format: str,  # noqa: A002
    quality: int,
    min_side_px: int | None = None,
) -> tuple[bytes, ImageInfo]:
    """Decode an image, scale it, and encode it anew, upright, in sRGB and without metadata.

    Args:
        data: Encoded bytes.
        limits: Checked before pixels are allocated.
        size: Returns the new width and height, given the upright ones.
        format: ``jpeg``, ``png`` or ``webp``.
        quality: 1 to 100, of the lossy formats.
        min_side_px: A JPEG may be decoded at a smaller scale that keeps its sides at or above this; None: in full.

    Returns:
        The new bytes, and what they are.

    Raises:
        ImageError: The image is refused, or cannot be written.
    """
    with _opened(data, limits) as (image, orientation):
        width, height = size(*_upright(image.size, orientation))
        _load(image, min_side_px)
        if image.mode == "RGB" and orientation == 1 and not image.info.keys() & {"icc_profile", "transparency"}:
            image.info.clear()  # writers take some of it, which depends on the version of Pillow
            pixels: Image.Image = image
        else:
            pixels = Image.fromarray(upright_srgb(image, orientation))
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return _encoded(pixels, format, quality), ImageInfo(format, width, height)


def _encoded(image: Image.Image, format: str, quality: int) -> bytes:  # noqa: A002
    if format not in ("jpeg", "png", "webp"):
        raise ImageError("undecodable", f"cannot write {format}")
    buffer = io.BytesIO()
    options = {"compress_level": 6} if format == "png" else {"quality": quality}
    try:
        image.save(buffer, format.upper(), **options)
    except (OSError, ValueError) as error:  # JPEG ends at 65,535 pixels a side, WebP at 16,383
        raise ImageError("undecodable", f"cannot write as {format}: {error}") from error
    return buffer.getvalue()


def strip_metadata(
    data: bytes,
    format: str,  # noqa: A002
    limits: ImagesConfig | None = None,
    quality: int = 95,
) -> tuple[bytes, str]:
    """Remove everything but the pixels, and what their colours and orientation need.

    EXIF (with its GPS position and thumbnail), XMP, IPTC, comments, further frames and whatever follows the image go.
    JPEG, PNG and still WebP are not decoded: their coded pixels are copied. Animated WebP, GIF, BMP and TIFF become
    PNG with the pixels that ``decode`` returns; AVIF, whose PNG would be ten times larger, becomes a JPEG.

    Args:
        data: Bytes that ``decode`` accepts.
        format: Their format, as in ``ImageInfo``.
        limits: For those that have to be decoded; None: the defaults.
        quality: Of the JPEG that replaces an AVIF or a JPEG with a broken structure.

    Returns:
        The new bytes, and their format.

    Raises:
        ImageError: The image had to be decoded and is refused.
    """
    limits = limits or ImagesConfig.model_validate({})
    coded = stripped(data, format, limits)
    return (coded, format) if coded is not None else encode_like(decode(data, limits), format, quality)


def stripped(data: bytes, format: str, limits: ImagesConfig) -> bytes | None:  # noqa: A002
    """Return what ``strip_metadata`` does where coded pixels can be copied; None where they have to be encoded anew."""
    strip = {"jpeg": containers.strip_jpeg, "png": containers.strip_png, "webp": containers.strip_webp}.get(format)
    if strip is None:
        return None
    with _opened(data, limits) as (image, orientation):
        used, profile = profiles(image)
    return strip(data, orientation, profile) if used == (profile is not None) else None


def encode_like(rgb_HW3: npt.NDArray[np.uint8], format: str, quality: int) -> tuple[bytes, str]:  # noqa: A002
    """Encode the pixels of a format that is not copied: JPEG and AVIF as JPEG, others as PNG; return its format too."""
    written = "jpeg" if format in ("jpeg", "avif") else "png"
    return encode(rgb_HW3, written, quality), written


def _upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return width and height after turning."""
    return size[::-1] if orientation >= 5 else size


@contextmanager
def _opened(data: bytes, limits: ImagesConfig) -> Iterator[tuple[Image.Image, int]]:
    """Open the header, refuse what the limits refuse; yield the image and its EXIF orientation, 1 to 8."""
    try:
        seen = lean(data, limits.max_pixels)
        with _open(seen.data, limits) as image:
            turned = image.info.get("exif") if image.format == "AVIF" else None  # Pillow's words for its own boxes
            yield image, containers.exif_orientation(turned) if isinstance(turned, bytes) else seen.orientation
    except UnidentifiedImageError as error:
        if not _SIGNATURES.match(data):
            raise ImageError("not_an_image", "content is none of the allowed formats") from error
        reason = "truncated" if _is_truncated(data, error) else "undecodable"
        raise ImageError(reason, "the header is broken") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except BROKEN as error:
        reason = "truncated" if _is_truncated(data, error) else "undecodable"
        raise ImageError(reason, f"{type(error).__name__}: {error}"[:200]) from error


def _is_truncated(data: bytes, error: BaseException) -> bool:
    """Whether bytes are missing at the end: decoders say so, WebP and AVIF (one call for all) do not."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return True
    if data[:4] == b"RIFF" and len(data) >= 8:
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return data[4:8] == b"ftyp" and containers.is_cut_bmff(data)


def _open(data: bytes, limits: ImagesConfig) -> Image.Image:
    """Open the header only, and refuse what the limits refuse."""
    _quiet_pillow()
    # Pillow's own guard covers what is not visible in ``size``, such as GIF frames larger than their screen; it
    # raises at twice this number, the check below at once.
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    image = Image.open(io.BytesIO(data), formats=_PLUGINS)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("undecodable", f"{width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height} is more than images.max_pixels")
    if min(width, height) < limits.min_side_px:
        raise ImageError("too_small", f"{width} x {height}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError("bad_aspect", f"{width} x {height}")
    return image


def _quiet_libtiff() -> None:
    """Keep libtiff from writing to standard error, past Python; what it says makes Pillow raise as well.

    A symbol asked of Pillow's own module is looked for in the libraries that it is linked with.
    """
    with suppress(OSError, AttributeError):  # another way of linking: the lines stay
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


_quiet_libtiff()
_PILLOW_FILTER_MODULE = r"PIL\..*|curation\.(images|colours)"


def _quiet_pillow() -> None:
    """Keep Pillow from warning about each odd image of a crawl.

    ``warnings.catch_warnings`` is not safe in threads and decoding runs in several, so a filter is put in front once,
    and again when someone has reset the filters.
    """
    filters: Any = warnings.filters
    if not filters or getattr(filters[0][3], "pattern", None) != _PILLOW_FILTER_MODULE:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER_MODULE)
