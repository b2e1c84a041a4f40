"""What every file of the demo's website is, and a check that this is so.

A *group* is a photo with its planted copies; its name is the path of the photo. Photos of different groups show
regions of the sources that do not overlap, so a run that merges two groups is wrong.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from curation.demo.sources import Region
from curation.errors import InputError

Kind = Literal[
    "photo",  # an image to keep
    "face",  # a photo with a face
    "copy",  # a mild edit of a photo
    "small",  # the smaller choice of a srcset; a crawler may take it or not
    "exact_copy",  # the bytes of a photo at a second URL
    "seed_copy",  # a mild edit of a seed image
    "reference_copy",  # a mild edit of a reference image
    "broken",
    "robots",  # behind robots.txt
    "tracking_pixel",
    "missing",  # linked, but answered with 404
    "seed",  # not on the site
    "reference",  # not on the site
]
_GROUNDED = frozenset({"photo", "face", "seed", "reference", "robots"})  # each shows a region of its own
_DERIVED = frozenset({"copy", "small", "exact_copy", "seed_copy", "reference_copy"})
MINIMUM = {"face": 4, "copy": 60, "broken": 5, "robots": 3, "reference_copy": 10, "exact_copy": 3, "photo": 100}
SITE = "www/"


@dataclass(frozen=True)
class Item:
    """One file, or one link without a file.

    Attributes:
        path: Relative to the demo's folder, with ``/``; ``www/`` is the root of the site.
        kind: What it is.
        image_id: First 128 bits of the sha256 of the bytes, in hex; null for ``missing``.
        region: What it shows of the sources; for a face photo, its background. Null where it shows no whole photo.
        original: Path of the photo that this is a copy of; null where it is none.
        edit: How the copy was made, or how a broken file is broken.
        faces: Boxes of faces, left, top, right, bottom in pixels.
    """

    path: str
    kind: Kind
    image_id: str | None = None
    region: Region | None = None
    original: str | None = None
    edit: str | None = None
    faces: tuple[tuple[float, float, float, float], ...] = ()

    @property
    def group(self) -> str:
        """Path of the photo that this shows."""
        return self.original or self.path

    @property
    def on_site(self) -> bool:
        """Whether the website links it."""
        return self.path.startswith(SITE)

    def url(self, base_url: str) -> str:
        """Return where the website serves it."""
        return page_url(base_url, self.path)


def page_url(base_url: str, path: str) -> str:
    """Return the URL of a file under ``www/``."""
    return f"{base_url.rstrip('/')}/{quote(path.removeprefix(SITE))}"


def image_id(data: bytes) -> str:
    """Return the image id of encoded bytes; see ``schema.IMAGE_ID``."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True)
class Truth:
    """Everything about one built website.

    Attributes:
        maker: What it was made from: a version of this code, the seed, and versions of the libraries.
        pages: Paths of the HTML pages, sorted.
        items: Sorted by path.
    """

    maker: str
    pages: tuple[str, ...]
    items: tuple[Item, ...]

    def of(self, *kinds: Kind) -> tuple[Item, ...]:
        """Return the items of these kinds, by path."""
        return tuple(item for item in self.items if item.kind in kinds)

    def page_urls(self, base_url: str) -> tuple[str, ...]:
        """Return the URLs of the pages to crawl."""
        return tuple(page_url(base_url, page) for page in self.pages)

    def to_json(self) -> str:
        """Return the table as JSON, one item a line."""
        rows = ",\n".join(json.dumps(asdict(item)) for item in self.items)
        return f'{{"maker": {json.dumps(self.maker)},\n"pages": {json.dumps(self.pages)},\n"items": [\n{rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Truth":
        """Read what ``to_json`` wrote.

        Raises:
            InputError: Anything else.
        """
        try:
            tree = json.loads(text)
            return cls(str(tree["maker"]), tuple(tree["pages"]), tuple(_item(row) for row in tree["items"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a truth table of the demo: {type(error).__name__}: {error}") from error


def _item(row: dict[str, Any]) -> Item:
    if row["kind"] not in get_args(Kind):
        raise ValueError(f"unknown kind {row['kind']!r}")
    region = None if row["region"] is None else Region(**row["region"])
    left_top_right_bottom = tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in row["faces"])
    return Item(**{**row, "region": region, "faces": left_top_right_bottom})


def load(folder: Path) -> Truth:
    """Read ``truth.json`` of a built demo.

    Raises:
        InputError: It is missing or is not one.
    """
    try:
        return Truth.from_json((folder / "truth.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder / 'truth.json'}: cannot be read: {error.strerror}") from error


def check(truth: Truth, folder: Path) -> list[str]:
    """Return everything about the table that is not so; an empty list is what it should be."""
    return [*_check_files(truth, folder), *_check_originals(truth), *_check_regions(truth), *_check_counts(truth)]


def _check_files(truth: Truth, folder: Path) -> Iterable[str]:
    names = Counter(item.path for item in truth.items)
    yield from (f"{name}: listed {count} times" for name, count in names.items() if count > 1)
    for item in truth.items:
        path = folder / item.path
        if item.kind == "missing":
            if path.exists():
                yield f"{item.path}: should be missing"
        elif not path.is_file():
            yield f"{item.path}: no such file"
        elif image_id(path.read_bytes()) != item.image_id:
            yield f"{item.path}: has other bytes than listed"
    yield from (f"{page}: no such page" for page in truth.pages if not (folder / page).is_file())


def _check_originals(truth: Truth) -> Iterable[str]:
    by_path = {item.path: item for item in truth.items}
    whose = {"seed_copy": {"seed"}, "reference_copy": {"reference"}}
    for item in truth.items:
        if item.kind not in _DERIVED:
            if item.original is not None:
                yield f"{item.path}: a {item.kind} has no original"
            continue
        source = by_path.get(item.original or "")
        if source is None or source.kind not in whose.get(item.kind, {"photo", "face"}):
            yield f"{item.path}: its original {item.original} is not a photo of the table"
        elif source.region != item.region:
            yield f"{item.path}: shows another region than its original"
        elif (source.image_id == item.image_id) != (item.kind == "exact_copy"):
            yield f"{item.path}: bytes do not fit the kind {item.kind}"


def _check_regions(truth: Truth) -> Iterable[str]:
    grounded = [item for item in truth.items if item.kind in _GROUNDED]
    for index, item in enumerate(grounded):
        if item.region is None:
            yield f"{item.path}: no region"
            continue
        for other in grounded[:index]:
            if other.region is not None and item.region.overlaps(other.region):
                yield f"{item.path}: overlaps {other.path}"


def _check_counts(truth: Truth) -> Iterable[str]:
    counts = Counter(item.kind for item in truth.items)
    for kind, least in MINIMUM.items():
        if counts[kind] < least:  # type: ignore[index]
            yield f"{counts[kind]} of kind {kind}, fewer than {least}"  # type: ignore[index]
    yield from (f"{item.path}: a face photo without a face" for item in truth.of("face") if not item.faces)
