"""Whitening and background on a small linear model of synthetic images, so that what is right can be computed."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from curation.config.dedup import SscdConfig
from curation.config.images import ImagesConfig
from curation.errors import CorruptError, StageError
from curation.indexes.keys import keys_from_hex
from curation.stage import ImageRow
from curation.stages.sscd import SscdStage
from curation.stages.sscd_fit import POSTPROCESS_FILE, SscdFit
from curation.stages.sscd_postprocess import Postprocess, fit_whitening

SIDE_PX = 16
DIM = 12


class LinearEncoder:
    """The first DIM pixels of an image as its descriptor."""

    batch_size, dim, side_px = 4, DIM, SIDE_PX

    def prepare(self, rgb_HW3):
        return rgb_HW3

    def __call__(self, batch):
        x_BD = np.stack([rgb[..., 0].reshape(-1)[:DIM] for rgb in batch]).astype(np.float64)
        return (x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    """120 images that differ along some directions more than along others, and one that cannot be read."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(120):
        values = np.clip(120 + rng.standard_normal(DIM) * np.linspace(2, 40, DIM), 1, 255).astype(np.uint8)
        pixels = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
        pixels.reshape(-1, 3)[:DIM] = values[:, None]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append({"url": f"http://x/{number}", "data": buffer.getvalue()})
    found.append({"url": "http://x/broken", "data": b"no image"})
    return [{**row, "image_id": hashlib.sha256(row["data"]).hexdigest()[:32]} for row in found]


def fitted(in_memory, rows, tmp_path, sharding, **settings):
    config = SscdConfig(**{"sample_size": 1_024, **settings})
    tmp_path.mkdir(parents=True, exist_ok=True)
    stage = SscdFit(config, ImagesConfig(min_side_px=1), 0, LinearEncoder)
    assert list(stage(in_memory({"pool": rows}, **sharding), tmp_path)) == []
    return Postprocess.load(tmp_path / POSTPROCESS_FILE)


def images(rows):
    return [ImageRow(i, row["image_id"], b"", np.asarray(Image.open(io.BytesIO(row["data"])))) for i, row in rows]


def test_nothing_is_read_and_nothing_changes_where_neither_is_asked_for(in_memory, rows, tmp_path):
    inputs = in_memory({"pool": rows})
    list(SscdFit(SscdConfig(), ImagesConfig(), 0, lambda: pytest.fail("loaded a model"))(inputs, tmp_path))
    made = Postprocess.load(tmp_path / POSTPROCESS_FILE)
    unit_ND = np.eye(3, DIM, dtype=np.float32)

    assert inputs.was_read == set()
    assert (made.whitened(unit_ND) == unit_ND).all()
    assert np.isnan(made.bias(unit_ND, np.zeros((3, 2), np.uint64))).all()


def test_whitened_descriptors_of_the_sample_vary_the_same_in_every_direction(in_memory, rows, tmp_path):
    made = fitted(in_memory, rows, tmp_path, {}, whitening="fit")
    raw_ND = LinearEncoder()([row.rgb_HW3 for row in images(list(enumerate(rows[:120])))]).astype(np.float16)

    whitened_ND = (raw_ND.astype(np.float64) - made.mean_D) @ made.matrix_DD
    covariance_DD = whitened_ND.T @ whitened_ND / len(raw_ND)

    assert np.abs(whitened_ND.mean(axis=0)).max() < 1e-6
    np.testing.assert_allclose(covariance_DD, np.eye(DIM), atol=1e-3)
    assert np.linalg.norm(made.whitened(raw_ND.astype(np.float32)), axis=1) == pytest.approx(1, abs=1e-6)


def test_what_is_fitted_does_not_depend_on_shards(in_memory, rows, tmp_path, sharding):
    settings = {"whitening": "fit", "score_norm": "fit"}
    fitted(in_memory, rows, tmp_path / "one", {}, **settings)
    fitted(in_memory, rows, tmp_path / "other", sharding, **settings)

    one, other = ((tmp_path / name / POSTPROCESS_FILE).read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_bias_is_the_mean_of_the_three_nearest_others(in_memory, rows, tmp_path):
    made = fitted(in_memory, rows, tmp_path, {}, score_norm="fit")
    stage = SscdStage(LinearEncoder(), made)
    found = stage([stage.prepare(image) for image in images([(7, rows[7])])])

    own = np.array(found["sscd"].to_pylist()[0], np.float64)
    keys_N2 = keys_from_hex([row["image_id"] for row in rows])
    others = ~(made.keys_M2 == keys_N2[7]).all(axis=1)
    nearest = np.sort(made.background_MD[others].astype(np.float64) @ own)[-3:]
    assert others.sum() == len(others) - 1 == 119, "the image itself is in the background, the broken one is not"
    assert found["score_bias"].to_pylist() == [pytest.approx(nearest.mean(), abs=1e-6)]


def test_descriptors_do_not_depend_on_their_batch(in_memory, rows, tmp_path):
    made = fitted(in_memory, rows, tmp_path, {}, whitening="fit", score_norm="fit")
    stage = SscdStage(LinearEncoder(), made)
    seen = [stage.prepare(image) for image in images(list(enumerate(rows[:4])))]

    together, alone = stage(seen), [stage([one]) for one in seen]

    for name in ("sscd", "score_bias"):
        assert together[name].to_pylist() == [column[name].to_pylist()[0] for column in alone]


def test_too_few_images_to_whiten_are_an_error_that_says_what_to_do(in_memory, rows, tmp_path):
    with pytest.raises(StageError, match=r"20 descriptors, and at least 24 .* set sscd.whitening: none"):
        fitted(in_memory, rows[:20], tmp_path, {}, whitening="fit")
    with pytest.raises(StageError, match="score_norm needs more than 3 images, the pool has 2"):
        fitted(in_memory, rows[:2], tmp_path, {}, score_norm="fit")


def test_a_direction_without_variance_gets_no_weight():
    rng = np.random.default_rng(1)
    stored_ND = rng.standard_normal((50, 4)).astype(np.float16)
    stored_ND[:, 3] = 0.5

    _, matrix_DD = fit_whitening(stored_ND)

    assert np.isfinite(matrix_DD).all()
    assert (np.abs(matrix_DD).sum(axis=0) == 0).sum() == 1


def test_a_row_that_is_missing_stays_missing(in_memory, rows, tmp_path):
    made = fitted(in_memory, rows, tmp_path, {}, whitening="fit", score_norm="fit")
    missing = np.full((1, DIM), np.nan, np.float32)

    assert np.isnan(made.whitened(missing)).all()
    assert np.isnan(made.bias(missing, np.zeros((1, 2), np.uint64))).all()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no file of arrays"])
def test_a_broken_file_is_said_to_be(content, tmp_path):
    (tmp_path / "broken.npz").write_bytes(content)

    with pytest.raises(CorruptError, match="not fitted for SSCD"):
        Postprocess.load(tmp_path / "broken.npz")
