import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError, StoreError, VectorError
from curation.indexes.flat import KEYS_FILE, VECTORS_FILE, FlatIndex
from curation.indexes.keys import NO_KEY


def index_of(vectors, keys, batch=97):
    index = FlatIndex(vectors.shape[1])
    for start in range(0, len(vectors), batch):
        index.add(vectors[start : start + batch], keys[start : start + batch])
    return index


def test_search_equals_brute_force_for_any_batches_of_adding(mixture, brute_nearest):
    vectors, keys, queries = mixture.vectors(500), mixture.keys(500), mixture.vectors(60)
    rows, scores = brute_nearest(queries, vectors, keys, 5)
    for batch in (1, 97, 500):
        found_keys, found_rows, similarities = index_of(vectors, keys, batch).search(queries, 5, block_rows=64)
        assert np.array_equal(found_rows, rows)
        assert np.array_equal(found_keys, keys[rows])
        assert np.array_equal(similarities, np.take_along_axis(scores, rows, axis=1))


def test_what_is_found_does_not_depend_on_row_order(mixture):
    vectors, keys, queries = mixture.vectors(500), mixture.keys(500), mixture.vectors(60)
    order = mixture.rng.permutation(500)
    found = index_of(vectors, keys).search(queries, 8)
    moved = index_of(vectors[order], keys[order]).search(queries, 8, block_rows=50, num_threads=2)
    assert np.array_equal(found.keys, moved.keys)
    assert np.array_equal(found.similarities, moved.similarities)


def test_ties_of_five_thousand_copies_go_to_the_smallest_keys(mixture):
    vectors = np.repeat(mixture.vectors(1, dim=32), 5000, axis=0)
    keys = mixture.keys(5000)
    found = index_of(vectors, keys).search(vectors[:300], 10, block_rows=2048)
    smallest = keys[np.lexsort((keys[:, 1], keys[:, 0]))[:10]]
    assert (found.keys == smallest).all()


def test_places_beyond_the_index_are_empty(mixture):
    vectors, keys = mixture.vectors(3), mixture.keys(3)
    found = index_of(vectors, keys).search(vectors, 5)
    assert (np.sort(found.rows[:, :3], axis=1) == [0, 1, 2]).all()
    assert (found.rows[:, 3:] == -1).all()
    assert (found.keys[:, 3:] == NO_KEY).all()
    assert (found.similarities[:, 3:] == -np.inf).all()
    assert (FlatIndex(16).search(vectors, 2).rows == -1).all()
    assert index_of(vectors, keys).search(vectors[:0], 2).rows.shape == (0, 2)


def test_saved_index_answers_the_same_and_is_mapped(mixture, tmp_path):
    vectors, keys, queries = mixture.vectors(500), mixture.keys(500), mixture.vectors(20)
    index = index_of(vectors, keys)
    index.save(tmp_path / "a" / "index")
    loaded = FlatIndex.load(tmp_path / "a" / "index")
    assert len(loaded) == 500
    assert isinstance(loaded._parts[0][0], np.memmap)
    for found, wanted in zip(loaded.search(queries, 4), index.search(queries, 4), strict=True):
        assert np.array_equal(found, wanted)
    assert np.array_equal(np.load(tmp_path / "a" / "index" / VECTORS_FILE), vectors)  # plain NumPy files
    assert np.array_equal(np.load(tmp_path / "a" / "index" / KEYS_FILE), keys)
    FlatIndex(7).save(tmp_path / "empty")
    assert (len(FlatIndex.load(tmp_path / "empty")), FlatIndex.load(tmp_path / "empty").dim) == (0, 7)


def test_merged_indexes_answer_as_one(mixture):
    vectors, keys, queries = mixture.vectors(500), mixture.keys(500), mixture.vectors(20)
    merged = index_of(vectors[:200], keys[:200])
    merged.merge(index_of(vectors[200:], keys[200:]))
    assert len(merged) == 500
    for found, wanted in zip(merged.search(queries, 4), index_of(vectors, keys).search(queries, 4), strict=True):
        assert np.array_equal(found, wanted)
    with pytest.raises(DimensionError, match="dimension 3"):
        merged.merge(FlatIndex(3))


def test_damaged_files_are_refused(mixture, tmp_path):
    index_of(mixture.vectors(50), mixture.keys(50)).save(tmp_path)
    whole = (tmp_path / VECTORS_FILE).read_bytes()
    np.save(tmp_path / "pickle.npy", np.array([{}], object), allow_pickle=True)
    nan = np.frombuffer(whole, np.uint8).copy()
    nan[-2:] = [0xFF, 0x7F]
    for damage in (whole[:-10], b"", b"junk" * 99, nan.tobytes(), (tmp_path / "pickle.npy").read_bytes()):
        (tmp_path / VECTORS_FILE).write_bytes(damage)
        with pytest.raises(CorruptError, match="is not a saved index"):
            FlatIndex.load(tmp_path)
    (tmp_path / VECTORS_FILE).write_bytes(whole)
    FlatIndex.load(tmp_path)
    keys = bytearray((tmp_path / KEYS_FILE).read_bytes())
    keys[-5] ^= 1
    (tmp_path / KEYS_FILE).write_bytes(keys)
    with pytest.raises(CorruptError, match="not what was written"):
        FlatIndex.load(tmp_path)
    (tmp_path / KEYS_FILE).unlink()
    with pytest.raises(CorruptError):
        FlatIndex.load(tmp_path)


def test_any_damage_to_the_header_is_found_or_harmless(mixture, tmp_path):
    index_of(mixture.vectors(4), mixture.keys(4)).save(tmp_path)
    whole = (tmp_path / VECTORS_FILE).read_bytes()
    letters = b"(){}[]'\",:0123456789 \nLTF\x00\xff"
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for place in mixture.rng.integers(0, 128, 3):
            damaged[place] = mixture.rng.choice(list(letters))
        (tmp_path / VECTORS_FILE).write_bytes(damaged)
        try:
            assert FlatIndex.load(tmp_path).dim == 16
        except CorruptError:
            refused += 1
    assert refused > 400


def test_a_folder_that_cannot_be_made_is_one_clear_error(mixture, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        index_of(mixture.vectors(5), mixture.keys(5)).save(tmp_path / "file" / "index")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and file size limits")
def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path):
    (tmp_path / VECTORS_FILE).symlink_to("/dev/full")
    code = (
        "import numpy as np; from curation.indexes.flat import FlatIndex; from curation.errors import DiskFullError\n"
        "index = FlatIndex(4); index.add(np.eye(4, dtype=np.float16), np.arange(8, dtype=np.uint64).reshape(4, 2))\n"
        "try:\n    index.save(__import__('sys').argv[1])\nexcept DiskFullError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert os.strerror(errno.ENOSPC) in done.stdout, done.stderr


def test_bad_input_is_refused_and_adds_nothing(mixture):
    vectors, keys = mixture.vectors(20), mixture.keys(20)
    index = FlatIndex(16)
    broken = vectors.copy()
    broken[3] = 0
    with pytest.raises(VectorError):
        index.add(broken, keys)
    for wrong in (vectors.astype(np.float32), vectors[:, :8], vectors[:10]):
        with pytest.raises(DimensionError):
            index.add(wrong, keys)
    assert len(index) == 0
    index.add(vectors, keys)
    with pytest.raises(VectorError):
        index.search(broken, 1)
    with pytest.raises(DimensionError, match="k must be"):
        index.search(vectors, 0)
    with pytest.raises(DimensionError):
        FlatIndex(0)


def test_added_rows_are_copies(mixture):
    vectors, keys = mixture.vectors(20), mixture.keys(20)
    index = index_of(vectors, keys, 20)
    wanted = index.search(vectors.copy(), 1)
    copy, vectors[:] = vectors.copy(), 0
    assert np.array_equal(index.search(copy, 1).similarities, wanted.similarities)
