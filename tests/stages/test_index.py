import numpy as np
import pytest

from curation.errors import DimensionError
from curation.indexes.flat import FlatIndex
from curation.stages.index import IndexStage


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


@pytest.mark.parametrize("part_bytes", [1, 200, 1 << 28], ids=["a part a shard", "some parts", "one part"])
def test_searches_do_not_depend_on_shards_order_or_parts(part_bytes, pool, in_memory, reduce, sharding):
    usable = [row for row in pool if row["kept"] and row["embedding"] is not None]
    queries = np.stack([row["embedding"] for row in usable])
    keys = np.array([[int(row["image_id"][:16], 16)] * 2 for row in usable], np.uint64)
    expected = FlatIndex(8)
    expected.add(queries, keys)
    expected = expected.search(queries, 5)

    assert reduce(IndexStage(part_bytes), in_memory({"pool": pool}, **sharding)) == {}
    index = FlatIndex.load(reduce.scratch)
    found = index.search(queries, 5)

    assert len(index) == len(usable)
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("rows", [[], [{"url": "a"}]], ids=["no rows", "no embeddings"])
def test_an_empty_pool_gives_an_empty_index(rows, in_memory, reduce):
    reduce(IndexStage(), in_memory({"pool": rows}, num_shards=2))

    assert len(FlatIndex.load(reduce.scratch)) == 0


def test_a_broken_embedding_is_not_indexed(image, unit, in_memory, reduce):
    rows = [image(0, embedding=np.full(8, np.nan, np.float16)), image(1, embedding=unit(1))]

    reduce(IndexStage(), in_memory({"pool": rows}))

    assert len(FlatIndex.load(reduce.scratch)) == 1


def test_embeddings_of_two_encoders_are_refused(image, unit, in_memory, reduce):
    rows = [image(0, embedding=unit(1)), image(1, embedding=unit(*np.ones(16)))]

    with pytest.raises(DimensionError, match="16"):
        reduce(IndexStage(), in_memory({"pool": rows}, num_shards=2))
