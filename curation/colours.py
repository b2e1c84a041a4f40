"""Pixels as Pillow holds them, in any mode and colour space, to upright 8-bit sRGB.

Converted strip by strip: what a decoder and Pillow hold is large enough, and whole copies would each take as much.
"""

import functools
import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from curation import icc
from curation.errors import ImageError

# Everything Pillow 11 to 13 was seen to raise on broken files. ``Warning``: a caller may have made warnings errors.
BROKEN = (
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


def upright_srgb(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
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


def profiles(image: Image.Image) -> tuple[bool, bytes | None]:
    """Return whether the pixels of an opened image depend on its profile, and one that can stand for it, if any can."""
    profile = image.info.get("icc_profile")
    mode = _colour_mode(image)
    if not isinstance(profile, bytes) or _srgb_transform(profile, mode) is None:
        return False, None
    return True, _slimmed(profile, mode)


@functools.lru_cache(maxsize=16)
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


def narrow_key(image: Image.Image) -> None:
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
    except (ImageCms.PyCMSError, *BROKEN):
        return None
