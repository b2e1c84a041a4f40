import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError, StoreError, VectorError
from curation.indexes import array_files, index_header, ivfpq
from curation.indexes.exact import nearest
from curation.indexes.flat import FlatIndex
from curation.indexes.index import load
from curation.indexes.index_header import HEADER_FILE, KEYS_FILE, LISTS_FILE, VECTORS_FILE, Probing
from curation.indexes.inverted_lists import InvertedLists
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.parameters import Parameters

FILES = (VECTORS_FILE, KEYS_FILE, LISTS_FILE, HEADER_FILE)


def trained(vectors, num_lists=12, code_bytes=3, coded_dim=256, probes=3, depth=10):
    index = IvfPqIndex.train(vectors, Parameters("ivf_pq", num_lists, code_bytes, coded_dim))
    index.probing = Probing(probes, depth)
    return index


def filled(index, vectors, keys):
    index.add(vectors, keys)
    return index


def assert_same(found, wanted):
    np.testing.assert_array_equal(found.keys, wanted.keys)
    np.testing.assert_array_equal(found.similarities, wanted.similarities)


@pytest.fixture
def pool(mixture):
    """900 vectors with copies and ties, their keys, and 70 queries."""
    vectors = mixture.vectors(900, dim=24)
    vectors[300:400] = vectors[0]  # more copies than candidates
    queries = mixture.vectors(70, dim=24, centres=5)
    queries[:5] = vectors[0]
    return vectors, mixture.keys(900), queries


@pytest.fixture(params=[1, 2, 5], ids=["one part", "two parts", "five parts"])
def cut(request, pool, mixture):
    """``cut(index)``: the pool in parts of any rows, some of them empty."""
    vectors, keys, _ = pool

    def merged(index):
        whole = index.empty()
        for rows in np.array_split(mixture.rng.permutation(len(keys)), request.param):
            part = index.empty()
            for some in np.array_split(rows, 3):
                part.add(vectors[some], keys[some])
            whole.merge(part)
            whole.merge(index.empty())
        return whole

    return merged


def test_what_is_found_does_not_depend_on_how_the_pool_is_cut_batched_or_threaded(pool, cut):
    vectors, keys, queries = pool
    index = trained(vectors)
    wanted = filled(index.empty(), vectors, keys).search(queries, 4)
    exact = nearest(queries, [(vectors, keys)], 4)
    assert not np.array_equal(wanted.keys, exact.keys)  # so few candidates are an approximation

    merged = cut(index)

    assert_same(merged.search(queries, 4), wanted)
    assert_same(merged.search(queries, 4, num_threads=2), wanted)
    for start in range(0, 70, 7):
        assert_same(merged.search(queries[start : start + 7], 4), wanted.part(start, start + 7))


def test_files_depend_on_content_alone_and_answer_as_the_index_did(pool, cut, tmp_path):
    vectors, keys, queries = pool
    index = trained(vectors)
    whole = filled(index.empty(), vectors, keys)
    whole.save(tmp_path / "whole")
    cut(index).save(tmp_path / "parts")
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    loaded = load(tmp_path / "parts")
    assert isinstance(loaded, IvfPqIndex)
    assert (len(loaded), loaded.dim, loaded.probing) == (900, 24, index.probing)
    assert_same(loaded.search(queries, 4), whole.search(queries, 4))
    again = loaded.empty()
    again.merge(loaded)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / LISTS_FILE).read_bytes() == (tmp_path / "whole" / LISTS_FILE).read_bytes()


def test_rows_are_those_of_the_files_and_similarities_are_exact(pool, tmp_path, exact_similarities):
    vectors, keys, queries = pool
    filled(trained(vectors), vectors, keys).save(tmp_path)
    stored = np.load(tmp_path / VECTORS_FILE)
    found = load(tmp_path).search(queries, 4)
    assert np.array_equal(np.load(tmp_path / KEYS_FILE)[found.rows], found.keys)
    scores = exact_similarities(queries, stored)
    assert np.array_equal(found.similarities, np.take_along_axis(scores, found.rows, axis=1))


@pytest.mark.parametrize("depth", [440, 450], ids=["nearly all", "all"])  # for 6 neighbours twice as many
def test_with_every_list_and_every_candidate_it_is_the_exact_search(depth, pool, cut):
    vectors, keys, queries = pool
    index = trained(vectors, probes=12, depth=depth)
    assert_same(cut(index).search(queries, 6), nearest(queries, [(vectors, keys)], 6))


def test_candidates_are_the_best_scores_with_ties_by_key(pool, cut):
    vectors, keys, queries = pool
    index = trained(vectors)
    everything = filled(index.empty(), vectors, keys)
    all_query, all_row, all_score = everything.candidates(queries, Probing(3, 900))
    all_keys = everything._keys(all_row)
    order = np.lexsort((all_keys[:, 1], all_keys[:, 0], -all_score, all_query))
    merged = cut(index)
    query, row, score = merged.candidates(queries, Probing(3, 7))
    found = merged._keys(row)
    for number in range(len(queries)):
        mine = order[all_query[order] == number][:7]
        assert {tuple(key) for key in found[query == number].tolist()} == {tuple(k) for k in all_keys[mine].tolist()}
        assert sorted(score[query == number]) == sorted(all_score[mine])


def test_many_queries_whose_candidates_are_many_copies_are_searched_a_few_at_a_time(mixture, monkeypatch):
    vectors, keys = mixture.vectors(300), mixture.keys(1500)
    vectors = np.concatenate([vectors, np.tile(vectors[:2], (600, 1))])
    index = filled(trained(vectors, depth=8), vectors, keys)
    queries = np.concatenate([vectors[:2]] * 20 + [vectors[2:60]])
    wanted = index.search(queries, 4)
    sizes = []

    def search(self, points_QE, *arguments, search=InvertedLists.search):
        found = search(self, points_QE, *arguments)
        sizes.append(found.scores.shape)
        return found

    monkeypatch.setattr(InvertedLists, "search", search)
    monkeypatch.setattr(ivfpq, "_MAX_SCORES", 1000)
    assert_same(index.search(queries, 4), wanted)
    assert max(depth for _, depth in sizes) > 600
    assert all(rows * depth <= 1000 or rows == 1 for rows, depth in sizes)


def test_scores_are_products_with_what_the_codes_stand_for(pool):
    vectors, keys, queries = pool
    index = filled(trained(vectors), vectors, keys)
    lists, codes = index.quantizer.encode(vectors)
    pieces = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
    book = index.quantizer.codebook_MSK
    decoded = index.quantizer.centroids_LE[lists] + np.concatenate(
        [book[piece][:, pieces[:, piece]].T for piece in range(len(book))], axis=1
    )
    query, row, score = index.candidates(queries, Probing(12, 900))
    by_key = {tuple(key): number for number, key in enumerate(keys.tolist())}
    rows = np.array([by_key[tuple(key)] for key in index._keys(row).tolist()])
    wanted = (index.quantizer.project(queries)[query] * decoded[rows]).sum(axis=1)
    assert np.abs(score - wanted).max() < 0.02  # 8-bit tables


def test_there_are_never_fewer_neighbours_than_rows(mixture):
    vectors, keys = mixture.vectors(40), mixture.keys(40)
    index = filled(trained(vectors, num_lists=30, probes=1, depth=1), vectors, keys)
    found = index.search(vectors, 6)
    assert (found.rows >= 0).all()
    found = index.search(vectors, 60)
    assert (np.sort(found.rows[:, :40], axis=1) == np.arange(40)).all()
    assert (found.rows[:, 40:] == -1).all()
    assert index.empty().search(vectors, 2).rows.tolist() == [[-1, -1]] * 40
    assert index.search(vectors[:0], 2).rows.shape == (0, 2)


@pytest.mark.parametrize("kind", ["flat", "ivf_pq"])
def test_only_rows_that_are_asked_for_are_found(pool, kind, tmp_path):
    vectors, keys, queries = pool
    index = trained(vectors, probes=12, depth=900) if kind == "ivf_pq" else FlatIndex(24)
    for rows in np.array_split(np.arange(900), 3):
        part = index.empty()
        part.add(vectors[rows], keys[rows])
        index.merge(part)
    among = np.random.default_rng(1).random(900) < 0.02
    found = index.search(queries, 30, among_N=among)
    assert np.array_equal(np.sort(found.rows, axis=1)[0][-among.sum() :], np.flatnonzero(among))
    every = np.concatenate([part_keys for _, part_keys in index.vectors()] if kind == "ivf_pq" else [keys])
    assert np.array_equal(every[found.rows[:, 0]], found.keys[:, 0])
    assert (index.search(queries, 3, among_N=np.zeros(900, bool)).rows == -1).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 13, 29])
@pytest.mark.parametrize("code_bytes", [1, 3, 8])
def test_dimensions_that_do_not_divide_into_pieces_are_padded(mixture, dim, code_bytes):
    vectors, keys = mixture.vectors(200, dim=dim), mixture.keys(200)
    index = filled(trained(vectors, 6, code_bytes, coded_dim=11, probes=6, depth=200), vectors, keys)
    assert_same(index.search(vectors, 3), nearest(vectors, [(vectors, keys)], 3))


def test_fewer_points_than_lists_or_all_the_same_are_no_special_case(mixture):
    keys = mixture.keys(50)
    for vectors in (mixture.vectors(50)[:3], np.repeat(mixture.vectors(1), 50, axis=0)):
        index = filled(trained(vectors, num_lists=20, probes=20, depth=5), vectors, keys[: len(vectors)])
        assert_same(index.search(vectors, 3), nearest(vectors, [(vectors, keys[: len(vectors)])], 3))
    with pytest.raises(VectorError, match="no vector to train"):
        trained(mixture.vectors(5)[:0])


def test_bad_input_is_refused_and_adds_nothing(pool):
    vectors, keys, queries = pool
    index = trained(vectors)
    broken = vectors.copy()
    broken[3, 2] = np.nan
    with pytest.raises(VectorError, match="row 3 has a value that is not finite"):
        index.add(broken, keys)
    with pytest.raises(VectorError):
        trained(broken)
    for wrong in (vectors.astype(np.float32), vectors[:, :8], vectors[:10]):
        with pytest.raises(DimensionError):
            index.add(wrong, keys)
    assert len(index) == 0
    index.add(vectors, keys)
    with pytest.raises(VectorError):
        index.search(broken, 1)
    with pytest.raises(DimensionError, match="k must be"):
        index.search(vectors, 0)
    with pytest.raises(DimensionError, match="among"):
        index.search(vectors, 1, among_N=np.ones(3, bool))
    with pytest.raises(DimensionError, match="trained apart"):
        index.merge(trained(queries))


def test_added_rows_are_copies(pool):
    vectors, keys, queries = (array.copy() for array in pool)
    index = filled(trained(vectors), vectors, keys)
    vectors[:], keys[:] = 0, 0
    assert_same(index.search(queries, 4), filled(trained(pool[0]), *pool[:2]).search(queries, 4))


def test_damage_of_any_file_is_found(pool, tmp_path):
    vectors, keys, _ = pool
    filled(trained(vectors), vectors, keys).save(tmp_path)
    random = np.random.default_rng(2)
    for name in (VECTORS_FILE, LISTS_FILE, KEYS_FILE, HEADER_FILE):
        whole = (tmp_path / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2 | 1] ^= 0x7C
        for damage in (whole[:-1], whole + b"x", b"", b"junk" * 999, bytes(flipped)):
            if name == HEADER_FILE and damage == whole + b"x":
                continue  # a zip archive may be followed by anything
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(CorruptError, match=r"is not a saved index|not the header"):
                load(tmp_path)
        (tmp_path / name).write_bytes(whole)
        load(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CorruptError):
            load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    np.save(tmp_path / KEYS_FILE, random.integers(0, 9, (899, 2)).astype(np.uint64))
    with pytest.raises(CorruptError, match="keys must be"):
        load(tmp_path)


def test_damaged_rows_that_were_not_verified_are_found_by_the_search_that_meets_them(pool, tmp_path):
    vectors, keys, queries = pool
    filled(trained(vectors, probes=12, depth=899), vectors, keys).save(tmp_path)
    for name, error in ((VECTORS_FILE, VectorError), (LISTS_FILE, CorruptError)):
        whole = (tmp_path / name).read_bytes()
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[-600:] = 0x7F
        (tmp_path / name).write_bytes(damaged.tobytes())
        with pytest.raises(error):
            load(tmp_path, verify=False).search(queries, 4)
        (tmp_path / name).write_bytes(whole)


def test_a_header_whose_entries_do_not_fit_is_refused(pool, tmp_path):
    vectors, keys, _ = pool
    filled(trained(vectors), vectors, keys).save(tmp_path)
    path = tmp_path / HEADER_FILE
    with np.load(path, allow_pickle=False) as arrays:
        good = dict(arrays)
    wrong = [
        {"centroids": good["centroids"][:, :-1]},
        {"centroids": good["centroids"] + np.float32(1e-5)},  # off the grid
        {"codebook": good["codebook"][:-1]},
        {"codebook": np.full_like(good["codebook"], np.nan)},
        {"rotation": good["rotation"].astype(np.float64)},
        {"sizes": -good["sizes"]},
        {"sizes": good["sizes"][:-1]},
        {"about": np.array("{")},
        {"about": np.array('{"format": 1, "kind": "ivf_pq"}')},
        {"about": np.array(str(good["about"]).replace("keys_crc32", "keys_crc16"))},
        {"about": np.array(str(good["about"]).replace('"probes": 3', '"probes": 0'))},
        {"about": np.array([{}], object)},
    ]
    for change in wrong:
        np.savez(path, **good | change)
        with pytest.raises(CorruptError):
            index_header.read(path)
    np.savez(path, **good)
    index_header.read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    code = (
        "import sys, numpy as np\n"
        "from curation.errors import DiskFullError\n"
        "from curation.indexes.ivfpq import IvfPqIndex\n"
        "from curation.indexes.parameters import Parameters\n"
        "vectors, keys = np.eye(4, dtype=np.float16), np.arange(8, dtype=np.uint64).reshape(4, 2)\n"
        "index = IvfPqIndex.train(vectors, Parameters('ivf_pq', 2, 1, 4)); index.add(vectors, keys)\n"
        "try:\n    index.save(sys.argv[1])\nexcept DiskFullError as error:\n"
        "    print(error, index.search(vectors, 1).rows.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert os.strerror(errno.ENOSPC) in done.stdout, done.stderr


def test_rows_are_not_lost_where_the_folder_for_temporary_files_fails(pool, tmp_path, monkeypatch):
    vectors, keys, queries = pool
    index = filled(trained(vectors), vectors, keys)
    wanted = filled(index.empty(), vectors, keys).search(queries, 4)
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "file"))
        with pytest.raises(StoreError, match="cannot be written"):
            index.search(queries, 4)
    assert_same(index.search(queries, 4), wanted)


def test_a_folder_that_cannot_be_made_is_one_clear_error(pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        filled(trained(pool[0]), *pool[:2]).save(tmp_path / "file" / "index")


def test_the_checksum_of_a_stream_is_that_of_its_file(tmp_path):
    with array_files.raw(tmp_path / "a") as stream:
        stream.write(b"some")
        stream.write(b"thing")
    assert array_files.crc32(tmp_path / "a") == stream.crc32 != 0
