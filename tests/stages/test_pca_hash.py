import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import schema
from curation.config.images import ImagesConfig, PcaHashConfig
from curation.errors import ConfigError, CorruptError, DimensionError, UsageError
from curation.images import decode
from curation.settings import parse
from curation.stage import ImageRow
from curation.stages.pca_hash import NUM_BITS, PcaHash, PcaHashStage, default_pca, fit, fit_model, quantised
from curation.stages.small_grey import grey_thumbnail, small_grey

skimage_data = pytest.importorskip("skimage.data")
SIDE_PX = 32


def crops(count, seed=0, sides=(120, 260)):
    """Return so many square crops of real photos."""
    rng = np.random.default_rng(seed)
    photos = [skimage_data.astronaut(), skimage_data.coffee(), skimage_data.chelsea(), skimage_data.rocket()]
    found = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(rng.integers(*sides))
        top, left = rng.integers(0, photo.shape[0] - side), rng.integers(0, photo.shape[1] - side)
        found.append(photo[top : top + side, left : left + side])
    return found


def greys(images):
    return np.stack([grey_thumbnail(rgb, SIDE_PX).ravel() for rgb in images])


@pytest.fixture(scope="module")
def fitted():
    return fit(greys(crops(400)))


def hamming(a, b):
    return int(a ^ b).bit_count()


def test_components_are_orthonormal_and_match_the_textbook(fitted):
    sample = greys(crops(400)).astype(float)
    _, _, rows = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)

    np.testing.assert_allclose(fitted.components_KD @ fitted.components_KD.T, np.eye(NUM_BITS), atol=1e-9)
    np.testing.assert_allclose(np.abs((fitted.components_KD * rows[:NUM_BITS]).sum(axis=1)), 1, atol=1e-5)


def test_the_first_component_is_the_most_significant_bit():
    components = np.eye(NUM_BITS, 81)
    pca = PcaHash(np.full(81, 100.0), components)
    picture = np.full((1, 81), 100, np.uint8)
    picture[0, 0] = 101

    assert pca(picture).tolist() == [1 << 63]
    picture[0, 63] = 101
    assert pca(picture).tolist() == [(1 << 63) + 1]


def test_a_projection_within_rounding_of_zero_is_no_bit():
    pca = PcaHash(np.full(81, 100 - 4e-7), np.eye(NUM_BITS, 81))

    assert pca(np.full((1, 81), 100, np.uint8)).tolist() == [0]


def test_the_fit_does_not_depend_on_the_order_of_the_sample(fitted):
    sample = greys(crops(400))
    shuffled = fit(sample[np.random.default_rng(1).permutation(400)])

    assert (shuffled.mean_D == fitted.mean_D).all()
    assert (shuffled.components_KD == fitted.components_KD).all()


@pytest.mark.parametrize("count", [0, 1, 2, 10, 64])
def test_small_samples_still_tell_images_apart(count):
    pca = fit(greys(crops(count, seed=5)) if count else np.empty((0, SIDE_PX**2), np.uint16))
    hashes = pca(greys(crops(60, seed=9)))

    np.testing.assert_allclose(pca.components_KD @ pca.components_KD.T, np.eye(NUM_BITS), atol=1e-9)
    assert len(set(hashes.tolist())) == 60


def test_a_sample_of_equal_images_is_like_no_sample():
    sample = np.repeat(greys(crops(1)), 100, axis=0)

    np.testing.assert_allclose(fit(sample).components_KD, fit(sample[:0]).components_KD)


def test_mild_edits_keep_the_hash_and_other_photos_do_not(fitted):
    images = crops(40, seed=3)
    originals = fitted(greys(images))
    resized = [np.asarray(Image.fromarray(rgb).resize((240, 240), Image.Resampling.LANCZOS)) for rgb in images]
    edited = fitted(greys(resized))

    near = [hamming(a, b) for a, b in zip(originals.tolist(), edited.tolist(), strict=True)]
    assert np.mean([distance <= 1 for distance in near]) >= 0.9
    far = [hamming(originals[a], originals[b]) for a in range(40) for b in range(a)]
    assert min(far) > 1


def test_hashes_do_not_depend_on_the_batch(fitted):
    pictures = greys(crops(30))

    alone = np.concatenate([fitted(picture[None]) for picture in pictures])

    assert (fitted(pictures) == alone).all()


def test_saving_and_loading_changes_nothing_and_gives_equal_bytes(fitted, tmp_path):
    fitted.save(tmp_path / "a.npz")
    fitted.save(tmp_path / "b.npz")
    loaded = PcaHash.load(tmp_path / "a.npz")

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (loaded.mean_D == fitted.mean_D).all()
    assert (loaded.components_KD == fitted.components_KD).all()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut zip", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_fitted_hash_is_refused(content, tmp_path):
    (tmp_path / "pca.npz").write_bytes(content)

    with pytest.raises(CorruptError, match="not a fitted PCA hash"):
        PcaHash.load(tmp_path / "pca.npz")


def test_arrays_that_hold_objects_are_refused(tmp_path):
    with (tmp_path / "pca.npz").open("wb") as file:
        np.savez(file, mean=np.array([{}], dtype=object), components=np.zeros((64, 1)))

    with pytest.raises(CorruptError):
        PcaHash.load(tmp_path / "pca.npz")


def test_the_stage_writes_its_column_and_refuses_another_picture_size(fitted):
    stage = PcaHashStage(fitted, PcaHashConfig(side_px=SIDE_PX))
    images = crops(3)

    columns = stage([stage.prepare(ImageRow(row, "id", b"", rgb)) for row, rgb in enumerate(images)])

    assert columns["pca_hash"].to_pylist() == fitted(greys(images)).tolist()
    assert columns["pca_hash"].type == schema.PCA_HASH.schema.field("pca_hash").type == pa.uint64()
    with pytest.raises(DimensionError):
        PcaHashStage(fitted, PcaHashConfig(side_px=16))
    with pytest.raises(DimensionError):
        fitted(np.zeros((1, 256), np.uint8))
    with pytest.raises(DimensionError):
        fit(np.zeros((3, 64), np.uint8))


def jpeg(rgb, quality=90, scale=1.0):
    image = Image.fromarray(rgb)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


EDITS = [
    *({"quality": quality} for quality in (75, 80, 85, 90, 95)),
    *({"scale": scale, "quality": quality} for scale in (0.98, 1.02) for quality in (75, 90, 95)),
]


def criteria(files, pca):
    """Shares of edited files with an equal hash and with one within a bit, and the least distance of two files."""

    def hashes(files):
        return pca(np.stack([small_grey(data, ImagesConfig(), SIDE_PX).ravel() for data in files]))

    originals = hashes(files)
    decoded = [decode(data, ImagesConfig()) for data in files]
    edited = np.stack([hashes([jpeg(rgb, **edit) for rgb in decoded]) for edit in EDITS])
    assert (hashes(list(files)) == originals).all()
    distances = np.bitwise_count(originals ^ edited)
    others = np.bitwise_count(originals[:, None] ^ originals) + 64 * np.eye(len(originals), dtype=int)
    return (distances == 0).mean(), (distances <= 1).mean(), int(others.min())


@pytest.mark.parametrize("kind", ["fit", "default"])
def test_mild_edits_of_photos_meet_the_criteria(kind):
    files = [jpeg(rgb) for rgb in crops(60, seed=3, sides=(256, 300))]
    sample = np.stack([small_grey(jpeg(rgb), ImagesConfig(), SIDE_PX).ravel() for rgb in crops(300, seed=4)])

    pca = fit(sample) if kind == "fit" else default_pca(SIDE_PX)
    exact, within_1, _ = criteria(files, pca)  # crops of one photo may be near each other
    assert exact >= 0.88
    assert within_1 >= 0.97
    assert criteria(files[:4], pca)[2] > 1


@pytest.mark.shared_data
@pytest.mark.parametrize("kind", ["fit", "default"])
def test_mild_edits_of_a_thousand_photos_meet_the_criteria(kind):
    folder = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "photos.parquet").exists():
        pytest.skip(f"{folder} has no photos.parquet; set CURATION_TEST_DATA")
    photos = [row["bytes"] for row in pq.read_table(folder / "photos.parquet", columns=["image"])["image"].to_pylist()]
    sample = np.stack([small_grey(data, ImagesConfig(), SIDE_PX).ravel() for data in photos])
    pca = fit(sample) if kind == "fit" else default_pca(SIDE_PX)
    hashes = pca(sample)

    distances = np.bitwise_count(hashes[:, None] ^ hashes) + 64 * np.eye(len(photos), dtype=int)
    assert distances.min() > 1
    exact, within_1, _ = criteria(photos[::5], pca)
    assert exact >= 0.88
    assert within_1 >= 0.97


def test_a_jpeg_has_one_hash_whoever_decodes_it(fitted):
    stage = PcaHashStage(fitted, PcaHashConfig(side_px=SIDE_PX))
    data = jpeg(crops(1)[0])

    alone = stage([stage.prepare(ImageRow(0, "id", data, None))])
    shared = stage([stage.prepare(ImageRow(0, "id", data, decode(data, ImagesConfig())))])
    assert not stage.reads_pixels
    assert alone["pca_hash"].equals(shared["pca_hash"])


@pytest.mark.parametrize("method", ["phash", "dhash", "whash"])
def test_the_other_methods_are_those_of_imagehash(method):
    imagehash = pytest.importorskip("imagehash")
    stage = PcaHashStage(default_pca(SIDE_PX), PcaHashConfig(method=method))
    images = [*crops(3), crops(1)[0][:5, :7]]

    columns = stage([stage.prepare(ImageRow(row, "id", b"", rgb)) for row, rgb in enumerate(images)])

    expected = [int(str(getattr(imagehash, method)(Image.fromarray(rgb))), 16) for rgb in images]
    assert columns["pca_hash"].to_pylist() == expected
    assert columns["pca_hash"].type == pa.uint64()
    assert stage.reads_pixels


class Features:
    """An encoder with given features for pictures of one colour."""

    batch_size = 4
    dim = 70

    def __init__(self, features_ND):
        self.features_ND = features_ND

    def prepare(self, rgb_HW3):
        return rgb_HW3[0, 0, 0]

    def __call__(self, batch):
        return self.features_ND[list(batch)]


def test_features_of_a_model_are_hashed_and_missing_ones_have_no_hash():
    features = np.random.default_rng(0).standard_normal((100, 70)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pca = fit_model(quantised(features))
    expected = pca(quantised(features))
    features[2] = np.nan
    stage = PcaHashStage(pca, PcaHashConfig(features="model"), encoder=Features(features))
    pictures = [np.full((4, 4, 3), number, np.uint8) for number in range(4)]

    columns = stage([stage.prepare(ImageRow(row, "id", b"", rgb)) for row, rgb in enumerate(pictures)])

    assert columns["pca_hash"].to_pylist() == [expected[0], expected[1], None, expected[3]]
    assert 20 < np.bitwise_count(expected[:, None] ^ expected)[np.triu_indices(100, 1)].mean() < 44
    with pytest.raises(UsageError, match="encoder"):
        PcaHashStage(pca, PcaHashConfig(features="model"))
    with pytest.raises(DimensionError):
        PcaHashStage(default_pca(SIDE_PX), PcaHashConfig(features="model"), encoder=Features(features))
    with pytest.raises(DimensionError, match="64 principal"):
        fit_model(np.zeros((5, 64), np.int16))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "phash", "pca": "default"}, "belong to method pca"),
        ({"method": "dhash", "features": "model"}, "belong to method pca"),
        ({"features": "model", "pca": "default"}, "default PCA is of pixels"),
        ({"hamming_radius": 9}, "at most 8"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(PcaHashConfig, settings, "run.yaml")
