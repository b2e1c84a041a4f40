"""Photos that scikit-image ships, as files and as a manifest to train on."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image

from curation import schema


def photos(count: int, side_px: int = 256) -> list[bytes]:
    """Return JPEGs with a shorter side of so many pixels cut from photos that scikit-image ships."""
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        source = sources[index % len(sources)]
        top, left = (int(rng.integers(0, max(1, side - 256))) for side in source.shape[:2])
        image = Image.fromarray(source[top : top + 256, left : left + 342]).resize((side_px * 342 // 256, side_px))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def write_manifest(folder: Path, files: list[bytes], num_images: int) -> Path:
    """Write photos into a tar, and a manifest that names each several times."""
    places = []
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for data in files:
            info = tarfile.TarInfo(f"{hashlib.sha256(data).hexdigest()[:32]}.jpg")
            info.size = len(data)
            places.append((info.name[:32], "0.tar", tar.offset + tarfile.BLOCKSIZE, len(data)))
            tar.addfile(info, io.BytesIO(data))
    rows = [places[index % len(places)] for index in range(num_images)]
    columns = dict(zip(("image_id", "tar", "tar_offset", "stored_bytes"), zip(*rows, strict=True), strict=True))
    arrays = [pa.array(columns.get(field.name, [None] * num_images), field.type) for field in schema.MANIFEST]
    pq.write_table(pa.table(arrays, schema=schema.MANIFEST), folder / "manifest.parquet")
    return folder / "manifest.parquet"
