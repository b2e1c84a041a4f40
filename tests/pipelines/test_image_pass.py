"""One image step on one shard: a row for every row, bytes from the right place, and the same answer for any threads."""

import io
import shutil
import struct
import tarfile
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import schema
from curation.config import RunConfig
from curation.config.images import PcaHashConfig
from curation.errors import StageError, WeightsError
from curation.images import decode as decode_image
from curation.pipelines import image_pass
from curation.pipelines.context import Context
from curation.pipelines.driver import Request
from curation.pipelines.ingest import image_id
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.stored_images import encoded
from curation.settings import parse
from curation.stages.pca_hash import PcaHashStage, default_pca
from curation.store import Marker, Run

PLAN = build_plan(RunConfig())


@pytest.fixture(scope="module")
def blurred_once(bring, tree, tmp_path_factory):
    """A run brought up to faces, and the raw tar and its marker that it had before."""
    folder = tmp_path_factory.mktemp("blurred")
    bring(folder / "run", tree(), Request("nsfw"))
    shutil.copytree(folder / "run" / "pool", folder / "before")
    bring(folder / "run", tree(), Request("faces"))
    return folder


@pytest.fixture
def blurred(blurred_once, tmp_path):
    return Path(shutil.copytree(blurred_once / "run", tmp_path / "run"))


def column(run, step, name, collection="pool"):
    return Run(run).read_table(collection, step, 0, [name]).column(0).to_pylist()


def context_of(run, tree):
    return Context(Run(run), parse(RunConfig, tree, "test.yaml"))


def test_a_feature_table_has_a_row_for_every_row_and_null_where_there_are_no_bytes(finished):
    ids = column(finished, "fetch", "image_id")
    assert None in ids

    for step, name in (("pca_hash", "pca_hash"), ("nsfw", "nsfw_score"), ("faces", "num_faces")):
        values = column(finished, step, name)
        assert [value is None for value in values] == [found is None for found in ids], step


def test_rows_that_a_verdict_rejects_are_not_worked_on(finished):
    rejected = [reason is not None for reason in column(finished, "dedup", "reject_reason")]
    assert any(rejected)

    embeddings = column(finished, "embed", "embedding")

    assert all(vector is None for vector, is_rejected in zip(embeddings, rejected, strict=True) if is_rejected)


def test_every_stored_row_is_in_the_tar_where_the_table_says(finished):
    offsets, sizes, names = (column(finished, "faces", name) for name in ("tar_offset", "stored_bytes", "stored_id"))
    (path,) = (finished / "pool" / "images").glob("*.tar")
    data = path.read_bytes()

    for offset, size, name in zip(offsets, sizes, names, strict=True):
        if offset is not None:
            assert image_id(data[offset : offset + size]) == name
    with tarfile.open(path) as tar:
        assert {member.offset_data for member in tar} == set(offsets) - {None}


def test_rows_of_the_same_bytes_share_one_member(finished):
    by_id = {}
    for found, offset in zip(
        column(finished, "fetch", "image_id"), column(finished, "faces", "tar_offset"), strict=True
    ):
        if found is not None:
            by_id.setdefault(found, []).append(offset)
    again = [offsets for offsets in by_id.values() if len(offsets) > 1]

    assert len(again) == 2
    assert all(len(set(offsets)) == 1 for offsets in again)


@pytest.mark.parametrize("settings", [{"decode_threads": 1}, {"decode_threads": 8}])
def test_threads_do_not_change_features(blurred_once, bring, tree, tmp_path, settings):
    run = tmp_path / "run"
    shutil.copytree(blurred_once / "before", run / "pool")
    for name in ("artefacts", "seeds", "references"):
        shutil.copytree(blurred_once / "run" / name, run / name)
    for name in ("nsfw", "pca_hash"):
        shutil.rmtree(run / "pool" / name)
    bring(run, tree() | {"images": settings}, Request("nsfw"))

    for step in ("nsfw", "pca_hash"):
        assert Run(run).marker("pool", step, 0).digest == Run(blurred_once / "run").marker("pool", step, 0).digest


def test_what_limits_refuse_when_it_is_read_is_a_row_with_a_reason(blurred_once, bring, tree, tmp_path):
    """Fetched under other limits: the bytes are whole, but no stage decodes them."""
    run = tmp_path / "run"
    shutil.copytree(blurred_once / "before", run / "pool")
    for name in ("artefacts", "seeds", "references"):
        shutil.copytree(blurred_once / "run" / name, run / name)
    for name in ("nsfw", "nsfw_verdict"):
        shutil.rmtree(run / "pool" / name)

    bring(run, tree() | {"images": {"max_pixels": 5_000}}, Request("faces"))

    fetched = [found is not None for found in column(run, "fetch", "image_id")]
    reasons = column(run, "nsfw_verdict", "reject_reason")
    assert [reason == "too_many_pixels" for reason in reasons] == fetched
    assert set(column(run, "nsfw", "nsfw_score")) == {None}
    assert set(column(run, "faces", "tar_offset")) == {None}
    assert not list((run / "pool" / "raw").glob("*.tar")), "bytes of refused images are left"


def test_steps_behind_faces_see_blurred_images_also_while_fetched_ones_are_there(blurred_once, blurred, tree):
    """As a process leaves it that is killed between committing the blurred tar and deleting the fetched one."""
    shutil.copytree(blurred_once / "before" / "raw", blurred / "pool" / "raw", dirs_exist_ok=True)
    shutil.copy(blurred_once / "before" / "fetch" / "00000000.json", blurred / "pool" / "fetch" / "00000000.json")
    context = context_of(blurred, tree())
    names = {"fetch": column(blurred, "fetch", "image_id"), "faces": column(blurred, "faces", "stored_id")}
    rows = np.flatnonzero([name is not None for name in names["fetch"]])

    for step, table in (("nsfw", "fetch"), ("faces", "fetch"), ("sscd", "faces"), ("embed", "faces")):
        found = {row: image_id(data) for row, data in encoded(context, PLAN.step(step), "pool", 0, rows)}
        assert found == {row: names[table][row] for row in rows.tolist()}, step


def test_fetched_bytes_that_a_killed_process_left_are_deleted_by_the_next_run(blurred_once, blurred, bring, tree):
    shutil.copytree(blurred_once / "before" / "raw", blurred / "pool" / "raw", dirs_exist_ok=True)
    shutil.copy(blurred_once / "before" / "fetch" / "00000000.json", blurred / "pool" / "fetch" / "00000000.json")

    bring(blurred, tree(), Request("faces"))

    assert not list((blurred / "pool" / "raw").glob("*.tar"))
    assert "raw" not in Run(blurred).marker("pool", "fetch", 0).files


def test_a_step_without_its_faces_table_reads_what_was_fetched_or_nothing(blurred, tree):
    context = context_of(blurred, tree())
    store = context.run
    marker = store.marker("pool", "faces", 0)
    store.write_marker("pool", "faces", 0, Marker(**{**asdict(marker), "inputs": {"table fetch": "of other images"}}))

    assert list(encoded(context, PLAN.step("sscd"), "pool", 0, np.arange(5))) == []


def test_references_are_read_in_place_and_a_changed_one_is_said(blurred, tree, images, tmp_path):
    context = context_of(blurred, tree())
    ids = column(blurred, "fetch", "image_id", "references/test")

    found = [image_id(data) for _, data in encoded(context, PLAN.step("sscd"), "references/test", 0, np.arange(2))]
    assert found == ids

    store = context.run
    table = store.read_table("references/test", "crawl", 0)
    moved = table.set_column(
        table.schema.get_field_index("source_path"),
        schema.SOURCE_PATH,
        [[str(images / "references" / "1.jpg"), str(images / "references" / "1.jpg")]],
    )
    store.commit("references/test", "crawl", 0, moved, {"fingerprint": "f"})
    with pytest.raises(StageError, match=r"0\.jpg has changed or gone since it was fetched"):
        list(encoded(context, PLAN.step("sscd"), "references/test", 0, np.arange(2)))


def test_the_next_batch_is_decoded_while_the_model_works(tmp_path):
    """The model waits inside its first batch until the second one is prepared: with less decoded ahead it never is."""
    batch, count = 8, threading.Condition()
    prepared, seen = [], []

    class Resizing:
        name, version, batch_size, min_side_px = "embed", 1, batch, 16
        writes = schema.embed(2)

        def prepare(self, image):
            with count:
                prepared.append(image.row)
                count.notify_all()
            return image.row

        def __call__(self, rows):
            with count:
                seen.append(count.wait_for(lambda: len(prepared) >= min(len(seen) * batch + 2 * batch, 24), timeout=60))
            return {"embedding": np.zeros((len(rows), 2), np.float16)}

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    config = parse(RunConfig, {}, "test")
    empty = Resizing.writes.schema.empty_table()
    part = image_pass._Part(PLAN.step("embed"), Resizing(), frozenset(range(24)), empty)
    ids = pa.chunked_array([[f"{row:032x}" for row in range(24)]])
    source = ((row, buffer.getvalue()) for row in range(24))

    image_pass._compute(Context(Run(tmp_path), config), "pool", 0, [part], source, ids)

    assert seen == [True, True, True]
    assert part.rows == list(range(24))


class Stumbling(PcaHashStage):
    """Hashes images as ever, but for some of which it raises what nobody expects of it."""

    def __init__(self, errors):
        settings = PcaHashConfig()
        super().__init__(default_pca(settings.side_px), settings)
        self._errors = errors

    def prepare(self, image):
        if image.row in self._errors:
            raise self._errors[image.row]
        return super().prepare(image)


def compute(tmp_path, errors, num_images=40):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    stage = Stumbling(errors)
    part = image_pass._Part(
        PLAN.step("pca_hash"), stage, frozenset(range(num_images)), stage.writes.schema.empty_table()
    )
    ids = pa.chunked_array([[f"{row:032x}" for row in range(num_images)]])
    source = ((row, buffer.getvalue()) for row in range(num_images))
    image_pass._compute(Context(Run(tmp_path), parse(RunConfig, {}, "test")), "pool", 3, [part], source, ids)
    return part


def test_an_image_of_which_a_stage_raises_anything_costs_its_row_and_is_named(tmp_path, caplog):
    errors = {3: ValueError("a\nb"), 7: struct.error("short"), 8: SyntaxError("not a TIFF"), 20: MemoryError()}

    part = compute(tmp_path, errors)

    hashes = pa.concat_tables(part.tables).column("pca_hash")
    assert part.rows == list(range(40))
    assert [row for row in part.rows if not hashes[row].is_valid] == [3, 7, 8, 20]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == f"image {3:032x}: pca_hash: ValueError: a b; it is refused as crashes_decoder"
    assert len(messages) == 4


def test_a_decoder_that_raises_anything_costs_one_row(tmp_path, caplog, monkeypatch):
    decoded = []

    def decode(*arguments):
        decoded.append(arguments)
        if len(decoded) == 5:
            raise struct.error("unpack requires a buffer of 2 bytes")
        return decode_image(*arguments)

    monkeypatch.setattr(image_pass, "decode", decode)

    part = compute(tmp_path, {})

    assert pa.concat_tables(part.tables).column("pca_hash").null_count == 1
    assert "decoding: error: unpack requires a buffer of 2 bytes" in caplog.text


@pytest.mark.parametrize(("num_images", "num_refused"), [(40, 10), (200, 20)])
def test_what_fails_for_many_images_stops_the_unit_and_names_the_last_error(tmp_path, num_images, num_refused):
    part = compute(tmp_path, dict.fromkeys(range(num_refused), ValueError("no such operator")), num_images)
    assert len(part.rows) == num_images

    with pytest.raises(StageError, match=rf"pca_hash shard 00000003: {num_refused + 1} of .* no such operator"):
        compute(tmp_path, dict.fromkeys(range(num_refused + 1), ValueError("no such operator")), num_images)


@pytest.mark.parametrize(
    "error", [StageError("x", None, "m"), WeightsError("w"), InterruptedError(), KeyboardInterrupt()]
)
def test_errors_that_are_raised_on_purpose_still_stop_the_unit(tmp_path, error):
    with pytest.raises(type(error)):
        compute(tmp_path, {4: error})
