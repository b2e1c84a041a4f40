"""Real photos, cut into crops that do not overlap.

Eight photos that come inside the wheels of scikit-image and scikit-learn are cut along a grid of ``CELL_PX`` pixels.
The maps below say what becomes of each cell. A crop was left out where

- its mean gradient is under 4 grey levels a pixel (sky, shadow, paint: a copy-detection model cannot tell such crops
  apart, and loses them under mild JPEG compression); or
- SSCD (``sscd_disc_mixup``, int8) gives it, or one of its mild edits, a cosine above 0.5 with another crop or one of
  *its* edits: neighbouring bits of lawn or petal. The pipeline's threshold is 0.6.

Reference crops are those with the lowest such cosine, at most 0.38; the threshold for them is 0.45.

Some crops (``o``) are photos of the pool like others, but no copies are made of them:

- in fewer than half of their 16 x 16 px blocks the grey levels have a standard deviation of 8 (mostly sky or coat); or
- RetinaFace sees a face in them or an edit of them where there is none (score 0.45 or more: a mission patch, a cat's
  ear, a lamp). A run blurs it like any face, and a copy blurred where its original is not says nothing about copy
  detection. The camera man's own head was left out.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from curation.errors import InputError

CELL_PX = 64
PHOTO_PX = 256  # crops are enlarged four times, so that an edit that is mild for a web photo is mild for them
HEAD_BOX = (152, 14, 302, 188)  # hair included, in the astronaut photo; an ellipse in it is pasted
FACE_BOX = (177, 56, 272, 176)  # as RetinaFace sees it

Mark = Literal["#", "o", "R", "P"]  # a photo of the pool or the seeds; one never copied; a reference; behind robots.txt


@dataclass(frozen=True)
class Region:
    """A rectangle of a source photo: pixels ``x0 <= x < x1`` and ``y0 <= y < y1``."""

    source: str
    x0: int
    y0: int
    x1: int
    y1: int

    def overlaps(self, other: "Region") -> bool:
        """Return whether both show a common pixel of a common source."""
        return (
            self.source == other.source
            and self.x0 < other.x1
            and other.x0 < self.x1
            and self.y0 < other.y1
            and other.y0 < self.y1
        )


@dataclass(frozen=True)
class Source:
    """A photo inside an installed package.

    Attributes:
        package: Import name.
        file: Path inside the package.
        size: Width and height in pixels.
        marks: One character a cell, row by row; ``.``: left out, ``F``: background of a face photo.
    """

    package: str
    file: str
    size: tuple[int, int]
    marks: tuple[str, ...]


SOURCES: dict[str, Source] = {
    "astronaut": Source(
        "skimage",
        "data/astronaut.png",
        (512, 512),
        (
            "#.FFF.#.",
            "..FFF.#.",
            "#oFFF.#.",
            ".#...oRo",
            "##o##Ro.",
            "o####R#.",
            "o####..#",
            "###o#..#",
        ),
    ),
    "camera": Source(
        "skimage",
        "data/camera.png",
        (512, 512),
        (
            "........",
            "..##....",
            "o.#.R#..",
            "#.o#####",
            "...o#oP.",
            "..#.#.#.",
            "..#.....",
            ".#.###..",
        ),
    ),
    "chelsea": Source(
        "skimage",
        "data/chelsea.png",
        (451, 300),
        (
            ".#P#.R.",
            "o#o###.",
            ".#####.",
            "#.###..",
        ),
    ),
    "coffee": Source(
        "skimage",
        "data/coffee.png",
        (600, 400),
        (
            ".###..o.o",
            "P##.R.#..",
            ".o##..#o#",
            "##Rooo.##",
            ".#.FF###.",
            "#o.FF###.",
        ),
    ),
    "rocket": Source(
        "skimage",
        "data/rocket.jpg",
        (640, 427),
        (
            "..........",
            "..........",
            ".....o....",
            "....FF....",
            "..o.FF...R",
            "##.###....",
        ),
    ),
    "motorcycle": Source(
        "skimage",
        "data/motorcycle_left.png",
        (741, 500),
        (
            "###.#oo####",
            "oo#####oo##",
            "##o#oR#o###",
            "o#o##oo#oR#",
            "####RRoR##.",
            "FF##o##.#o.",
            "FF..oo..o#o",
        ),
    ),
    "china": Source(
        "sklearn",
        "datasets/images/china.jpg",
        (640, 427),
        (
            "...o......",
            ".##P.....o",
            "###...FF.o",
            "Ro#.##FF#.",
            "o#..R##.##",
            "#.##.###..",
        ),
    ),
    "flower": Source(
        "sklearn",
        "datasets/images/flower.jpg",
        (640, 427),
        (
            "..........",
            "....#.....",
            "..o#o.....",
            "....FF....",
            "....FF....",
            "....#.#...",
        ),
    ),
}


@dataclass(frozen=True)
class FacePhoto:
    """The one colour face of the sources, put into a photo.

    Attributes:
        source: The photo.
        cell: Column and row of the top left cell of the background.
        cells: Cells of the background along each side; they are enlarged to ``PHOTO_PX``.
        head_height_px: Height of the pasted head in the finished photo; 0: the face is where it always was.
        centre: Centre of the head as shares of width and height.
        flip: Whether the head looks the other way.
    """

    source: str
    cell: tuple[int, int]
    cells: int
    head_height_px: int = 0
    centre: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


FACE_PHOTOS = (
    FacePhoto("astronaut", (2, 0), 3),
    FacePhoto("rocket", (4, 3), 2, head_height_px=110, centre=(0.28, 0.62)),
    FacePhoto("china", (6, 2), 2, head_height_px=150, centre=(0.70, 0.60), flip=True),
    FacePhoto("motorcycle", (0, 5), 2, head_height_px=105, centre=(0.74, 0.30)),
    FacePhoto("coffee", (3, 4), 2, head_height_px=95, centre=(0.24, 0.26), flip=True),
    FacePhoto("flower", (4, 3), 2, head_height_px=115, centre=(0.72, 0.70)),
)


def cell_region(name: str, column: int, row: int, cells: int = 1) -> Region:
    """Return the square of ``cells`` x ``cells`` grid cells; the grid is centred in the photo."""
    source = SOURCES[name]
    left = (source.size[0] - len(source.marks[0]) * CELL_PX) // 2 + column * CELL_PX
    top = (source.size[1] - len(source.marks) * CELL_PX) // 2 + row * CELL_PX
    return Region(name, left, top, left + cells * CELL_PX, top + cells * CELL_PX)


def regions(mark: Mark) -> Iterator[Region]:
    """Yield the cells that carry a mark, source by source, row by row."""
    for name, source in SOURCES.items():
        for row, marks in enumerate(source.marks):
            for column, found in enumerate(marks):
                if found == mark:
                    yield cell_region(name, column, row)


class Photos:
    """Opens each source once and cuts crops from it."""

    def __init__(self) -> None:
        self._open: dict[str, Image.Image] = {}

    def crop(self, region: Region) -> Image.Image:
        """Return the region, enlarged to ``PHOTO_PX`` x ``PHOTO_PX`` RGB pixels.

        Raises:
            InputError: The package that ships the photo is not installed, or ships another one.
        """
        box = (region.x0, region.y0, region.x1, region.y1)
        return self._source(region.source).crop(box).resize((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)

    def with_face(self, photo: FacePhoto) -> tuple[Image.Image, Region, tuple[float, float, float, float]]:
        """Return the finished photo, the region of its background, and the face's box in pixels."""
        region = cell_region(photo.source, *photo.cell, photo.cells)
        image = self.crop(region)
        if not photo.head_height_px:
            scale = PHOTO_PX / (region.x1 - region.x0)
            left, top, right, bottom = FACE_BOX
            shift_x, shift_y = float(region.x0), float(region.y0)
        else:
            scale = photo.head_height_px / (HEAD_BOX[3] - HEAD_BOX[1])
            head = self._head(photo)
            corner_x = round(photo.centre[0] * PHOTO_PX - head.width / 2)
            corner_y = round(photo.centre[1] * PHOTO_PX - head.height / 2)
            image.paste(head, (corner_x, corner_y), _ellipse(head.size))
            left, top, right, bottom = FACE_BOX
            if photo.flip:
                left, right = HEAD_BOX[0] + HEAD_BOX[2] - right, HEAD_BOX[0] + HEAD_BOX[2] - left
            shift_x, shift_y = HEAD_BOX[0] - corner_x / scale, HEAD_BOX[1] - corner_y / scale
        box = ((left - shift_x) * scale, (top - shift_y) * scale, (right - shift_x) * scale, (bottom - shift_y) * scale)
        return image, region, (round(box[0], 1), round(box[1], 1), round(box[2], 1), round(box[3], 1))

    def _head(self, photo: FacePhoto) -> Image.Image:
        head = self._source("astronaut").crop(HEAD_BOX)
        width = round(head.width * photo.head_height_px / head.height)
        head = head.resize((width, photo.head_height_px), Image.Resampling.LANCZOS)
        return ImageOps.mirror(head) if photo.flip else head

    def _source(self, name: str) -> Image.Image:
        if name not in self._open:
            self._open[name] = _open(SOURCES[name])
        return self._open[name]


def _open(source: Source) -> Image.Image:
    spec = importlib.util.find_spec(source.package)  # finds the folder without importing the package, which is slow
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo needs photos of {source.package}; install them with: pip install 'curation[demo]'")
    path = Path(spec.submodule_search_locations[0]) / source.file
    try:
        with Image.open(path) as image:
            size, pixels = image.size, image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: cannot be read; the demo needs the versions in constraints.txt: {error}") from error
    if size != source.size:
        raise InputError(f"{path}: is {size}, not {source.size}; the demo needs the versions in constraints.txt")
    return pixels


def _ellipse(size: tuple[int, int]) -> Image.Image:
    """Return a mask that fades out at its border, so that no hard edge betrays the pasted head."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((3, 3, size[0] - 4, size[1] - 4), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(2))
