import json

import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config.dedup import DedupConfig
from curation.errors import DimensionError, VectorError
from curation.indexes.pairs import ExactPairs, InvertedPairs
from curation.stages.dedup_search import (
    INDEX_FILE,
    SEARCH_FILE,
    DedupCodes,
    DedupFit,
    as_binary,
    as_codes,
    load_search,
)


@pytest.fixture(scope="module")
def rows(image):
    """40 images; one is rejected, one has no descriptor and one a broken descriptor."""
    vectors = np.random.default_rng(4).normal(size=(40, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    made = [image(number, sscd=vector) for number, vector in enumerate(vectors)]
    made[3]["kept"] = False
    made[4]["sscd"] = None
    made[5]["sscd"] = np.full(16, np.nan, np.float16)
    return made


def fit(inputs, folder, **settings):
    folder.mkdir()
    assert list(DedupFit(DedupConfig(**settings), 5)(inputs, folder)) == []
    return json.loads((folder / SEARCH_FILE).read_text())


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({"exact_max_rows": 39}, "exact"),
        ({"exact_max_rows": 38}, "inverted"),
        ({"backend": "exact", "exact_max_rows": 0}, "exact"),
        ({"backend": "inverted"}, "inverted"),
    ],
)
def test_auto_is_exact_up_to_a_number_of_kept_images(rows, in_memory, tmp_path, settings, backend):
    found = fit(in_memory({"pool": rows}), tmp_path / "fit", recall=0.5, **settings)

    assert found["backend"] == backend
    assert isinstance(load_search(tmp_path / "fit"), {"exact": ExactPairs, "inverted": InvertedPairs}[backend])


def test_the_fit_does_not_depend_on_shards_or_order(rows, in_memory, tmp_path, sharding):
    settings = {"backend": "inverted", "recall": 0.5}

    fit(in_memory({"pool": rows}), tmp_path / "one", **settings)
    fit(in_memory({"pool": rows}, **sharding), tmp_path / "other", **settings)

    for name in (SEARCH_FILE, INDEX_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_exact_search_is_the_same_artefact_for_any_pool(rows, in_memory, tmp_path):
    fit(in_memory({"pool": rows}), tmp_path / "one")
    fit(in_memory({"pool": rows[:7]}), tmp_path / "other", backend="exact")

    for name in (SEARCH_FILE, INDEX_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("num_rows", [0, 6])
def test_without_a_descriptor_there_is_nothing_to_fit(rows, in_memory, tmp_path, num_rows):
    pool = [row | {"sscd": None} for row in rows[:num_rows]]

    assert fit(in_memory({"pool": pool}), tmp_path / "fit", backend="inverted")["backend"] == "exact"


def test_rows_that_are_searched_have_a_code(rows, table):
    vectors = np.stack(
        [row["sscd"] for row in rows if row["sscd"] is not None and row["image_id"] != rows[5]["image_id"]]
    )
    search = InvertedPairs.fit(vectors, 40, (0.5,), 0.5, 0, 1)
    kept = np.array([row.get("kept", True) for row in rows])

    found = DedupCodes(search)(table(rows, schema.SSCD), kept)

    assert found.schema == schema.DEDUP_CODES.schema
    assert [row for row, searched in enumerate(found.column("searched").to_pylist()) if not searched] == [3, 4, 5]
    codes = found.column("code").to_pylist()
    assert [row for row, code in enumerate(codes) if code is None] == [3, 4, 5]
    assert np.frombuffer(codes[0], np.uint8).tolist() == search.encode(vectors[:1], 1)[0].tolist()


def test_a_shard_without_a_kept_row_has_no_code(rows, table):
    found = DedupCodes(ExactPairs())(table(rows, schema.SSCD), np.zeros(len(rows), bool))

    assert found.column("code").null_count == len(rows)


def test_a_descriptor_that_is_not_normalised_is_an_error(rows, table):
    long = [rows[0] | {"sscd": rows[0]["sscd"] * 2}]

    with pytest.raises(VectorError, match="L2-normalise"):
        DedupCodes(ExactPairs())(table(long, schema.SSCD), np.ones(1, bool))


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (5, 3)])
def test_codes_go_into_a_column_and_come_back(shape):
    codes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    column = as_binary(codes)

    assert as_codes(column).tolist() == codes.tolist()
    assert as_codes(column[2:]).tolist() == codes[2:].tolist()


def test_codes_of_different_lengths_are_refused():
    with pytest.raises(DimensionError, match="--redo dedup"):
        as_codes(pa.array([b"ab", b"c"], pa.binary()))
