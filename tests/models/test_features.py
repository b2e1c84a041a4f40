"""The installed weights do what they are known to do on real photos: they are loaded, and into the right layers."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.config.selection import EmbedConfig
from curation.models.encoder import ImageEncoder
from curation.models.weights import resolve

torch = pytest.importorskip("torch")

DATA = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
BATCH = 16


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder(EmbedConfig(batch_size=BATCH), resolve("efficientnet-lite0"))


def read(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there; set CURATION_TEST_DATA")
    return pq.read_table(DATA / name)


def features(encoder, prepared):
    """Return L2-normalised rows of float16, as the stage stores them."""
    batches = [prepared[start : start + BATCH] for start in range(0, len(prepared), BATCH)]
    return np.concatenate([encoder(batch) for batch in batches]).astype(np.float16).astype(np.float64)


def pictures(table):
    images = table.column("image").to_pylist()
    return [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in images]


def test_the_first_hundred_photos_are_recognised_through_the_classifier(encoder):
    photos = pictures(read("photos.parquet").slice(0, 100))  # one a class, in the order of ImageNet's classes
    weights = torch.load(resolve("efficientnet-lite0").path, weights_only=True)
    weight, bias = weights["_fc.weight"].double().numpy(), weights["_fc.bias"].double().numpy()

    def num_right(prepared):
        rows = 13.4 * features(encoder, prepared)  # their mean length before they are normalised
        return int(((rows @ weight.T + bias).argmax(axis=1) == np.arange(100)).sum())

    squashed = [np.asarray(Image.fromarray(photo).resize((224, 224), Image.Resampling.BICUBIC)) for photo in photos]
    assert num_right(squashed) == 79  # without regard for how the model was evaluated
    assert num_right([encoder.prepare(photo) for photo in photos]) == 84


@pytest.mark.slow
def test_nearest_neighbours_of_flowers_are_of_their_class(encoder):
    flowers = read("flowers.parquet")
    is_train = np.array([split == "train" for split in flowers.column("split").to_pylist()])
    _, labels = np.unique(flowers.column("label").to_pylist(), return_inverse=True)

    rows = features(encoder, [encoder.prepare(picture) for picture in pictures(flowers)])

    similarities = rows[~is_train] @ rows[is_train].T
    nearest = labels[is_train][np.argsort(-similarities, axis=1, kind="stable")[:, 0]]
    assert (len(labels), (~is_train).sum()) == (720, 144)
    assert (nearest == labels[~is_train]).mean() == pytest.approx(139 / 144, abs=0.015)
