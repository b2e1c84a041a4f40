"""A labelled set that a program can tell apart: stripes along rows, stripes along columns, and dots, in noise."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.dinov2.evaluate.config import EvaluateConfig
from curation.dinov2.evaluate.features import Features

CLASSES = ("columns", "dots", "rows")
SIDE_PX = 24


def drawn(label, rng):
    """Return the PNG bytes of one image of a class."""
    phase = rng.integers(0, 3)
    wave = np.sin((np.arange(SIDE_PX) + phase) * np.pi / 6)
    pattern = {"columns": wave[None, :] + 0 * wave[:, None], "rows": wave[:, None] + 0 * wave[None, :]}
    pattern["dots"] = wave[None, :] * wave[:, None]
    pixels = 127 + 60 * pattern[label] + rng.normal(0, 10, (SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    Image.fromarray(np.repeat(pixels.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)).save(file, "PNG")
    return file.getvalue()


def rows_of(num_train, num_test, seed=0):
    """Return rows of a labelled set, classes in turn."""
    rng = np.random.default_rng(seed)
    parts = [("train", number) for number in range(num_train)] + [("test", number) for number in range(num_test)]
    return [
        {"image": {"bytes": drawn(CLASSES[number % 3], rng), "path": None}, "label": CLASSES[number % 3], "split": part}
        for part, number in parts
    ]


def _write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


@pytest.fixture(scope="session")
def write_parquet():
    """Return a function that writes rows and returns the path."""
    return _write_parquet


@pytest.fixture(scope="session")
def rows():
    """Return 60 rows to learn from and 30 to test on."""
    return rows_of(60, 30)


@pytest.fixture(scope="session")
def labelled_parquet(tmp_path_factory, rows):
    """Return the path of a Parquet file of ``rows``."""
    return _write_parquet(tmp_path_factory.mktemp("labelled") / "set.parquet", rows)


@pytest.fixture
def evaluate_settings(labelled_parquet):
    """Return a function that gives quick settings with dotted keys changed."""

    def make(**changes):
        tree = {
            "data": {"path": str(labelled_parquet)},
            "crop_share": 1.0,
            "raw_side_px": 8,
            "knn": {"k": [3, 10]},
            "linear": {"learning_rates": [0.01, 0.1], "epochs": 2},
            "logistic": {"powers": [-2.0, 0.0, 2.0]},
            "pictures": {"num_images": 2, "cell_px": 32},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree = {**tree, section: {**tree.get(section, {}), name: value} if name else value}
        return EvaluateConfig.model_validate_json(json.dumps(tree))

    return make


@pytest.fixture(scope="session")
def clouds():
    """Return a function that makes features of classes which lie around points of their own."""
    return _clouds


def _clouds(num, num_classes, dim, seed=0, blocks=2, spread=1.0, patches=True):
    # The points are the same for every seed.
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    slots = centres[labels].unsqueeze(1) + spread * torch.randn(num, blocks + patches, dim, generator=rng)
    return Features(slots.numpy(), labels.numpy(), patches)
