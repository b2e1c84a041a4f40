import logging

import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.errors import DimensionError
from curation.stages.vectors import gather, matrix, of_shard, usable


def test_gathered_rows_are_kept_rows_with_a_vector_in_the_order_of_shards(image, unit, in_memory, tmp_path):
    rows = [
        image(0, sscd=unit(1)),
        image(1, sscd=None),
        image(2, sscd=unit(0, 1), kept=False),
        image(3, sscd=unit(0, 1)),
        image(4, kept=False),
        image(5, sscd=unit(0, 0, 1)),
    ]
    inputs = in_memory({"pool": rows}, num_shards=4)  # of 2, 2, 1 and 1 rows

    found = gather(inputs.shards("pool"), schema.SSCD, tmp_path / "vectors")

    assert found.keys[:, 1].tolist() == [0, 3, 5]
    assert found.rows.tolist() == [0, 1, 0]
    assert found.starts.tolist() == [0, 1, 2, 2, 3]
    assert found.place_of(np.arange(3)).tolist() == [0, 1, 3]
    assert found.places == (("pool", 0, 2), ("pool", 1, 2), ("pool", 2, 1), ("pool", 3, 1))
    assert found.vectors.dtype == np.float16
    np.testing.assert_array_equal(found.vectors, [unit(1), unit(0, 1), unit(0, 0, 1)])


@pytest.mark.parametrize("rows", [[], [{"url": "a"}]], ids=["no rows", "no vectors"])
def test_nothing_to_gather_gives_an_empty_array(rows, in_memory, tmp_path):
    found = gather(in_memory({"pool": rows}).shards("pool"), schema.SSCD, tmp_path / "vectors")

    assert len(found) == 0
    assert found.vectors.shape == (0, 8)


def test_no_shard_at_all_gives_an_empty_array(tmp_path):
    found = gather(iter(()), schema.SSCD, tmp_path / "vectors")

    assert len(found) == 0
    assert found.vectors.shape == (0, 1)
    assert found.places == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_a_vector_that_says_nothing_counts_as_missing_and_is_logged(value, image, unit, in_memory, caplog):
    broken = unit(1)
    broken[:] = value
    (view,) = in_memory({"pool": [image(0, sscd=broken), image(1, sscd=unit(1))]}).shards("pool")

    with caplog.at_level(logging.WARNING):
        vectors, keys, rows = of_shard(view, schema.SSCD)

    assert rows.tolist() == [1]
    assert len(vectors) == len(keys) == 1
    assert "sscd of pool shard 00000000: 1 vectors are not finite or all zeros" in caplog.text


def test_a_broken_vector_of_a_rejected_row_is_nobodys_business(unit, caplog):
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float16)), 8)

    vectors, rows = usable(column, np.array([False]), "here")

    assert len(vectors) == len(rows) == 0
    assert not caplog.records


def test_values_under_nulls_and_slices_are_not_mistaken_for_vectors(unit):
    flat = np.concatenate([unit(*np.eye(8)[row]) for row in range(4)])
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat), 8, mask=pa.array([False, True, False, False]))

    vectors, rows = usable(pa.chunked_array([column.slice(1, 1), column.slice(2, 2)]), np.ones(3, bool), "here")

    assert rows.tolist() == [1, 2]
    np.testing.assert_array_equal(vectors, [unit(0, 0, 1), unit(0, 0, 0, 1)])


def test_shards_of_different_dimensions_are_refused(image, unit, in_memory, tmp_path):
    inputs = in_memory({"pool": [image(0, sscd=unit(1)), image(1, sscd=unit(*np.ones(16)))]}, num_shards=2)

    with pytest.raises(DimensionError, match="sscd of pool shard 00000001 has 16 dimensions, shards before it have 8"):
        gather(inputs.shards("pool"), schema.SSCD, tmp_path / "vectors")


@pytest.mark.parametrize("kind", [pa.list_(pa.float16()), pa.list_(pa.float32(), 2), pa.string()])
def test_a_column_of_something_else_is_refused(kind):
    with pytest.raises(DimensionError, match="fixed-size list of float16"):
        matrix(pa.array([], kind), np.empty(0, np.int64))
