import pyarrow as pa
import pytest

from curation.demo.score import COLUMNS, score
from curation.demo.sources import Region
from curation.demo.truth import Item, Truth

BASE = "http://127.0.0.1:8000"
ONE, TWO, THREE, FOUR = (Region("china", 64 * n, 0, 64 * n + 64, 64) for n in range(4))
ITEMS = (
    Item("references/evaluation/0.jpg", "reference", "id-reference", THREE),
    Item("seeds/photos/0.jpg", "seed", "id-seed", FOUR),
    Item("www/broken/empty.jpg", "broken", "id-empty", edit="empty"),
    Item("www/copies/a-flip.jpg", "copy", "id-a-flip", ONE, "www/photos/a.jpg", "flip"),
    Item("www/copies/a-grey.jpg", "copy", "id-a-grey", ONE, "www/photos/a.jpg", "grey"),
    Item("www/gone/0.jpg", "missing"),
    Item("www/mirror/a.jpg", "exact_copy", "id-a", ONE, "www/photos/a.jpg"),
    Item("www/photos/a.jpg", "photo", "id-a", ONE),
    Item("www/photos/b.jpg", "photo", "id-b", TWO),
    Item("www/private/0.jpg", "robots", "id-private", Region("flower", 0, 0, 64, 64)),
    Item("www/reposts/reference.jpg", "reference_copy", "id-repost", THREE, "references/evaluation/0.jpg", "flip"),
    Item("www/reposts/seed.jpg", "seed_copy", "id-seed-copy", FOUR, "seeds/photos/0.jpg", "flip"),
    Item("www/small/b.jpg", "small", "id-b-small", TWO, "www/photos/b.jpg", "resize_50"),
)
TRUTH = Truth("test", (), ITEMS)
# path → image id, reason, stage, duplicate of: a run without fault
PERFECT = {
    "broken/empty.jpg": (None, "empty", "fetch", None),
    "copies/a-flip.jpg": ("id-a-flip", "near_duplicate", "dedup", "id-a"),
    "copies/a-grey.jpg": ("id-a-grey", "near_duplicate", "dedup", "id-a"),
    "gone/0.jpg": (None, "http_404", "fetch", None),
    "mirror/a.jpg": ("id-a", "exact_duplicate", "pca_hash", "id-a"),
    "photos/a.jpg": ("id-a", None, None, None),
    "photos/b.jpg": ("id-b", None, None, None),
    "private/0.jpg": (None, "robots", "fetch", None),
    "reposts/reference.jpg": ("id-repost", "reference_copy", "dedup", "id-reference"),
    "reposts/seed.jpg": ("id-seed-copy", "seed_copy", "dedup", "id-seed"),
    "small/b.jpg": ("id-b-small", "near_duplicate", "dedup", "id-b"),
}


def _score(**changes):
    rows = {**PERFECT, **changes}
    table = pa.Table.from_pylist(
        [
            dict(zip(COLUMNS, (f"{BASE}/{path}", *row), strict=True))
            for path, row in sorted(rows.items())
            if row is not None
        ],
        schema=pa.schema([(name, pa.string()) for name in COLUMNS]),
    )
    return score(TRUTH, BASE + "/", table)


def test_a_faultless_run_passes():
    result = _score()

    assert result.passed
    assert (result.found, result.planted, result.recall) == (3, 3, 1.0)
    assert result.by_edit == {"flip": (1, 1), "grey": (1, 1), "resize_50": (1, 1)}
    assert result.exact_copies == (1, 1)
    assert result.broken_reasons == {"empty": 1, "http_404": 1}
    assert result.missed == result.wrong_merges == result.not_crawled == ()


def test_a_kept_copy_beside_its_original_is_missed():
    result = _score(**{"copies/a-flip.jpg": ("id-a-flip", None, None, None)})

    assert result.missed == ("www/copies/a-flip.jpg",)
    assert result.by_edit["flip"] == (0, 1)
    assert not result.passed


def test_a_copy_rejected_for_another_reason_is_missed():
    result = _score(**{"copies/a-flip.jpg": ("id-a-flip", "nsfw", "nsfw", None)})

    assert result.missed == ("www/copies/a-flip.jpg",)


def test_a_copy_kept_in_place_of_its_original_is_found():
    result = _score(
        **{
            "copies/a-flip.jpg": ("id-a-flip", None, None, None),
            "copies/a-grey.jpg": ("id-a-grey", "near_duplicate", "dedup", "id-a-flip"),
            "photos/a.jpg": ("id-a", "near_duplicate", "dedup", "id-a-flip"),
        }
    )

    assert result.passed
    assert result.found == 3


def test_a_copy_that_stands_only_for_another_copy_is_missed():
    result = _score(
        **{
            "copies/a-flip.jpg": ("id-a-flip", None, None, None),
            "copies/a-grey.jpg": ("id-a-grey", "near_duplicate", "dedup", "id-a-flip"),
        }
    )

    assert result.missed == ("www/copies/a-flip.jpg",)


def test_a_representative_that_is_not_retrieved_still_stands_for_its_group():
    result = _score(
        **{
            "copies/a-flip.jpg": ("id-a-flip", "not_retrieved", "retrieve", None),
            "photos/a.jpg": ("id-a", "near_duplicate", "dedup", "id-a-flip"),
        }
    )

    assert result.missed == ()


def test_either_of_two_urls_may_stand_for_the_same_bytes():
    result = _score(
        **{"mirror/a.jpg": ("id-a", None, None, None), "photos/a.jpg": ("id-a", "exact_duplicate", "pca_hash", "id-a")}
    )

    assert result.passed


def test_two_kept_urls_of_the_same_bytes_are_missed():
    result = _score(**{"mirror/a.jpg": ("id-a", None, None, None)})

    assert result.exact_copies == (0, 1)
    assert not result.passed


def test_merges_that_go_round_in_circles_end():
    result = _score(
        **{
            "copies/a-flip.jpg": ("id-a-flip", "near_duplicate", "dedup", "id-a-grey"),
            "copies/a-grey.jpg": ("id-a-grey", "near_duplicate", "dedup", "id-a-flip"),
            "photos/a.jpg": ("id-a", "near_duplicate", "dedup", "id-a-grey"),
            "mirror/a.jpg": ("id-a", None, None, None),
        }
    )

    assert result.exact_copies == (0, 1)


@pytest.mark.parametrize("other", ["id-a", "id-seed", "id-reference", "id-of-nothing"])
def test_a_photo_merged_with_another_photo_is_wrong(other):
    result = _score(**{"photos/b.jpg": ("id-b", "near_duplicate", "dedup", other)})

    assert len(result.wrong_merges) == 1
    assert result.wrong_merges[0].startswith("www/photos/b.jpg with ")
    assert not result.passed


@pytest.mark.parametrize("path", ["broken/empty.jpg", "gone/0.jpg"])
def test_a_worthless_file_without_a_reason_is_named(path):
    result = _score(**{path: ("id", None, None, None)})

    assert result.broken_kept == ("www/" + path,)
    assert not result.passed


@pytest.mark.parametrize("row", [("id-private", None, None, None), ("id-private", "nsfw", "nsfw", None)])
def test_an_image_fetched_against_robots_txt_is_named(row):
    result = _score(**{"private/0.jpg": row})

    assert result.robots_fetched == ("www/private/0.jpg",)
    assert not result.passed


@pytest.mark.parametrize(
    ("path", "field"), [("reposts/reference.jpg", "reference_copies_kept"), ("reposts/seed.jpg", "seed_copies_kept")]
)
def test_a_kept_copy_of_a_reference_or_seed_is_named(path, field):
    result = _score(**{path: ("id", None, None, None)})

    assert getattr(result, field) == ("www/" + path,)
    assert not result.passed


def test_a_link_that_was_not_crawled_is_named():
    result = _score(**{"photos/b.jpg": None})

    assert result.not_crawled == ("www/photos/b.jpg",)
    assert not result.passed


def test_the_small_choice_of_a_srcset_need_not_be_crawled():
    result = _score(**{"small/b.jpg": None})

    assert result.passed
    assert "resize_50" not in result.by_edit


def test_a_row_that_no_page_links_is_named():
    result = _score(**{"photos/nobody.jpg": ("id", None, None, None)})

    assert result.unknown == (f"{BASE}/photos/nobody.jpg",)


def test_the_lines_tell_what_was_found_and_missed():
    text = "\n".join(_score(**{"copies/a-flip.jpg": ("id-a-flip", None, None, None)}).lines())

    assert "planted copies found: 2 of 3 (66.7%)" in text
    assert "flip 0/1" in text
    assert "missed: 1: www/copies/a-flip.jpg" in text
    assert "wrong merges: 0" in text


def test_an_empty_run_finds_nothing_and_does_not_pass():
    empty = pa.table({name: pa.array([], pa.string()) for name in COLUMNS})

    result = score(TRUTH, BASE, empty)

    assert (result.planted, result.recall, result.passed) == (0, 0.0, False)
