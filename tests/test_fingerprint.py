"""Digests depend on content and on nothing else; fingerprints refuse what has no stable identity."""

import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import schema
from curation.fingerprint import add_digests, content_digest, fingerprint, rows_digest

SCHEMA = pa.schema(
    [
        schema.IMAGE_ID,
        schema.WIDTH,
        schema.NSFW_SCORE,
        schema.URLS,
        schema.FACE_BOXES,
        pa.field("vector", pa.list_(pa.float16(), 3)),
        pa.field("flag", pa.bool_()),
        pa.field("hash", pa.uint64()),
        schema.TAR_OFFSET,
        schema.FETCH_MS,
    ]
)
ROWS = [
    {
        "image_id": f"{row:032x}",
        "width": 100 + row,
        "nsfw_score": row / 7,
        "urls": [f"https://example.org/{row}/{part}" for part in range(row % 3)],
        "face_boxes": [[1.0, 2.0, 3.0, float(row)]] * (row % 2),
        "vector": [row / 8, 0.5, -1.0],
        "flag": row % 2 == 0,
        "hash": 2**63 + row,
        "tar_offset": 512 * row,
        "fetch_ms": row,
    }
    for row in range(9)
] + [{}]


def table(rows=ROWS):
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def chunked(whole, *sizes):
    """Return the same table in chunks of these sizes and a rest."""
    parts, start = [], 0
    for size in sizes:
        parts.append(whole.slice(start, size))
        start += size
    return pa.concat_tables([*parts, whole.slice(start)])


DIGESTS = pytest.mark.parametrize("digest", [content_digest, rows_digest])


@DIGESTS
@pytest.mark.parametrize("sizes", [(), (1,), (0, 3), (1,) * 9, (4, 4), (10,)])
def test_a_digest_does_not_depend_on_chunks(digest, sizes):
    assert digest(chunked(table(), *sizes)) == digest(table())


@DIGESTS
def test_a_digest_does_not_depend_on_offsets_into_larger_buffers(digest):
    larger = table([{}, *ROWS, *ROWS])

    assert digest(larger.slice(1, len(ROWS))) == digest(table())


@DIGESTS
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_digest_survives_parquet(tmp_path, digest, compression):
    path = tmp_path / "table.parquet"
    pq.write_table(table(), path, compression=compression, row_group_size=3)

    assert digest(pq.read_table(path)) == digest(table())


@DIGESTS
def test_what_lies_under_nulls_does_not_count(digest):
    def column(under):
        numbers = pa.array(np.array([1, under, 3], np.int32), mask=np.array([False, True, False]))
        lists = pa.ListArray.from_arrays([0, 1, 2, 3], pa.array([5, under, 7]), mask=pa.array([False, True, False]))
        values = pa.array([1.0, 2.0, under, under, 5.0, 6.0], pa.float16())
        fixed = pa.FixedSizeListArray.from_arrays(values, 2, mask=pa.array([False, True, False]))
        return pa.table({"number": numbers, "list": lists, "fixed": fixed})

    assert column(8).equals(column(9))
    assert digest(column(8)) == digest(column(9))


@DIGESTS
def test_places_and_times_do_not_count(digest):
    moved = [{**row, "tar_offset": 77, "fetch_ms": None} for row in ROWS]

    assert digest(table(moved)) == digest(table())
    assert digest(table().drop_columns(["tar_offset", "fetch_ms"])) == digest(table())


@DIGESTS
@pytest.mark.parametrize(
    "change",
    [
        {"image_id": "f" * 32},
        {"image_id": None},
        {"width": 1},
        {"width": None},
        {"nsfw_score": math.nextafter(np.float32(4 / 7), 1) + 1e-6},
        {"urls": []},
        {"urls": None},
        {"urls": ["https://example.org/4/0https://example.org/4/1"]},
        {"face_boxes": [[1.0, 2.0, 3.0, 4.0]]},
        {"face_boxes": None},
        {"vector": [0.5, 0.5, 1.0]},
        {"vector": None},
        {"flag": False},
        {"flag": None},
        {"hash": 2**64 - 1},
        {"hash": None},
    ],
    ids=str,
)
def test_any_change_of_content_shows(digest, change):
    changed = [{**row, **change} if number == 4 else row for number, row in enumerate(ROWS)]

    assert digest(table(changed)) != digest(table())


@DIGESTS
def test_a_missing_or_repeated_row_shows(digest):
    assert digest(table(ROWS[:-1])) != digest(table())
    assert digest(table([*ROWS, ROWS[0]])) != digest(table())
    assert digest(table([*ROWS, {}])) != digest(table())


def test_where_one_text_ends_and_the_next_begins_shows():
    assert content_digest(pa.table({"a": ["ab", "c"]})) != content_digest(pa.table({"a": ["a", "bc"]}))
    assert content_digest(pa.table({"a": [["a"], ["b"]]})) != content_digest(pa.table({"a": [["a", "b"], []]}))
    assert rows_digest(pa.table({"a": ["x"], "b": ["yz"]})) != rows_digest(pa.table({"a": ["xy"], "b": ["z"]}))


def test_nested_nulls_show():
    kind = pa.list_(pa.string())

    assert content_digest(pa.table({"a": pa.array([[None]], kind)})) != content_digest(
        pa.table({"a": pa.array([[""]], kind)})
    )
    assert content_digest(pa.table({"a": pa.array([[]], kind)})) != content_digest(
        pa.table({"a": pa.array([None], kind)})
    )


def test_the_order_of_rows_shows_in_a_tables_digest_and_not_in_the_rows_digest():
    turned = table(ROWS[::-1])

    assert content_digest(turned) != content_digest(table())
    assert rows_digest(turned) == rows_digest(table())


@pytest.mark.parametrize("cut", range(len(ROWS) + 1))
def test_digests_of_parts_add_up_to_that_of_all_rows(cut):
    parts = [rows_digest(table(ROWS[cut:])), rows_digest(table(ROWS[:cut]))]

    assert add_digests(parts) == rows_digest(table())


def test_a_sum_of_digests_stays_below_its_modulus():
    many = [2**256 - 1] * 3

    assert add_digests(many) == 2**256 - 3
    assert add_digests([]) == rows_digest(table([])) == 0


def test_equal_rows_twice_are_not_the_same_as_none():
    twice = rows_digest(table([ROWS[0], ROWS[0]]))

    assert twice not in (0, rows_digest(table([ROWS[0]])))


def test_a_column_type_without_a_digest_is_refused():
    with pytest.raises(TypeError, match="no content digest"):
        content_digest(pa.table({"when": pa.array([0], pa.timestamp("us"))}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_not_finite_has_no_fingerprint(value):
    with pytest.raises(TypeError, match="no stable identity"):
        fingerprint({"score": value})


@pytest.mark.parametrize(
    "value",
    [object(), len, {1, 2}, b"bytes", {1: "integer key"}, [object()], {"deep": [{"deeper": lambda: None}]}, 1j],
    ids=lambda value: type(value).__name__,
)
def test_a_value_without_a_stable_identity_has_no_fingerprint(value):
    with pytest.raises(TypeError, match="stable identity"):
        fingerprint({"value": value})


def test_a_numpy_number_has_no_fingerprint_but_never_a_wrong_one():
    """Its text differs between versions of NumPy."""
    with pytest.raises(TypeError):
        fingerprint({"value": np.float32(0.5)})
    with pytest.raises(TypeError):
        fingerprint({"value": np.int64(3)})


def test_a_fingerprint_does_not_depend_on_the_order_of_keys_or_on_list_or_tuple():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})


def test_values_that_look_alike_have_different_fingerprints():
    values = [None, "null", "None", True, 1, 1.0, "1", "true", [], {}, [1], ["1"], [[1]], "", -0.0, 0.0, 0, False]
    made = [fingerprint({"value": value}) for value in values]

    assert len(set(made)) == len(values)


def test_nesting_shows():
    assert fingerprint({"a": {"b": 1}, "c": 2}) != fingerprint({"a": {"b": 1, "c": 2}})
    assert fingerprint({"a": ["b", "c"]}) != fingerprint({"a": ['b","c']})


def test_a_fingerprint_is_the_same_in_another_process():
    code = "from curation.fingerprint import fingerprint; print(fingerprint({'b': [1.5, None, 'é'], 'a': {'c': True}}))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )

    assert other.stdout.strip() == fingerprint({"a": {"c": True}, "b": [1.5, None, "é"]})
