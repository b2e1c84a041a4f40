"""Families of photos and their planted copies, with the truth about every pair."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from curation.config.images import ImagesConfig
from curation.edits import EDITS
from curation.images import decode

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CURATION_TEST_DATA", str(ROOT.parent / "shared" / "data")))
COPIES_OF_PHOTO = (0, 0, 0, 0, 1, 2, 3, 4, 5, 6)  # a photo in ten has so many copies: 2.1 on average
MILDEST = 2  # of an edit's strengths are used, the mildest first


@dataclass(frozen=True)
class Planted:
    """Files and which photo each shows.

    Attributes:
        paths: One a file, sorted.
        family_N: Number of the photo, (N,), int64.
        edits: ``original``, or edit and strength.
    """

    paths: list[Path]
    family_N: npt.NDArray[np.int64]
    edits: list[str]

    @property
    def num_pairs(self) -> int:
        """Pairs that show the same photo."""
        sizes = np.bincount(self.family_N)
        return int((sizes * (sizes - 1) // 2).sum())


def photos(name: str = "photos.parquet") -> Iterator[bytes]:
    """Yield the encoded images of a Parquet file of the data folder."""
    for row in pq.read_table(DATA / name, columns=["image"]).column("image").to_pylist():
        yield row["bytes"]


def plant(folder: Path, seed: int) -> Planted:
    """Write photos and copies into ``folder`` (once) and return the truth."""
    truth = folder.with_suffix(".json")
    if not truth.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for number, data in enumerate(photos()) for row in _family(folder, number, data, seed)]
        truth.write_text(json.dumps(sorted(rows)))
    rows = json.loads(truth.read_text())
    return Planted([folder / name for name, _, _ in rows], np.array([row[1] for row in rows]), [row[2] for row in rows])


def _family(folder: Path, number: int, data: bytes, seed: int) -> Iterator[tuple[str, int, str]]:
    rng = np.random.default_rng([seed, number])
    image = Image.fromarray(decode(data, ImagesConfig()))
    yield _write(folder, data), number, "original"
    edits = [edit for edit in EDITS if not any(edit.num_others(strength) for strength in edit.strengths)]
    for which in rng.choice(len(edits), rng.choice(COPIES_OF_PHOTO), replace=False):
        edit = edits[which]
        strength = edit.strengths[int(rng.integers(min(MILDEST, len(edit.strengths))))]
        yield _write(folder, edit(image, strength, rng)), number, f"{edit.name} {strength:g}"


def _write(folder: Path, data: bytes) -> str:
    # Named by content, so that no side can learn from names or order.
    name = f"{hashlib.sha256(data).hexdigest()[:20]}.jpg"
    (folder / name).write_bytes(data)
    return name


def fingerprint(planted: Planted, *others: str) -> str:
    """Return a name for what was made of these files with these other things."""
    text = "\n".join([*(path.name for path in planted.paths), *others])
    return f"{zlib.crc32(text.encode()):08x}"
