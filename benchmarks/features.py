"""Efficientnet-lite0 features of the real images, made once and kept in a folder of the caller."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from curation.config.images import ImagesConfig
from curation.config.selection import EmbedConfig
from curation.images import decode
from curation.models.encoder import ImageEncoder
from curation.models.weights import resolve

SETS = ("photos", "flowers", "tiny_imagenet", "cifar10")
PART = 1024
_LIMITS = ImagesConfig()
_CONFIG = EmbedConfig(batch_size=16)  # a larger batch is slower on a CPU: docs/embed.md


def data_folder() -> Path:
    return Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_features(work: Path, num_threads: int = 2) -> npt.NDArray[np.float16] | None:
    """Return the features of every image of the sets, (N, 1280), in a seeded order; None where there is no data.

    Parts of 1,024 images are written as they come, so that it can be interrupted.
    """
    paths = [data_folder() / f"{name}.parquet" for name in SETS]
    if not all(path.exists() for path in paths):
        return None
    work.mkdir(parents=True, exist_ok=True)
    encoder: ImageEncoder | None = None
    parts = []
    for path in paths:
        num_rows = pq.ParquetFile(path).metadata.num_rows
        for start in range(0, num_rows, PART):
            part = work / f"{path.stem}-{start:06d}.npy"
            if not part.exists():
                encoder = encoder or ImageEncoder(_CONFIG, resolve(_CONFIG.weights), num_threads=num_threads)
                found_ND = np.concatenate(list(_embedded(encoder, path, start))).astype(np.float16)
                np.save(part.with_suffix(".tmp.npy"), found_ND, allow_pickle=False)
                part.with_suffix(".tmp.npy").rename(part)
            parts.append(np.load(part, allow_pickle=False))
    features_ND: npt.NDArray[np.float16] = np.concatenate(parts)
    return features_ND[np.random.default_rng(0).permutation(len(features_ND))]


def _embedded(encoder: ImageEncoder, path: Path, start: int) -> Iterator[npt.NDArray[np.float32]]:
    images = pq.read_table(path, columns=["image"])["image"].slice(start, PART).to_pylist()
    for first in range(0, len(images), encoder.batch_size):
        batch = images[first : first + encoder.batch_size]
        yield encoder([encoder.prepare(decode(image["bytes"], _LIMITS)) for image in batch])
