"""Encoded bytes to upright 8-bit sRGB pixels, and back, with hostile input in mind.

What an image is decides its content, never its name. Pillow is only ever offered the seven allowed formats; width and
height are checked against the limits before pixels are allocated; whatever Pillow raises on broken input becomes an
``ImageError`` with one of ``schema.IMAGE_REASONS``. Metadata surgery that leaves pixels alone is in ``containers.py``.
"""

import ctypes
import functools
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError, _imaging

from curation import containers, icc
from curation.config import ImagesConfig
from curation.errors import ImageError
from curation.prescan import lean

FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "GIF": "gif", "BMP": "bmp"}
FORMATS["TIFF"] = "tiff"
LOSSLESS = frozenset({"png", "gif", "bmp", "tiff"})

# MPO is what Pillow calls a JPEG with further pictures after its end; it opens as JPEG and is not a plug-in of its own.
_PLUGINS = tuple(name for name in FORMATS if name != "MPO")

# Everything Pillow 11 to 13 was seen to raise on broken files. ``Warning``: a caller may have made warnings errors.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Warning,
)

_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|....ftypavi[fs]|GIF8[79]a|II\*\0|MM\0\*", re.DOTALL
)
_MAX_PROFILE_BYTES = 4 << 20
_STRIP_PIXELS = 1 << 20
_TIFF_SAMPLES = (258, 16), (339, 1), (262, 1)  # bits, format, what zero means; and what they are without a word
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
        width, height = image.size
        if orientation >= 5:
            width, height = height, width
        return ImageInfo(FORMATS[image.format or ""], width, height)


def decode(
    data: bytes, limits: ImagesConfig, min_side_px: int | None = None, headroom: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image (its first frame), shape (H, W, 3), upright sRGB.

    CMYK and embedded ICC profiles are converted to sRGB, then alpha is composited on white. Samples of 12, 16 and 32
    bits keep their highest 8, floating-point samples are taken from [0, 1].

    Args:
        data: Encoded bytes.
        limits: Checked before pixels are allocated.
        min_side_px: The short side that the consumer resizes to. Lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size
            (libjpeg's DCT scaling), see ``docs/images.md`` for what that gains and costs. None decodes in full.
        headroom: The decoded short side keeps at least ``headroom * min_side_px`` pixels: 1 is fastest, 2 leaves the
            last halving to the consumer's own, better filter.

    Raises:
        ImageError: The image is refused; ``reason`` is one of ``schema.IMAGE_REASONS``.
    """
    with _opened(data, limits) as (image, orientation):
        if min_side_px is not None and image.format in ("JPEG", "MPO"):
            side_px = max(1, math.ceil(min_side_px * headroom))
            image.draft(None, (side_px, side_px))
        _narrow_key(image)
        image.load()
        return _pixels(image, orientation)


def encode(rgb_HW3: npt.NDArray[np.uint8], format: str, quality: int = 92) -> bytes:  # noqa: A002
    """Encode pixels, without any metadata.

    Args:
        rgb_HW3: sRGB pixels, shape (H, W, 3), uint8.
        format: ``jpeg``, ``png`` or ``webp``.
        quality: 1 to 100, of the lossy formats.

    Raises:
        ImageError: The format cannot be written or cannot hold an image of this size.
    """
    if format not in ("jpeg", "png", "webp"):
        raise ImageError("undecodable", f"cannot write {format}")
    buffer = io.BytesIO()
    options = {"compress_level": 6} if format == "png" else {"quality": quality}
    try:
        Image.fromarray(np.ascontiguousarray(rgb_HW3)).save(buffer, format.upper(), **options)
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
    strip = {"jpeg": containers.strip_jpeg, "png": containers.strip_png, "webp": containers.strip_webp}.get(format)
    if strip is not None:
        with _opened(data, limits) as (image, orientation):
            used, profile = _profiles(image)
        stripped = strip(data, orientation, profile) if used == (profile is not None) else None
        if stripped is not None:
            return stripped, format
    written = "jpeg" if format in ("jpeg", "avif") else "png"
    return encode(decode(data, limits), written, quality), written


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
    except _BROKEN as error:
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
_PILLOW_FILTER_MODULE = r"PIL\..*|curation\.images"


def _quiet_pillow() -> None:
    """Keep Pillow from warning about each odd image of a crawl.

    ``warnings.catch_warnings`` is not safe in threads and decoding runs in several, so a filter is put in front once,
    and again when someone has reset the filters.
    """
    filters: Any = warnings.filters
    if not filters or getattr(filters[0][3], "pattern", None) != _PILLOW_FILTER_MODULE:
        warnings.filterwarnings("ignore", module=_PILLOW_FILTER_MODULE)


def _pixels(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    """Return a loaded image as upright sRGB pixels, converted strip by strip: whole copies would each take as much."""
    width, height = image.size
    is_turned, is_mirrored = orientation >= 5, orientation in (3, 4, 6, 7)  # on its side; last stored row comes first
    rgb_HW3 = np.empty((width, height, 3) if is_turned else (height, width, 3), np.uint8)
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    num_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        strip = image if num_rows >= height else image.crop((0, top, width, bottom))
        srgb = _to_srgb(strip, tags)
        if orientation in _TRANSPOSE:
            srgb = srgb.transpose(_TRANSPOSE[orientation])
        place = slice(height - bottom, height - top) if is_mirrored else slice(top, bottom)
        rgb_HW3[(slice(None), place) if is_turned else place] = np.asarray(srgb)
    return rgb_HW3


def _to_srgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return mode RGB: wide samples narrowed, embedded profile applied, then alpha on white.

    In this order: white is that of sRGB, and a profile knows nothing of colours that were mixed with it.
    """
    profile = image.info.get("icc_profile")
    colours, alpha = _colours_and_alpha(image, tags)
    transform = _srgb_transform(profile, colours.mode) if isinstance(profile, bytes) else None
    if transform is not None:
        colours = transform.apply(colours)
    elif colours.mode != "RGB":
        colours = colours.convert("RGB")
    if alpha is None:
        return colours
    rgb = Image.new("RGB", colours.size, "white")
    rgb.paste(colours, mask=alpha)
    return rgb


def _profiles(image: Image.Image) -> tuple[bool, bytes | None]:
    """Return whether the pixels of an opened image depend on its profile, and one that can stand for it, if any can."""
    profile = image.info.get("icc_profile")
    mode = _colour_mode(image)
    if not isinstance(profile, bytes) or _srgb_transform(profile, mode) is None:
        return False, None
    return True, _slimmed(profile, mode)


@functools.lru_cache(maxsize=64)
def _slimmed(profile: bytes, mode: str) -> bytes | None:
    """Return a profile of nothing but colours that converts a grid of them as the given one does, if there is one."""
    small = icc.slimmed(profile)
    transforms = [_srgb_transform(data, mode) if data is not None else None for data in (profile, small)]
    if None in transforms:
        return None
    num_bands = len(Image.new(mode, (1, 1)).getbands())
    levels = np.linspace(0, 255, {1: 256, 3: 33, 4: 13}[num_bands]).astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * num_bands, indexing="ij"), axis=-1).reshape(len(levels), -1, num_bands)
    colours = Image.frombytes(mode, (grid.shape[1], grid.shape[0]), grid.tobytes())
    before, after = (transform.apply(colours).tobytes() for transform in transforms if transform is not None)
    return small if before == after else None


def _colour_mode(image: Image.Image) -> str:
    """Return the mode of what ``_colours_and_alpha`` returns first."""
    mode = image.mode
    if mode in ("L", "LA", "La", "I", "F") or mode.startswith("I;16"):
        return "L"
    return "L" if mode == "1" and "transparency" in image.info else "CMYK" if mode == "CMYK" else "RGB"


def _colours_and_alpha(image: Image.Image, tags: Mapping[int, Any]) -> tuple[Image.Image, Image.Image | None]:
    """Return mode L, RGB or CMYK, as the file's profile would describe it, and alpha (mode L) if there is any."""
    key = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        wide = np.asarray(image)
        alpha = Image.fromarray(np.where(wide == key, np.uint8(0), np.uint8(255))) if isinstance(key, int) else None
        return Image.fromarray(_narrowed(wide, tags)), alpha
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or key is not None:
        with_alpha = image.convert("LA" if image.mode in ("L", "1", "LA", "La") else "RGBA")
        return with_alpha.convert(with_alpha.mode[:-1]), with_alpha.getchannel("A")
    return image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB"), None


def _narrow_key(image: Image.Image) -> None:
    """Narrow a 16-bit PNG's transparent colour like its samples: Pillow compares its low byte with their high one."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", ())
    if image.format == "PNG" and isinstance(key, tuple) and any(tile.args == "RGB;16B" for tile in tiles):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _narrowed(samples: npt.NDArray[Any], tags: Mapping[int, Any]) -> npt.NDArray[np.uint8]:
    """Return grey samples of 12, 16 or 32 bits or floating point as 8 bits.

    Only the file's own word on its samples counts, never their values: the same value is the same grey in every file.

    Raises:
        ImageError: Nothing says which value is white.
    """
    bits, kind, meaning = (_tag(tags, number, default) for number, default in _TIFF_SAMPLES)
    if samples.dtype.kind == "f":
        if not ((samples >= 0) & (samples <= 1)).all():
            raise ImageError("undecodable", "floating-point samples outside 0 to 1, where white is not defined")
        grey: npt.NDArray[np.uint8] = np.rint(samples * 255).astype(np.uint8)
    elif kind != 1:
        raise ImageError("undecodable", "signed samples, where white is not defined")
    else:
        unsigned = samples.view(np.uint32) if samples.dtype.kind == "i" else samples  # mode I is of signed integers
        grey = (unsigned >> (bits - 8)).astype(np.uint8)
    return 255 - grey if meaning == 0 else grey  # white is zero, which Pillow heeds for 8 bits only


def _tag(tags: Mapping[int, Any], number: int, default: int) -> int:
    value = tags.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


# Profiles that are sRGB by name; others that only speak of it (linear sRGB) are converted.
_SRGB = frozenset({"sRGB", "sRGB built-in", "sRGB IEC61966-2.1", "sRGB IEC61966-2-1", "sRGB IEC61966-2-1 black scaled"})


@functools.lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of a profile to sRGB; None where there is nothing to convert or the profile is broken."""
    if not 128 < len(profile) <= _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = str(source.profile.xcolor_space).strip()
        description = str(source.profile.profile_description or "")
        if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != mode or description in _SRGB:
            return None
        # NOCACHE: without lcms's one-pixel cache a transform may be applied by several threads at a time.
        return ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB", flags=ImageCms.Flags.NOCACHE
        )
    except (ImageCms.PyCMSError, *_BROKEN):
        return None
