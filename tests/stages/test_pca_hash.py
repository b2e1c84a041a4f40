import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import schema
from curation.config import PcaHashConfig
from curation.errors import CorruptError, DimensionError
from curation.stage import ImageRow
from curation.stages.pca_hash import NUM_BITS, PcaHash, PcaHashStage, fit, grey_thumbnail

skimage_data = pytest.importorskip("skimage.data")
SIDE_PX = 32


def crops(count, seed=0):
    """Return so many crops of real photos."""
    rng = np.random.default_rng(seed)
    photos = [skimage_data.astronaut(), skimage_data.coffee(), skimage_data.chelsea(), skimage_data.rocket()]
    found = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(rng.integers(120, 260))
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
    pca = fit(greys(crops(count, seed=5)) if count else np.empty((0, SIDE_PX**2), np.uint8))
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


def test_a_thumbnail_averages_what_is_finer_than_its_pixels():
    y, x = np.mgrid[0:256, 0:320]
    checkers = np.repeat(((x + y) % 2 * 200).astype(np.uint8)[:, :, None], 3, axis=2)

    assert np.abs(grey_thumbnail(checkers, 32).astype(int) - 100).max() <= 2
