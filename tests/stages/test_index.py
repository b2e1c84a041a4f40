import logging

import numpy as np
import pytest

from curation.config.selection import IndexConfig
from curation.errors import ConfigError, DimensionError
from curation.indexes import index_header
from curation.indexes.flat import FlatIndex
from curation.indexes.index import load
from curation.stages import index as stage
from curation.stages.index import IndexFit, IndexStage

AUTO = IndexConfig()
IVF_PQ = IndexConfig(kind="ivf_pq", num_lists=4, code_bytes=2)


@pytest.fixture(scope="session")
def pool(image):
    """60 images, some rejected, some without an embedding, two in the same place."""
    random = np.random.default_rng(3)
    rows = []
    for number in range(60):
        vector = random.normal(size=8)
        vector = (vector / np.linalg.norm(vector)).astype(np.float16)
        rows.append(image(number, embedding=None if number % 9 == 0 else vector, kept=number % 7 != 0))
    rows[11]["embedding"] = rows[10]["embedding"]
    return rows


@pytest.fixture
def built(in_memory, reduce):
    """``built(config, rows)``: the folder of the index of a pool; ``built.fit`` is what it was trained to."""

    def run(config, rows, part_bytes=1 << 28, fit=None, **sharding):
        inputs = in_memory({"pool": rows}, **sharding)
        if fit is None:
            reduce(IndexFit(config, 5), inputs)
            fit = reduce.scratch
        run.fit = inputs.made["index_fit"] = fit
        assert reduce(IndexStage(config, 5, part_bytes), inputs) == {}
        return reduce.scratch

    return run


@pytest.mark.parametrize("part_bytes", [1, 200, 1 << 28], ids=["a part a shard", "some parts", "one part"])
def test_searches_do_not_depend_on_shards_order_or_parts(part_bytes, pool, built, sharding):
    usable = [row for row in pool if row["kept"] and row["embedding"] is not None]
    queries = np.stack([row["embedding"] for row in usable])
    keys = np.array([[int(row["image_id"][:16], 16)] * 2 for row in usable], np.uint64)
    expected = FlatIndex(8)
    expected.add(queries, keys)
    expected = expected.search(queries, 5)

    index = load(built(AUTO, pool, part_bytes, **sharding))
    found = index.search(queries, 5)

    assert isinstance(index, FlatIndex)
    assert len(index) == len(usable)
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("part_bytes", [1, 200, 1 << 28], ids=["a part a shard", "some parts", "one part"])
def test_files_of_an_inverted_index_do_not_depend_on_shards_order_or_parts(part_bytes, pool, built, sharding):
    expected = built(IVF_PQ, pool)
    found = built(IVF_PQ, pool, part_bytes, **sharding)

    for name in IndexStage.artefacts:
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert len(load(found)) == sum(row["kept"] and row["embedding"] is not None for row in pool)


def test_the_header_says_what_recall_was_measured(pool, built):
    probing = index_header.read(built(IVF_PQ, pool) / index_header.HEADER_FILE).probing
    assert probing.recall >= IVF_PQ.recall
    assert probing.num_queries > 40

    given = IndexConfig(kind="ivf_pq", num_lists=4, code_bytes=2, probes=1, depth=5)
    probing = index_header.read(built(given, pool) / index_header.HEADER_FILE).probing
    assert (probing.probes, probing.depth) == (1, 5)
    assert probing.recall < 1


def test_recall_is_measured_on_images_that_the_index_was_not_trained_on(pool, built, monkeypatch):
    monkeypatch.setattr(stage, "HELD_OUT", 5)
    seen = {"trained": [], "asked": []}

    def train(vectors_ND, chosen, *rest):
        seen["trained"] += [row.tobytes() for row in vectors_ND]
        return original(vectors_ND, chosen, *rest)

    def tune(index, queries_QD, *rest):
        seen["asked"] += [row.tobytes() for row in queries_QD]
        return measured(index, queries_QD, *rest)

    original, measured = stage.train, stage.tune
    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(stage, "tune", tune)
    built(IVF_PQ, [row for row in pool if row["url"] != pool[11]["url"]])  # the one with a copy

    assert len(seen["asked"]) == 5
    assert len(seen["trained"]) > 30
    assert not set(seen["asked"]) & set(seen["trained"])


def test_an_index_that_was_trained_goes_on_with_more_images(pool, built):
    few = built(IVF_PQ, pool[:30])
    more = built(IVF_PQ, pool, fit=built.fit)

    assert len(load(few)) < len(load(more))
    assert load(few).quantizer == load(more).quantizer


def test_a_flat_index_that_was_outgrown_says_so(pool, built, monkeypatch, caplog):
    built(AUTO, pool)
    monkeypatch.setattr("curation.indexes.parameters.MIN_VALUES", 100)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load(built(AUTO, pool, fit=built.fit)), FlatIndex)
    assert "--refit" in caplog.text
    assert not isinstance(load(built(AUTO, pool)), FlatIndex)


@pytest.mark.parametrize("config", [AUTO, IVF_PQ], ids=["auto", "ivf_pq"])
@pytest.mark.parametrize("rows", [[], [{"url": "a"}]], ids=["no rows", "no embeddings"])
def test_an_empty_pool_gives_an_empty_index(rows, config, built):
    assert len(load(built(config, rows, num_shards=2))) == 0


@pytest.mark.parametrize("config", [AUTO, IVF_PQ], ids=["auto", "ivf_pq"])
def test_a_broken_embedding_is_not_indexed(config, image, unit, built):
    rows = [image(0, embedding=np.full(8, np.nan, np.float16)), image(1, embedding=unit(1))]

    assert len(load(built(config, rows))) == 1


@pytest.mark.parametrize("config", [AUTO, IVF_PQ], ids=["auto", "ivf_pq"])
def test_embeddings_of_two_encoders_are_refused(config, image, unit, built):
    rows = [image(0, embedding=unit(1)), image(1, embedding=unit(*np.ones(16)))]

    with pytest.raises(DimensionError, match="16"):
        built(config, rows, num_shards=2)


def test_settings_that_a_flat_index_would_ignore_are_refused():
    from curation.config import RunConfig
    from curation.settings import parse

    with pytest.raises(ConfigError, match="probes: a flat index has none"):
        parse(RunConfig, {"index": {"kind": "flat", "probes": 3}}, "a.yaml")
