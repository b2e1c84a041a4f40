import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from curation.config.images import ImagesConfig, PcaHashConfig
from curation.errors import UsageError
from curation.stages.pca_hash import PcaHash, default_pca
from curation.stages.pca_hash_fit import PCA_FILE, PcaHashFit


@pytest.fixture(scope="session")
def pool(image):
    """150 rows of 100 small pictures; a third of the rows are exact duplicates, three do not decode."""
    random = np.random.default_rng(4)
    rows = []
    for number in range(150):
        if number < 97:
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            data = buffer.getvalue()
        elif number < 100:
            data = b"\x89PNG broken" + bytes([number])
        else:
            data = rows[number - 100]["data"]
        image_id = hashlib.sha256(data).hexdigest()[:32]
        rows.append(image(number, image_id=image_id, data=data))
    return [*rows, image(150, image_id=None, data=b"")]


def fitted(reduce, inputs, **settings):
    limits = ImagesConfig(min_side_px=8)
    reduce(PcaHashFit(PcaHashConfig(**({"side_px": 9, "sample_size": 70} | settings)), limits, 0), inputs)
    return (reduce.scratch / PCA_FILE).read_bytes()


@pytest.mark.parametrize("sample_size", [70, 1000])
def test_the_fit_does_not_depend_on_shards_or_order(sample_size, pool, in_memory, reduce, sharding):
    expected = fitted(reduce, in_memory({"pool": pool}), sample_size=sample_size)

    assert fitted(reduce, in_memory({"pool": pool}, **sharding), sample_size=sample_size) == expected


def test_equal_bytes_count_once(pool, in_memory, reduce):
    assert fitted(reduce, in_memory({"pool": pool}, 7)) == fitted(reduce, in_memory({"pool": pool[:100]}))


def test_images_that_do_not_decode_and_rejected_rows_are_left_out(pool, in_memory, reduce):
    rejected = [row | {"kept": number % 2 == 0} for number, row in enumerate(pool[:100])]
    good = [row for row in rejected[:97] if row["kept"]]

    assert fitted(reduce, in_memory({"pool": rejected})) == fitted(reduce, in_memory({"pool": good}))


def test_a_smaller_sample_is_another_fit(pool, in_memory, reduce):
    assert fitted(reduce, in_memory({"pool": pool})) != fitted(reduce, in_memory({"pool": pool}), sample_size=65)


def test_an_empty_pool_has_a_hash_all_the_same(in_memory, reduce):
    fitted(reduce, in_memory({"pool": []}, 2))

    assert PcaHash.load(reduce.scratch / PCA_FILE).dim == 81


@pytest.mark.parametrize("settings", [{"pca": "default"}, {"method": "phash"}])
def test_the_default_pca_needs_no_image(settings, in_memory, image, reduce):
    unread = [image(1, image_id="0" * 32)]  # has no data at all
    fitted(reduce, in_memory({"pool": unread}), **settings)

    assert (PcaHash.load(reduce.scratch / PCA_FILE).components_KD == default_pca(9).components_KD).all()


class MeanColours:
    """An encoder with 75 features: means of 5 x 5 tiles, centred and normalised; none for a flat picture."""

    batch_size = 8
    dim = 75

    def prepare(self, rgb_HW3):
        return np.asarray(Image.fromarray(rgb_HW3).resize((5, 5), Image.Resampling.BOX))

    def __call__(self, batch):
        assert 0 < len(batch) <= self.batch_size
        x_BD = np.stack(batch).reshape(len(batch), -1).astype(np.float32)
        x_BD -= x_BD.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)


def test_an_encoder_is_fitted_on_the_same_sample_whatever_the_shards(pool, in_memory, reduce, sharding):
    def fitted_model(inputs):
        config = PcaHashConfig(features="model", sample_size=80)
        reduce(PcaHashFit(config, ImagesConfig(min_side_px=8), 0, MeanColours()), inputs)
        return (reduce.scratch / PCA_FILE).read_bytes()

    expected = fitted_model(in_memory({"pool": pool}))
    assert PcaHash.load(reduce.scratch / PCA_FILE).dim == 75
    assert fitted_model(in_memory({"pool": pool}, **sharding)) == expected


def test_features_of_a_model_need_one():
    with pytest.raises(UsageError, match="encoder"):
        PcaHashFit(PcaHashConfig(features="model"), ImagesConfig(), 0)
