import numpy as np
import pytest

from curation.stages.pca_hash_groups import PcaHashGroups


@pytest.fixture(scope="session")
def crowd(image):
    """2,000 rows of 400 images with 150 hashes, some of them rejected or without a hash."""
    random = np.random.default_rng(1)
    rows = []
    for number in range(2000):
        copy = int(random.integers(400))
        rows.append(
            image(
                copy,
                url=f"http://example.org/{number}",
                width=10 + copy % 7,
                num_bytes=copy % 5,
                pca_hash=None if copy % 10 == 0 else copy % 150,
                kept=bool(random.random() < 0.9),
            )
        )
    return rows


def test_verdicts_do_not_depend_on_shards_order_or_buckets(crowd, in_memory, reduce, sharding):
    expected = reduce(PcaHashGroups(), in_memory({"pool": crowd, "seeds/some": crowd[:300]}))

    for rows_a_bucket in (500_000, 20):
        inputs = in_memory({"pool": crowd, "seeds/some": crowd[:300]}, **sharding)
        assert reduce(PcaHashGroups(rows_a_bucket), inputs) == expected


def test_rows_go_to_several_buckets_when_there_are_many(crowd, in_memory, reduce):
    reduce(PcaHashGroups(rows_a_bucket=100), in_memory({"pool": crowd}))

    assert len(list((reduce.scratch / "0" / "rows").glob("*.arrow"))) == 20


def test_every_group_keeps_exactly_one_and_names_it(crowd, in_memory, reduce):
    verdicts = reduce(PcaHashGroups(), in_memory({"pool": crowd}, num_shards=3))["pool"]
    rows = {row["url"]: row for row in crowd if row["kept"]}

    kept = {rows[url]["image_id"]: url for url in rows if verdicts[url]["reject_reason"] is None}
    hashes = [rows[url]["pca_hash"] for url in kept.values() if rows[url]["pca_hash"] is not None]
    assert len(set(hashes)) == len(hashes)
    assert len(kept) == sum(verdicts[url]["reject_reason"] is None for url in rows)
    for url, row in rows.items():
        verdict = verdicts[url]
        if verdict["reject_reason"] is not None:
            stays = rows[kept[verdict["duplicate_of"]]]
            assert verdict["urls"] is None
            assert stays["image_id"] == row["image_id"] or stays["pca_hash"] == row["pca_hash"] is not None
        else:
            assert verdict["urls"] == sorted(u for u in rows if rows[u]["image_id"] == row["image_id"])


def test_exact_duplicates_keep_the_smallest_url_and_list_all(image, in_memory, reduce):
    rows = [image(7, url=url, pca_hash=5) for url in ("http://b/", "http://a/", "http://c/")]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}))["pool"]

    assert verdicts["http://a/"]["urls"] == ["http://a/", "http://b/", "http://c/"]
    for url in ("http://b/", "http://c/"):
        assert verdicts[url] == {"reject_reason": "exact_duplicate", "duplicate_of": rows[0]["image_id"], "urls": None}


@pytest.mark.parametrize(
    ("best", "other"),
    [
        ({"width": 101, "num_bytes": 1}, {"num_bytes": 9999}),
        ({"num_bytes": 1001}, {"num_bytes": 1000}),
        ({}, {}),
    ],
    ids=["area", "bytes", "id"],
)
def test_hash_duplicates_keep_the_largest_area_then_bytes_then_smallest_id(best, other, image, in_memory, reduce):
    # In the first two cases the better image has the larger id.
    ids = (2, 1) if best else (1, 2)
    rows = [image(ids[0], pca_hash=2**64 - 1) | best, image(ids[1], pca_hash=2**64 - 1) | other]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}, shuffled=0))["pool"]

    assert verdicts[rows[0]["url"]]["reject_reason"] is None
    lost = {"reject_reason": "hash_duplicate", "duplicate_of": rows[0]["image_id"], "urls": None}
    assert verdicts[rows[1]["url"]] == lost


def test_area_does_not_overflow_32_bits(image, in_memory, reduce):
    rows = [image(1, width=50_000, height=50_000, pca_hash=1), image(2, width=2, height=2, pca_hash=1)]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}))["pool"]

    assert verdicts[rows[0]["url"]]["reject_reason"] is None


def test_a_copy_of_a_hash_duplicate_points_to_what_is_kept(image, in_memory, reduce):
    rows = [image(1, width=200, pca_hash=3), image(2, pca_hash=3), image(2, url="http://z/", pca_hash=3)]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}))["pool"]

    assert verdicts["http://z/"]["reject_reason"] == "exact_duplicate"
    assert verdicts["http://z/"]["duplicate_of"] == rows[0]["image_id"]


def test_rejected_rows_and_rows_without_bytes_take_no_part(image, in_memory, reduce):
    rows = [
        image(1, url="http://a/", pca_hash=3, width=500, kept=False),
        image(1, url="http://b/", pca_hash=3),
        image(2, pca_hash=3, width=500, kept=False),
        {"url": "http://failed/"},
    ]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}))["pool"]

    assert verdicts.pop("http://b/") == {"reject_reason": None, "duplicate_of": None, "urls": ["http://b/"]}
    assert {tuple(verdict.values()) for verdict in verdicts.values()} == {(None, None, None)}


def test_images_without_a_hash_are_only_exact_duplicates(image, in_memory, reduce):
    rows = [image(1), image(2), image(2, url="http://z/"), image(3, pca_hash=0)]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}))["pool"]

    assert [verdicts[row["url"]]["reject_reason"] for row in rows] == [None, None, "exact_duplicate", None]


def test_seeds_are_grouped_by_bytes_alone_and_each_set_by_itself(image, in_memory, reduce):
    rows = [image(1, pca_hash=3), image(2, pca_hash=3), image(2, url="http://z/", pca_hash=3)]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": [], "seeds/a": rows, "seeds/b": rows[:2]}))

    assert [verdicts["seeds/a"][row["url"]]["reject_reason"] for row in rows] == [None, None, "exact_duplicate"]
    assert [verdicts["seeds/b"][row["url"]]["reject_reason"] for row in rows[:2]] == [None, None]


def test_an_empty_pool_gives_empty_tables(in_memory, reduce):
    assert reduce(PcaHashGroups(), in_memory({"pool": []}, num_shards=2)) == {"pool": {}}


def test_thirty_thousand_urls_of_one_image_are_one_list(image, in_memory, reduce):
    rows = [image(1, url=f"http://example.org/{number:06d}", pca_hash=1) for number in range(30_000)]

    verdicts = reduce(PcaHashGroups(), in_memory({"pool": rows}, num_shards=7, shuffled=1))["pool"]

    assert verdicts[rows[0]["url"]]["urls"] == [row["url"] for row in rows]


@pytest.fixture(scope="session")
def chains(image):
    """600 images whose hashes are 40 random ones with up to 3 bits changed, one after the other."""
    random = np.random.default_rng(3)
    hashes = random.integers(0, 2**64, 40, dtype=np.uint64).tolist()
    rows = []
    for number in range(600):
        bits = hashes[number % 40]
        for _ in range(int(random.integers(4))):
            bits ^= 1 << int(random.integers(64))
        hashes[number % 40] = bits
        rows.append(image(number, width=int(random.integers(10, 20)), pca_hash=bits, kept=bool(random.random() < 0.95)))
    return rows


def obvious_components(rows, radius):
    """Names of images by component, the slow way."""
    groups = []
    for row in rows:
        near = [
            group for group in groups if any((row["pca_hash"] ^ x["pca_hash"]).bit_count() <= radius for x in group)
        ]
        groups = [group for group in groups if group not in near] + [[row, *(x for group in near for x in group)]]
    return groups


@pytest.mark.parametrize("radius", [0, 1, 2, 8])
def test_a_component_of_near_hashes_keeps_its_best_image(radius, chains, in_memory, reduce):
    verdicts = reduce(PcaHashGroups(hamming_radius=radius), in_memory({"pool": chains}, num_shards=2))["pool"]

    for group in obvious_components([row for row in chains if row["kept"]], radius):
        best, *others = sorted(group, key=lambda row: (-row["width"], row["image_id"]))
        assert verdicts[best["url"]]["reject_reason"] is None
        for row in others:
            verdict = verdicts[row["url"]]
            assert (verdict["reject_reason"], verdict["duplicate_of"]) == ("hash_duplicate", best["image_id"])


def test_near_hashes_are_grouped_alike_in_any_shards_and_buckets(chains, in_memory, reduce, sharding):
    expected = reduce(PcaHashGroups(hamming_radius=2), in_memory({"pool": chains, "seeds/some": chains[:50]}))

    inputs = in_memory({"pool": chains, "seeds/some": chains[:50]}, **sharding)
    assert reduce(PcaHashGroups(20, hamming_radius=2), inputs) == expected
    eight = in_memory({"pool": chains, "seeds/some": chains[:50]}, num_shards=8)
    assert reduce(PcaHashGroups(hamming_radius=2), eight) == expected
