"""What happens to images on their way from site to site, as functions of pixels and a strength.

``EDITS`` is what ``curate calibrate`` plants: every edit with a few strengths, drawn choices (where a crop lies, what a
caption says) from the generator that is passed in, so that the same seed gives the same copies. Lengths are shares of
the image, so that a strength means the same at every size. Sources: the augmentations of the image similarity
challenge (Douze et al. 2021, arXiv 2106.09672), whose edits SSCD was trained against and is evaluated on.
"""

import io
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

COPY_QUALITY = 85  # of a copy that is saved again without further loss
_MIN_SIDE_PX = 16  # a copy is not made smaller: it would be refused as too small, and say nothing about similarity
_BLUR_SIDE_PX = 256  # blur radii are pixels of an image with this short side
_COLOURS = ((222, 60, 40), (250, 205, 40), (40, 120, 220), (245, 245, 245), (20, 20, 20))

Photo = Image.Image
Others = Sequence[Photo]


def jpeg(image: Photo, quality: int = COPY_QUALITY) -> bytes:
    """Return the image as JPEG."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def scaled(image: Photo, share: float, stretch: float = 1.0) -> Photo:
    """Return the image with its sides times ``share``, and its width times ``stretch`` besides."""
    size = max(_MIN_SIDE_PX, round(image.width * share * stretch)), max(_MIN_SIDE_PX, round(image.height * share))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image: Photo, share: float, left: float, top: float) -> Photo:
    """Return ``share`` of each side, from ``left`` and ``top`` on, which are shares of the sides too."""
    x, y = round(image.width * left), round(image.height * top)
    return image.crop((x, y, x + max(1, round(image.width * share)), y + max(1, round(image.height * share))))


def blurred(image: Photo, radius_px: float) -> Photo:
    """Return the image under a Gaussian of this deviation."""
    return image.filter(ImageFilter.GaussianBlur(radius_px))


def brighter(image: Photo, factor: float) -> Photo:
    """Return the image with its values times ``factor``; below 1 it is darker."""
    return ImageEnhance.Brightness(image).enhance(factor)


@dataclass(frozen=True)
class Edit:
    """One way to change an image.

    Attributes:
        name: Short, for tables.
        means: What a strength is.
        strengths: From mild to strong.
        change: Takes an RGB image, a strength, a generator and other images; returns the copy.
        num_others: Other images that it needs for a strength.
        quality: JPEG quality of the copy for a strength.
    """

    name: str
    means: str
    strengths: tuple[float, ...]
    change: Callable[[Photo, float, np.random.Generator, Others], Photo]
    num_others: Callable[[float], int] = lambda strength: 0
    quality: Callable[[float], int] = lambda strength: COPY_QUALITY

    def __call__(self, image: Photo, strength: float, rng: np.random.Generator, others: Others = ()) -> bytes:
        """Return the copy as JPEG."""
        copy = self.change(image, strength, rng, others)
        return jpeg(copy if copy.mode in ("RGB", "L") else copy.convert("RGB"), self.quality(strength))


def _crop(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    left, top = rng.uniform(0, 1 - strength, 2)
    return cropped(image, strength, left, top)


def _rotate(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    degrees = strength if rng.random() < 0.5 else -strength
    return image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)


def _noise(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    rgb_HW3 = np.asarray(image, np.float32)
    noisy = rgb_HW3 + rng.standard_normal(rgb_HW3.shape, np.float32) * strength
    return Image.fromarray(np.clip(noisy.round(), 0, 255).astype(np.uint8))


def _text(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    font = ImageFont.load_default(max(6.0, image.height * strength))
    words = ["".join(rng.choice(list(string.ascii_letters), int(rng.integers(3, 8)))) for _ in range(3)]
    place = image.width * rng.uniform(0, 0.1), image.height * rng.uniform(0, 1 - strength)
    draw.text(place, " ".join(words), _colour(rng), font, stroke_width=1, stroke_fill=(0, 0, 0))
    return copy


def _emoji(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    side = min(image.size) * strength
    x, y = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)

    def at(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return x + left * side, y + top * side, x + right * side, y + bottom * side

    draw.ellipse(at(0, 0, 1, 1), fill=_COLOURS[1], outline=(90, 70, 0), width=max(1, round(side / 30)))
    for left in (0.25, 0.6):
        draw.ellipse(at(left, 0.25, left + 0.15, 0.45), fill=(40, 30, 10))
    draw.chord(at(0.2, 0.4, 0.8, 0.85), 0, 180, fill=(150, 30, 30))
    return copy


def _border(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    return ImageOps.expand(image, max(1, round(strength * min(image.size))), _colour(rng))


def _screenshot(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    """Show the image in a page with a title bar, lines of text and margins; it has ``strength`` of the width."""
    width = max(round(image.width / strength), image.width + 2)
    margin = (width - image.width) // 2
    bar, line = max(8, round(0.08 * image.height)), max(3, round(0.02 * image.height))
    page = Image.new("RGB", (width, bar + image.height + 2 * margin + 8 * line), (250, 250, 250))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, width, bar), fill=(60, 64, 72))
    for number, colour in enumerate(_COLOURS[:3]):
        left = bar * (0.3 + 0.7 * number)
        draw.ellipse((left, bar * 0.3, left + bar * 0.4, bar * 0.7), fill=colour)
    page.paste(image, (margin, bar + margin // 2))
    for number in range(3):
        top = bar + margin // 2 + image.height + (2 + 2 * number) * line
        draw.rectangle((margin, top, margin + image.width * rng.uniform(0.5, 1), top + line), fill=(150, 150, 150))
    return page


def _collage(image: Photo, strength: float, rng: np.random.Generator, others: Others) -> Photo:
    """Put the image beside others: two in a row, or four in a square; each is cut to the same tile."""
    columns, rows = (2, 1) if strength <= 2 else (2, 2)
    tiles = [image, *others[: columns * rows - 1]]
    page = Image.new("RGB", (columns * image.width, rows * image.height), (255, 255, 255))
    for place, tile in zip(rng.permutation(columns * rows), tiles, strict=False):
        fitted = tile if tile is image else ImageOps.fit(tile, image.size)
        page.paste(fitted, (int(place % columns) * image.width, int(place // columns) * image.height))
    return page


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return _COLOURS[int(rng.integers(len(_COLOURS)))]


def _plain(change: Callable[[Photo, float], Photo]) -> Callable[[Photo, float, np.random.Generator, Others], Photo]:
    return lambda image, strength, rng, others: change(image, strength)


def _relative_blur(image: Photo, strength: float) -> Photo:
    return blurred(image, strength * min(image.size) / _BLUR_SIDE_PX)


EDITS: tuple[Edit, ...] = (
    Edit("jpeg", "quality", (50, 30, 10), _plain(lambda image, _: image), quality=round),
    Edit("resize", "share of each side", (0.75, 0.5, 0.25), _plain(scaled)),
    Edit("crop", "share of each side", (0.9, 0.7, 0.5), _crop),
    Edit("aspect", "width stretched by", (1.2, 1.5, 2.0), _plain(lambda image, by: scaled(image, 1, by))),
    Edit("rotate", "degrees, either way", (5, 20, 90), _rotate),
    Edit("flip", "left to right", (1,), _plain(lambda image, _: ImageOps.mirror(image))),
    Edit("flip_vertical", "top to bottom", (1,), _plain(lambda image, _: ImageOps.flip(image))),
    Edit("brightness", "factor", (1.3, 0.7, 0.4), _plain(brighter)),
    Edit("contrast", "factor", (1.5, 0.6, 0.3), _plain(lambda image, by: ImageEnhance.Contrast(image).enhance(by))),
    Edit("saturation", "factor", (0.5, 1.6, 2.5), _plain(lambda image, by: ImageEnhance.Color(image).enhance(by))),
    Edit("blur", "radius, px of a short side of 256", (1, 2, 4), _plain(_relative_blur)),
    Edit("noise", "deviation, grey levels", (8, 20, 40), _noise),
    Edit("greyscale", "no colour", (1,), _plain(lambda image, _: ImageOps.grayscale(image))),
    Edit("text", "height of letters, share of the image's", (0.08, 0.15, 0.3), _text),
    Edit("emoji", "diameter, share of the short side", (0.15, 0.3, 0.5), _emoji),
    Edit("border", "width, share of the short side", (0.05, 0.15, 0.3), _border),
    Edit("screenshot", "share of the page's width", (0.9, 0.7, 0.5), _screenshot),
    Edit("collage", "tiles", (2, 4), _collage, num_others=lambda strength: round(strength) - 1),
)
