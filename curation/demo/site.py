"""Builds the website, the seed set and the reference set of the demo in a folder.

    <folder>/www/                   what the server shows: pages, photos, copies, robots.txt
    <folder>/seeds/photos/          a curated set to retrieve towards
    <folder>/references/evaluation/ an evaluation set to keep out
    <folder>/truth.json             what each file is; written last

The same seed and library versions give the same bytes.
"""

import hashlib
import io
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import PIL
from PIL import Image, features

from curation.demo.broken import TRACKING_PIXEL, broken_files
from curation.demo.edits import EDITS, original
from curation.demo.pages import STYLES, gallery, index
from curation.demo.sources import FACE_PHOTOS, SOURCES, Photos, Region, regions
from curation.demo.truth import SITE, Item, Kind, Truth, check, image_id, load
from curation.errors import InputError

VERSION = 1  # raise when the files change
SEED_SET = "seeds/photos"
REFERENCE_SET = "references/evaluation"
NUM_SEEDS = 30
COPIES_PER_EDIT = 6
NUM_EXACT_COPIES = 8
NUM_SEED_COPIES = 4
NUM_SMALL = 6
ROBOTS = "User-agent: *\nDisallow: /private/\n\nUser-agent: no-such-crawler\nDisallow: /\n"
_FOLDERS = ("www", "seeds", "references")
_MARK = "made-by-curate-demo"  # only folders with it are ever cleared


def build_site(folder: Path, seed: int = 0) -> Truth:
    """Build the demo's files, or keep those that are already what they should be.

    Args:
        folder: Where to; made when missing. The files of an earlier build are replaced.
        seed: Decides which crops are seeds, which are copied, and how images spread over pages.

    Raises:
        InputError: scikit-image or scikit-learn is missing or has other photos, or the folder holds files of somebody
            else where the site should go.
    """
    maker = _maker(seed)
    if (folder / "truth.json").is_file():
        try:
            truth = load(folder)
        except InputError:  # half-written, or of an earlier version: build again
            truth = Truth("", (), ())
        if truth.maker == maker and not check(truth, folder):
            return truth
    _clear(folder)
    site = _Site(folder, random.Random(seed))
    site.build()
    truth = Truth(maker, tuple(sorted(site.pages)), tuple(sorted(site.items, key=lambda item: item.path)))
    problems = check(truth, folder)
    if problems:
        raise InputError(f"{folder}: the demo's website came out wrong: {'; '.join(problems[:3])}")
    (folder / "truth.json").write_text(truth.to_json(), encoding="utf-8")
    return truth


def _maker(seed: int) -> str:
    """Return what decides the bytes: this code, its maps, the seed and the encoders."""
    maps = hashlib.sha256(repr((SOURCES, FACE_PHOTOS)).encode()).hexdigest()[:8]
    encoders = ", ".join(f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "zlib"))
    return f"demo {VERSION}, maps {maps}, seed {seed}, pillow {PIL.__version__}, {encoders}"


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    taken = [name for name in _FOLDERS if (folder / name).exists()]
    if taken and not (folder / _MARK).is_file():
        raise InputError(f"{folder / taken[0]}: exists and is not of the demo; choose another folder or remove it")
    (folder / _MARK).write_bytes(b"")
    (folder / "truth.json").unlink(missing_ok=True)
    for name in taken:
        shutil.rmtree(folder / name)


class _Site:
    """Writes files and remembers what each is."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder = folder
        self.rng = rng
        self.photos = Photos()
        self.items: list[Item] = []
        self.pages: list[str] = []

    def build(self) -> None:
        cells = list(regions("#"))
        chosen = set(self.rng.sample(range(len(cells)), NUM_SEEDS))
        seeds = self._photos("seed", f"{SEED_SET}/", [cells[i] for i in sorted(chosen)])
        references = self._photos("reference", f"{REFERENCE_SET}/", regions("R"))
        pool = self._photos("photo", f"{SITE}photos/", [cell for i, cell in enumerate(cells) if i not in chosen])
        self._photos("photo", f"{SITE}more/", regions("o"))
        self._photos("robots", f"{SITE}private/", regions("P"))
        self._faces()
        self._edits("copy", self._originals(pool, len(EDITS) * COPIES_PER_EDIT), "copies")
        self._edits("reference_copy", references, "reposts")
        self._edits("seed_copy", self.rng.sample(seeds, NUM_SEED_COPIES), "reposts")
        for item in self.rng.sample(pool, NUM_EXACT_COPIES):
            data = (self.folder / item.path).read_bytes()
            self._write("exact_copy", f"{SITE}mirror/{Path(item.path).name}", data, item.region, item.path)
        self._nuisances(pool[0])
        self._pages(pool)

    def _originals(self, pool: Sequence[Item], count: int) -> list[Item]:
        """Choose photos to copy: some once, some twice."""
        chosen = self.rng.sample(pool, count * 3 // 4)
        return chosen + chosen[: count - len(chosen)]

    def _faces(self) -> None:
        for number, photo in enumerate(FACE_PHOTOS):
            image, region, box = self.photos.with_face(photo)
            self._write("face", f"{SITE}people/{number:04d}.jpg", original(image, ".jpg"), region, faces=(box,))

    def _edits(self, kind: Kind, originals: Sequence[Item], where: str) -> None:
        """Write one edit of each image; edits take turns, so each comes as often as any other."""
        names = list(EDITS)
        for number, item in enumerate(originals):
            name = names[number % len(names)]
            with Image.open(io.BytesIO((self.folder / item.path).read_bytes())) as opened:
                data = EDITS[name](opened.convert("RGB"))
            stem = item.path.removeprefix(SITE).replace("/", "-").rsplit(".", 1)[0]
            self._write(kind, f"{SITE}{where}/{stem}-{name}.jpg", data, item.region, item.path, name)

    def _nuisances(self, photo: Item) -> None:
        """Write what a crawler must survive: robots.txt, broken files, a tracking pixel, links to nothing."""
        self._save(f"{SITE}robots.txt", ROBOTS.encode())
        if photo.region is None:
            raise InputError(f"{photo.path}: shows no region")
        for name, (how, data) in broken_files(self.photos.crop(photo.region), self.rng).items():
            self._write("broken", f"{SITE}broken/{name}", data, edit=how)
        self._write("tracking_pixel", f"{SITE}pixel.gif", TRACKING_PIXEL)
        self.items += [Item(f"{SITE}gone/{number:04d}.jpg", "missing") for number in range(2)]

    def _pages(self, pool: Sequence[Item]) -> None:
        """Link every image of the site once, and a few twice."""
        shown = [item.path for item in self.items if item.on_site]
        self.rng.shuffle(shown)
        per_page = -(-len(shown) // (len(STYLES) + 1))
        batches = [shown[start : start + per_page] for start in range(0, len(shown), per_page)]
        pages = [f"{SITE}gallery/{style}.html" for style in STYLES]
        for style, page, batch in zip(STYLES, pages, batches[1:], strict=True):
            small = dict(self._small(pool, batch)) if style == "srcset" else {}
            self._page(page, gallery(style, [_in_site(path) for path in batch], small))
        twice = batches[1][:5]
        self._page(
            f"{SITE}index.html", index([_in_site(page) for page in pages], [_in_site(p) for p in batches[0] + twice])
        )

    def _small(self, pool: Sequence[Item], shown: Sequence[str]) -> Iterator[tuple[str, str]]:
        for item in [item for item in pool if item.path in set(shown)][:NUM_SMALL]:
            with Image.open(self.folder / item.path) as opened:
                data = EDITS["resize_50"](opened.convert("RGB"))
            path = f"{SITE}small/{Path(item.path).stem}.jpg"
            self._write("small", path, data, item.region, item.path, "resize_50")
            yield _in_site(item.path), _in_site(path)

    def _page(self, path: str, html: str) -> None:
        self._save(path, html.encode())
        self.pages.append(path)

    def _photos(self, kind: Kind, where: str, shown: Iterable[Region]) -> list[Item]:
        items = []
        for number, region in enumerate(shown):
            suffix = _suffix(number) if kind == "photo" else ".jpg"
            data = original(self.photos.crop(region), suffix)
            items.append(self._write(kind, f"{where}{number:04d}{suffix}", data, region))
        return items

    def _write(
        self,
        kind: Kind,
        path: str,
        data: bytes,
        region: Region | None = None,
        original: str | None = None,
        edit: str | None = None,
        faces: tuple[tuple[float, float, float, float], ...] = (),
    ) -> Item:
        self._save(path, data)
        item = Item(path, kind, image_id(data), region, original, edit, faces)
        self.items.append(item)
        return item

    def _save(self, path: str, data: bytes) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _suffix(number: int) -> str:
    """Return the format of a pool photo: mostly JPEG, as on the web."""
    return {3: ".png", 7: ".webp"}.get(number % 10, ".jpg")


def _in_site(path: str) -> str:
    return path.removeprefix(SITE)
