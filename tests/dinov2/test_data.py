import hashlib

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curation.dinov2 import colour
from curation.dinov2.config import CropsConfig
from curation.dinov2.crops import crop_boxes, draw, multi_crop, reduced_side
from curation.dinov2.data import Batches, open_manifests, shares
from curation.dinov2.manifests import ManifestImages
from curation.dinov2.randomness import Purpose, permuted, sample_index, scores
from curation.errors import ImageError, TrainError

LIMIT = 10_000_000


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_an_epoch_is_a_permutation(size):
    for key in (0, 12345678901234567890 % 2**64):
        assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(sample_index(epoch * 50 + i, 50, seed) for i in range(50)) for epoch in (0, 1) for seed in (0, 1)}

    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_a_billion_images_need_no_table():
    assert 0 <= sample_index(123_456_789_012, 1_000_000_000, 3) < 1_000_000_000


def test_scores_do_not_depend_on_how_positions_are_split():
    positions = np.arange(100)
    whole = scores(3, Purpose.DROP_PATH, 2, positions)

    np.testing.assert_array_equal(
        whole, np.concatenate([scores(3, Purpose.DROP_PATH, 2, part) for part in np.split(positions, 4)])
    )
    assert len(set(whole.tolist())) == 100


def test_bytes_read_are_bytes_written(manifest):
    dataset = ManifestImages(manifest, LIMIT)
    ids = pq.read_table(manifest)["image_id"].to_pylist()

    assert len(dataset) == 20
    assert [hashlib.sha256(dataset.read(i)).hexdigest()[:32] for i in range(20)] == ids
    assert dataset.describe(13).startswith(ids[13])
    assert dataset.digest == "ab" * 32


def test_a_manifest_in_an_object_store_is_read(manifest, settings, jpegs, make_manifest, tmp_path):
    make_manifest(tmp_path / "data", jpegs)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/bucket/run", recursive=True)
    try:
        remote = ManifestImages("memory://bucket/run/manifest/manifest.parquet", LIMIT)
        local = ManifestImages(manifest, LIMIT)
        assert [remote.read(i) for i in range(20)] == [local.read(i) for i in range(20)]
        memory.rm("/bucket/run/images/00000000.tar")
        with pytest.raises(TrainError, match=r"00000000\.tar is not there"):
            remote.read(0)
    finally:
        memory.rm("/bucket", recursive=True)


def test_without_a_stored_digest_the_image_ids_are_the_identity(make_manifest, jpegs, tmp_path):
    paths = [make_manifest(tmp_path / name, images, digest=None) for name, images in [("a", jpegs), ("b", jpegs[1:])]]
    again = make_manifest(tmp_path / "c", jpegs, digest=None)
    digests = [ManifestImages(str(path), LIMIT).digest for path in [*paths, again]]

    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize("tar", ["/etc/passwd", "s3://other/bucket.tar", "file:///x.tar", "C:\\x.tar"])
def test_a_tar_outside_the_manifest_s_file_tree_is_refused(manifest, tmp_path, tar):
    table = pq.read_table(manifest)
    column = table.schema.get_field_index("tar")
    table = table.set_column(column, table.schema.field(column), pa.array([tar] * 20))
    pq.write_table(table, tmp_path / "m.parquet")

    with pytest.raises(TrainError, match="must be a path relative to the manifest's folder"):
        ManifestImages(str(tmp_path / "m.parquet"), LIMIT)


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 0), (0, -5), (0, LIMIT + 1), (10**12, 10), (10**18, 10)])
def test_a_range_that_makes_no_sense_is_an_unreadable_image(make_manifest, jpegs, tmp_path, offset, length):
    path = make_manifest(tmp_path / "data", jpegs)
    table = pq.read_table(path)
    for name, value in (("tar_offset", offset), ("stored_bytes", length)):
        column = table.schema.get_field_index(name)
        table = table.set_column(column, table.schema.field(column), pa.array([value] * 20, pa.int64()))
    pq.write_table(table, path)

    with pytest.raises(ImageError):
        ManifestImages(str(path), LIMIT).read(0)


@pytest.mark.parametrize(("name", "kind"), [("tar_offset", "string"), ("stored_bytes", "double"), ("tar", "int64")])
def test_a_column_of_another_kind_is_no_manifest(manifest, tmp_path, name, kind):
    table = pq.read_table(manifest)
    column = pa.array([1] * 20).cast(kind)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), tmp_path / "m.parquet")

    with pytest.raises(TrainError, match=f"is not a manifest: {name} is {kind}, not"):
        ManifestImages(str(tmp_path / "m.parquet"), LIMIT)


def test_a_batch_is_a_function_of_its_step(manifest, settings):
    config = settings()
    dataset = ManifestImages(manifest, LIMIT)
    (from_start,) = list(Batches([dataset], config).between(0, 4))[3]
    ((alone,),) = Batches([dataset], config).between(3, 4)

    for (a, _), (b, _) in zip(from_start.crops, alone.crops, strict=True):
        assert a.equal(b)
    assert from_start.mask_NP.equal(alone.mask_NP)
    assert [tuple(views.shape) for views, _ in alone.crops] == [(8, 3, 32, 32), (8, 3, 16, 16)]


def streaming(settings, **changes):
    return settings(data={"batch_size": 4, "reading": "streaming", "chunk_images": 3, "window_chunks": 2, **changes})


def test_streamed_images_are_the_same_from_any_step_with_any_threads(manifest, settings):
    dataset = ManifestImages(manifest, LIMIT)
    whole = [batch for (batch,) in Batches([dataset], streaming(settings, lanes=2)).between(0, 9)]
    for first, workers in ((0, 3), (5, 0), (5, 2)):
        config = streaming(settings, lanes=2, workers=workers)
        for (batch,), before in zip(Batches([dataset], config).between(first, 9), whole[first:], strict=True):
            assert all(a.equal(b) for (a, _), (b, _) in zip(batch.crops, before.crops, strict=True))


def test_streaming_reads_runs_of_images_once(manifest, settings, monkeypatch):
    dataset = ManifestImages(manifest, LIMIT)
    reads = []
    read = type(dataset._fs).cat_file
    monkeypatch.setattr(
        type(dataset._fs), "cat_file", lambda fs, *args, **kw: reads.append(args) or read(fs, *args, **kw)
    )
    assert len(list(Batches([dataset], streaming(settings)).between(0, 5))) == 5

    # An epoch of 20 images is 6 chunks of 3 or 4 images, one of them in two tars.
    assert 6 <= len(reads) <= 8


def test_a_run_of_images_is_what_single_reads_give(manifest, make_manifest, jpegs, tmp_path):
    table = pq.read_table(manifest)
    shuffled = table.take(np.random.default_rng(0).permutation(20)).to_pydict()
    shuffled["tar_offset"][7] = 10**12
    shuffled["stored_bytes"][11] = -1
    make_manifest(tmp_path / "data", jpegs)
    path = tmp_path / "data/manifest/shuffled.parquet"
    pq.write_table(pa.table(shuffled, schema=table.schema), path)
    dataset = ManifestImages(str(path), LIMIT)

    for place, found in zip(range(20), dataset.read_run(range(20)), strict=True):
        row = dataset.row_at(place)
        if isinstance(found, ImageError):
            assert row in (7, 11)
            with pytest.raises(ImageError):
                dataset.read(row)
        else:
            assert found == dataset.read(row)


def test_manifests_are_mixed_by_weight(make_manifest, jpegs, settings, tmp_path):
    paths = [str(make_manifest(tmp_path / name, images)) for name, images in (("a", jpegs[:5]), ("b", jpegs[5:]))]
    entries = [{"path": path, "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    config = settings(data={"batch_size": 4, "manifests": entries})
    manifests = open_manifests(None, config)

    assert [len(manifest) for manifest in manifests] == [5, 15]
    assert shares(manifests, config) == [3, 1]
    assert len(list(Batches(manifests, config).between(0, 3))) == 3
    with pytest.raises(TrainError, match="and not both"):
        open_manifests(paths[0], config)


def test_without_local_crops_there_is_one_stack(manifest, settings):
    ((batch,),) = Batches([ManifestImages(manifest, LIMIT)], settings(crops__num_local=0)).between(0, 1)

    assert len(batch.crops) == 1


@pytest.mark.parametrize("size", [(40, 30), (500, 20), (9, 400), (1, 1)])
def test_a_crop_lies_inside_the_image(size):
    draws = np.random.default_rng(0).random((200, 10, 4))
    left, top, right, bottom = crop_boxes(draws, size, np.tile([0.05, 0.32], (200, 1)), (0.75, 4 / 3)).T

    assert ((left >= 0) & (left < right) & (right <= size[0])).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= size[1])).all()


def test_crops_have_the_areas_and_aspects_asked_for():
    draws = np.random.default_rng(0).random((4000, 10, 4))
    left, top, right, bottom = crop_boxes(draws, (1000, 1000), np.tile([0.1, 0.3], (4000, 1)), (0.75, 4 / 3)).T
    share, ratio = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)

    np.testing.assert_allclose(np.quantile(share, [0, 0.5, 1]), [0.1, 0.2, 0.3], atol=0.01)
    np.testing.assert_allclose(np.quantile(ratio, [0, 0.5, 1]), [0.75, 1, 4 / 3], atol=0.03)
    np.testing.assert_allclose((left / (1000 - (right - left))).mean(), 0.5, atol=0.02)


def test_a_reduced_image_has_enough_pixels_for_every_crop():
    config = CropsConfig(global_px=64, local_px=32, num_local=4)
    reduced = []
    for position in range(100):
        draws = draw(0, position, config)
        side = reduced_side((1500, 1000), draws, config)
        factor = 1000 // side if side else 1
        sides = np.array([64, 64, 32, 32, 32, 32])
        scale = np.array([config.global_scale] * 2 + [config.local_scale] * 4)
        left, top, right, bottom = crop_boxes(draws[:, :-1].reshape(6, 10, 4), (1500, 1000), scale, config.aspect).T
        assert (np.minimum(right - left, bottom - top) >= factor * sides).all()
        reduced.append(factor)

    assert {4, 8} <= set(reduced)
    assert reduced_side((60, 63), draws, config) is None


def test_views_of_one_sample_differ_and_repeat():
    rgb = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    config = CropsConfig(global_px=32, local_px=16, num_local=3)
    one, same, other = (multi_crop(rgb, draw(5, position, config), config) for position in (1, 1, 2))

    np.testing.assert_array_equal(one.global_V3HW, same.global_V3HW)
    assert not np.array_equal(one.global_V3HW, other.global_V3HW)
    assert not np.array_equal(one.global_V3HW[0], one.global_V3HW[1])
    assert one.local_V3HW.shape == (3, 3, 16, 16)


def test_augmentation_without_any_operation_only_normalises():
    config = CropsConfig(jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0, 0.0), solarise_p=0.0)
    views = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(1, 3, 8, 8)
    steps = colour.plan(colour.draw(0, 0, 1), config, 0.0, 0.0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))

    torch.testing.assert_close(colour.augment(views, steps, config)[0], (views[0] / 255 - mean) / std)


def test_a_view_is_augmented_alike_alone_and_in_a_batch():
    config = CropsConfig()
    views = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    draws = colour.draw(0, 9, 12)
    together = colour.augment(views, colour.plan(draws, config, 0.5, 0.5), config)
    for i in range(12):
        alone = colour.augment(views[i : i + 1], colour.plan(draws[i : i + 1], config, 0.5, 0.5), config)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)


def test_operations_happen_as_often_as_configured():
    config = CropsConfig()
    draws = np.concatenate([colour.draw(0, position, 4) for position in range(500)])
    steps = colour.plan(draws, config, 0.3, 0.2)

    for happened, share in [
        (steps.jitter_N, 0.8),
        (steps.grey_N, 0.2),
        (steps.sigma_N > 0, 0.3),
        (steps.solarise_N, 0.2),
    ]:
        assert happened.mean() == pytest.approx(share, abs=0.04)
    assert steps.factors_N4[:, 0].min() >= 0.6 - 1e-6
    assert np.abs(steps.factors_N4[:, 3]).max() <= 0.1 + 1e-6
