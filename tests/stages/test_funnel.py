import pyarrow as pa
import pytest

from curation.stages.funnel import Funnel


def reasons(*values):
    return pa.array(values, pa.string())


def test_a_row_is_counted_by_the_first_verdict_that_rejects_it_and_counts_add_up():
    funnel = Funnel(["crawl", "fetch", "nsfw"])

    funnel.add(4, [("fetch", reasons("dns", None, None, "dns")), ("nsfw", reasons("nsfw", "nsfw", None, None))])

    assert funnel.rows() == [
        {"stage": "crawl", "in": 4, "out": 4, "rejected": {}},
        {"stage": "fetch", "in": 4, "out": 2, "rejected": {"dns": 2}},
        {"stage": "nsfw", "in": 2, "out": 1, "rejected": {"nsfw": 1}},
    ]


def test_reasons_come_by_count_and_then_by_name():
    funnel = Funnel(["fetch"])

    funnel.add(6, [("fetch", reasons("b", "c", "a", "c", None, "b"))])

    assert list(funnel.rows()[0]["rejected"].items()) == [("b", 2), ("c", 2), ("a", 1)]


def test_shards_add_up_in_any_order_and_chunking():
    parts = [reasons("a", None), reasons(), reasons("b", "a", None)]
    one, many = Funnel(["fetch"]), Funnel(["fetch"])

    one.add(5, [("fetch", pa.chunked_array(parts))])
    for part in reversed(parts):
        many.add(len(part), [("fetch", part)])

    assert one.rows() == many.rows()


def test_two_verdicts_of_one_stage_are_one_entry():
    funnel = Funnel(["pixels", "pixels"])

    funnel.add(2, [("pixels", reasons("nsfw", None)), ("pixels", reasons("faces", "faces"))])

    assert funnel.rows() == [{"stage": "pixels", "in": 2, "out": 0, "rejected": {"faces": 1, "nsfw": 1}}]


def test_a_verdict_of_another_length_is_no_silent_miscount():
    with pytest.raises(ValueError, match="broadcast"):
        Funnel(["fetch"]).add(3, [("fetch", reasons("a", "b"))])


def test_no_rows_are_no_rows():
    assert Funnel(["crawl"]).rows() == [{"stage": "crawl", "in": 0, "out": 0, "rejected": {}}]
