"""Rows by bucket on disk: none lost, in order, and few in memory."""

import numpy as np
import pyarrow as pa
import pytest

from curation import spill
from curation.spill import MAX_BUCKETS, Spill, buckets_for

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def rows(numbers):
    return pa.table({"n": list(numbers), "text": [f"row {n}" for n in numbers]}, schema=SCHEMA)


@pytest.mark.parametrize("buffered", [1, 7, 1000])
def test_rows_come_back_by_bucket_in_the_order_in_which_they_came(tmp_path, monkeypatch, buffered):
    monkeypatch.setattr(spill, "_BUFFERED_ROWS", buffered)
    random = np.random.default_rng(0)
    buckets = random.integers(0, 5, 100)
    with Spill(tmp_path, SCHEMA, 5) as spilled:
        for start in range(0, 100, 9):
            numbers = range(start, min(100, start + 9))
            spilled.add(rows(numbers), buckets[start : start + 9])

        found = [spilled.read(bucket).column("n").to_pylist() for bucket in range(5)]

    assert found == [np.flatnonzero(buckets == bucket).tolist() for bucket in range(5)]


def test_memory_holds_no_more_rows_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_BUFFERED_ROWS", 10)
    with Spill(tmp_path, SCHEMA, 3) as spilled:
        for start in range(0, 100, 5):
            spilled.add(rows(range(start, start + 5)), [start % 3] * 5)
            assert sum(table.num_rows for table in spilled._tables) < 10


def test_a_bucket_without_rows_is_an_empty_table(tmp_path):
    with Spill(tmp_path, SCHEMA, 3) as spilled:
        spilled.add(rows([1]), [2])

        assert spilled.read(0) == SCHEMA.empty_table()
        assert spilled.read(2).num_rows == 1


def test_all_buckets_can_be_open_at_once(tmp_path):
    with Spill(tmp_path, SCHEMA, MAX_BUCKETS) as spilled:
        for _ in range(2):
            spilled.add(rows(range(MAX_BUCKETS)), list(range(MAX_BUCKETS)))

        assert {spilled.read(bucket).num_rows for bucket in range(MAX_BUCKETS)} == {2}


def test_rows_cannot_be_added_after_a_bucket_was_read(tmp_path):
    with Spill(tmp_path, SCHEMA, 1) as spilled:
        spilled.add(rows([1]), [0])
        spilled.read(0)

        with pytest.raises(ValueError, match="cannot be added"):
            spilled.add(rows([2]), [0])


def test_the_number_of_buckets_is_bounded():
    assert [buckets_for(number) for number in (0, 1, 500_000, 500_001, 10**9)] == [1, 1, 1, 2, MAX_BUCKETS]
