"""Lists of digests: every line counts or is an error, and an image is found by its bytes or by its id."""

import hashlib

import numpy as np
import pytest

from curation.blocklist import Blocklists, blocklists
from curation.errors import BlocklistedError, InputError


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def lists(tmp_path):
    """Two lists: numbers below 3,000, and 7 and 5,000 with names behind them, in upper case, between comments."""
    (tmp_path / "small.txt").write_text("\n".join(digest(b"%d" % n) for n in range(3000)))
    other = [f"{digest(b'%d' % n).upper()}  photo {n}.jpg" for n in (7, 5000)]
    (tmp_path / "other.txt").write_text("# seen by hand\n\n" + "\r\n".join(other) + "\n")
    return Blocklists([str(tmp_path / "small.txt"), str(tmp_path / "other.txt")])


@pytest.mark.parametrize(
    ("number", "name"), [(0, "small.txt"), (2999, "small.txt"), (7, "small.txt"), (5000, "other.txt")]
)
def test_bytes_on_a_list_are_refused_by_the_first_that_has_them(lists, number, name):
    with pytest.raises(BlocklistedError) as refused:
        lists.check(b"%d" % number)

    assert (refused.value.sha256, refused.value.list_name) == (digest(b"%d" % number), name)
    assert refused.value.detail == ""


def test_bytes_on_no_list_pass(lists):
    for number in range(3000, 4000):
        lists.check(b"%d" % number)


def test_images_are_found_by_id(lists):
    ids = [digest(b"%d" % number)[:32] for number in (4000, 12, 5000)] + [None]

    assert lists.find(ids) == {1: (digest(b"12"), "small.txt"), 2: (digest(b"5000"), "other.txt")}


def test_digests_that_end_or_begin_in_zeros_are_found(tmp_path):
    rng = np.random.default_rng(0)
    odd = [bytes(32), b"\0" * 16 + rng.bytes(16), rng.bytes(16) + bytes(16), rng.bytes(31) + b"\0", b"\xff" * 32]
    (tmp_path / "odd.txt").write_text("\n".join(data.hex() for data in odd))
    lists = Blocklists([str(tmp_path / "odd.txt")])

    found = lists.find([data.hex()[:32] for data in odd])

    assert found[2][0] == odd[2].hex()
    assert found.keys() == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("line", ["abc", "g" * 64, digest(b"") + "0", "https://a.example/"])
def test_a_line_that_is_no_digest_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"{digest(b'')}\n{line}\n")

    with pytest.raises(InputError, match=r"list.txt: line 2 is no sha256"):
        Blocklists([str(tmp_path / "list.txt")])


def test_two_digests_on_one_line_are_an_error(tmp_path):
    (tmp_path / "list.txt").write_text(digest(b"a") + digest(b"b") + "\n")

    with pytest.raises(InputError, match="line 1 is no sha256"):
        Blocklists([str(tmp_path / "list.txt")])


def test_a_list_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"fetch.blocked_hashes: .*gone.txt cannot be read"):
        blocklists([str(tmp_path / "gone.txt")])


def test_an_empty_list_names_nothing(tmp_path):
    (tmp_path / "empty.txt").touch()

    assert Blocklists([str(tmp_path / "empty.txt")]).find([digest(b"")[:32]]) == {}


def test_a_list_that_has_grown_is_read_again(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(digest(b"a") + "\n")
    blocklists([str(path)]).check(b"b")
    path.write_text(digest(b"a") + "\n" + digest(b"b") + "\n")

    with pytest.raises(BlocklistedError):
        blocklists([str(path)]).check(b"b")
