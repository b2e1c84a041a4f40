import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config.images import NsfwConfig
from curation.stages.verdicts import FacesVerdict, NsfwVerdict


def scores(*values):
    errors = pa.nulls(len(values), pa.string())
    return pa.table([pa.array(values, pa.float32()), errors], schema=schema.NSFW.schema)


def test_a_score_at_the_threshold_is_rejected_and_one_below_it_is_not():
    below = float(np.nextafter(np.float32(0.7), np.float32(0)))

    table = NsfwVerdict(NsfwConfig(max_score=0.7))(scores(below, 0.7, 1.0, None), np.ones(4, bool))

    assert table.schema == schema.NSFW_VERDICT.schema
    assert table.column("reject_reason").to_pylist() == [None, "nsfw", "nsfw", "not_scored"]


def test_what_was_rejected_before_is_left_to_that_verdict():
    table = NsfwVerdict(NsfwConfig())(scores(0.9, 0.9), np.array([False, True]))

    assert table.column("reject_reason").to_pylist() == [None, "nsfw"]


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_chunks_make_no_difference(num_chunks):
    parts = pa.chunked_array([pa.array([0.9, 0.1], pa.float32())] * num_chunks, pa.float32())

    columns = pa.table([parts, pa.nulls(2 * num_chunks, pa.string())], names=["nsfw_score", "decode_error"])

    table = NsfwVerdict(NsfwConfig())(columns, np.ones(2 * num_chunks, bool))

    assert table.column("reject_reason").to_pylist() == ["nsfw", None] * num_chunks


def test_an_image_that_is_not_stored_is_rejected_for_what_went_wrong(table):
    rows = [
        {"tar_offset": 0, "num_faces": 0},
        {"decode_error": "truncated"},
        {},  # its bytes are gone
        {"decode_error": "truncated"},
    ]

    found = FacesVerdict()(table(rows, schema.FACES), np.array([True, True, True, False]))

    assert found.schema == schema.FACES_VERDICT.schema
    assert found.column("reject_reason").to_pylist() == [None, "truncated", "discarded", None]


def test_an_image_that_does_not_decode_is_rejected_for_that():
    table = pa.table([pa.nulls(1, pa.float32()), pa.array(["truncated"])], schema=schema.NSFW.schema)

    assert NsfwVerdict(NsfwConfig())(table, np.ones(1, bool)).column(0).to_pylist() == ["truncated"]
