import logging

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.config import RunConfig
from curation.config.dedup import DedupConfig
from curation.config.inputs import InputConfig, SeedConfig
from curation.errors import DimensionError, StageError, VectorError
from curation.indexes.pairs import InvertedPairs
from curation.stages.dedup import AUDIT, AUDIT_FILE, DedupStage

KEPT = None
EDGES = (("all", 1000), ("forests", 1))
FREE = {"max_dropped_fraction": 1.0, "edge_floor": 0.01, "reference_floor": 0.01}


def stage(as_is=(), retrieval_only=(), **settings):
    inputs = (InputConfig(kind="folder", path="unused"),)
    seeds = {name: SeedConfig(inputs=inputs, as_is=name in as_is) for name in (*as_is, *retrieval_only)}
    return DedupStage(RunConfig(seeds=seeds, dedup=DedupConfig(**(FREE | settings))))


@pytest.fixture(scope="session")
def at(unit):
    """``at(cosine, axis, of)``: a unit vector with about that cosine with axis ``of``, otherwise along ``axis``."""

    def make(cosine, axis, of=0):
        values = np.zeros(8)
        values[of], values[axis] = cosine, np.sqrt(1 - cosine**2)
        return unit(*values)

    return make


def reasons(verdicts, rows):
    return [verdicts[row["url"]]["reject_reason"] for row in rows]


def audit_of(reduce):
    table = pq.read_table(reduce.scratch / AUDIT_FILE)
    assert table.schema.equals(AUDIT)
    return table.to_pylist()


@pytest.fixture(scope="session")
def world(image):
    """400 pool images in clumps, two seed sets and two reference sets near some of them; some rows are rejected."""
    random = np.random.default_rng(5)
    centres = random.normal(size=(90, 8))

    def rows(first, count, among):
        made = []
        for number in range(first, first + count):
            vector = centres[random.integers(among)] + 0.3 * random.normal(size=8)
            vector = (vector / np.linalg.norm(vector)).astype(np.float16)
            sizes = {"width": int(random.integers(1, 4)), "num_bytes": int(random.integers(1, 4))}
            missing = random.random() < 0.05
            made.append(image(number, sscd=None if missing else vector, kept=bool(random.random() < 0.9), **sizes))
        return made

    references = rows(1000, 8, 90)
    return {
        "pool": rows(0, 400, 90),
        "seeds/a": [*rows(500, 30, 90), image(600, sscd=references[0]["sscd"])],
        "seeds/b": rows(700, 30, 90),
        "references/x": references,
        "references/y": [*rows(1100, 5, 90), image(1100, sscd=references[1]["sscd"])],
    }


def test_verdicts_and_audit_do_not_depend_on_shards_or_order(world, in_memory, reduce, sharding):
    dedup = stage(as_is=["a"], retrieval_only=["b"], threshold=0.9, reference_threshold=0.85)
    expected = reduce(dedup, in_memory(world))
    audit = sorted(audit_of(reduce), key=lambda row: (row["collection"], row["image_id"]))
    found = {verdict["reject_reason"] for rows in expected.values() for verdict in rows.values()}
    assert found == {None, "near_duplicate", "reference_copy", "seed_copy"}  # or the test shows little

    assert reduce(dedup, in_memory(world, **sharding)) == expected
    assert sorted(audit_of(reduce), key=lambda row: (row["collection"], row["image_id"])) == audit


def test_verdicts_are_those_of_plain_loops(world, in_memory, reduce, cosine):
    verdicts = reduce(stage(as_is=["a"], threshold=0.9, reference_threshold=0.85), in_memory(world))["pool"]
    pool, x, y = (
        [row for row in world[name] if row.get("kept", True) and row["sscd"] is not None]
        for name in ("pool", "references/x", "references/y")
    )
    references = [*x, *y]
    components = [{row["url"]} for row in pool]
    for left in pool:
        for right in pool:
            if left["url"] < right["url"] and cosine(left["sscd"], right["sscd"]) > 0.9:
                one = next(part for part in components if left["url"] in part)
                other = next(part for part in components if right["url"] in part)
                if one is not other:
                    components.remove(other)
                    one |= other
    rows = {row["url"]: row for row in pool}
    for component in components:
        members = [rows[url] for url in sorted(component)]
        dropped = any(cosine(row["sscd"], reference["sscd"]) > 0.85 for row in members for reference in references)
        best = min(members, key=lambda row: (-row["width"], -row["num_bytes"], row["image_id"]))
        for row in members:
            verdict = verdicts[row["url"]]
            assert verdict["component_id"] == min(member["image_id"] for member in members)
            assert verdict["component_size"] == len(members)
            assert (verdict["reject_reason"] == "reference_copy") == dropped
            if verdict["reject_reason"] == "near_duplicate":
                assert row is not best
                assert verdict["duplicate_of"] == best["image_id"]
                assert verdict["similarity"] == np.float32(cosine(row["sscd"], best["sscd"]))
            elif verdict["reject_reason"] is None:
                assert row is best
    assert len(components) < len(pool) - 50  # there is something to merge


def test_a_pair_at_the_threshold_is_no_copy_and_one_above_is(image, at, unit, cosine, in_memory, reduce):
    rows = [image(0, sscd=unit(1)), image(1, sscd=at(0.7, 1))]
    exact = cosine(rows[0]["sscd"], rows[1]["sscd"])

    apart = reduce(stage(threshold=exact), in_memory({"pool": rows}))["pool"]
    together = reduce(stage(threshold=exact - 1e-6), in_memory({"pool": rows}))["pool"]

    assert reasons(apart, rows) == [KEPT, KEPT]
    assert [apart[row["url"]]["component_size"] for row in rows] == [1, 1]
    assert reasons(together, rows) == [KEPT, "near_duplicate"]
    assert together[rows[1]["url"]]["similarity"] == np.float32(exact)
    assert together[rows[0]["url"]]["similarity"] is None
    assert together[rows[0]["url"]]["duplicate_of"] is None


def test_a_reference_at_the_threshold_is_not_copied_and_one_above_is(image, at, unit, cosine, in_memory, reduce):
    rows, reference = [image(0, sscd=unit(1))], image(9, sscd=at(0.5, 1))
    exact = cosine(rows[0]["sscd"], reference["sscd"])
    inputs = in_memory({"pool": rows, "references/x": [reference]})

    assert reasons(reduce(stage(reference_threshold=exact), inputs)["pool"], rows) == [KEPT]
    assert reasons(reduce(stage(reference_threshold=exact - 1e-6), inputs)["pool"], rows) == ["reference_copy"]


def test_a_chain_is_one_component_and_its_end_may_be_far_from_the_representative(
    image, unit, cosine, in_memory, reduce
):
    angles = np.deg2rad([0, 40, 80, 120])  # neighbours at 0.77, others at 0.17 and less
    rows = [image(n, sscd=unit(np.cos(a), np.sin(a)), width=100 - n) for n, a in enumerate(angles)]

    verdicts = reduce(stage(), in_memory({"pool": rows}, num_shards=4))["pool"]

    assert reasons(verdicts, rows) == [KEPT, *["near_duplicate"] * 3]
    for row in rows:
        assert verdicts[row["url"]]["component_id"] == rows[0]["image_id"]
        assert verdicts[row["url"]]["component_size"] == 4
    end = verdicts[rows[3]["url"]]
    assert end["duplicate_of"] == rows[0]["image_id"]
    assert end["similarity"] == np.float32(cosine(rows[0]["sscd"], rows[3]["sscd"])) < 0


@pytest.mark.parametrize(
    ("sizes", "best"),
    [
        ([(10, 10, 9), (20, 6, 1), (11, 10, 9)], 1),
        ([(10, 10, 5), (20, 5, 7), (5, 20, 6)], 1),
        ([(10, 10, 5), (20, 5, 5), (5, 20, 5)], 0),
        ([(1, 1, 1), (50_000, 50_000, 1), (46_340, 46_340, 9)], 1),
    ],
    ids=["area", "bytes", "id", "no overflow"],
)
def test_the_representative_has_the_largest_area_then_bytes_then_the_smallest_id(
    sizes, best, image, unit, in_memory, reduce, sharding
):
    rows = [
        image(number, sscd=unit(1), width=width, height=height, num_bytes=num_bytes)
        for number, (width, height, num_bytes) in enumerate(sizes)
    ]

    verdicts = reduce(stage(), in_memory({"pool": rows}, **sharding))["pool"]

    assert [verdicts[row["url"]]["reject_reason"] is None for row in rows] == [n == best for n in range(3)]
    assert {verdicts[row["url"]]["component_id"] for row in rows} == {rows[0]["image_id"]}


@pytest.mark.parametrize("copying", [0, 1, 2])
def test_a_component_is_dropped_whole_when_any_member_copies_a_reference(
    copying, image, at, unit, cosine, in_memory, reduce
):
    # Three members that meet each other at 0.64 along axis 0; one of them leans towards the reference on its own axis.
    rows = [image(n, sscd=at(0.8, n + 1), width=100 - n) for n in range(3)]
    alone = image(3, sscd=unit(0, 0, 0, 0, 0, 1))
    reference = image(9, sscd=at(0.6, 7, of=copying + 1))
    assert cosine(rows[copying]["sscd"], reference["sscd"]) < 0.45  # so it takes a lower threshold
    dedup = stage(reference_threshold=0.3)

    verdicts = reduce(dedup, in_memory({"pool": [*rows, alone], "references/x": [reference]}, shuffled=3))["pool"]

    assert reasons(verdicts, [*rows, alone]) == [*["reference_copy"] * 3, KEPT]
    for row in rows:
        assert verdicts[row["url"]]["duplicate_of"] == reference["image_id"]
        assert verdicts[row["url"]]["similarity"] == np.float32(cosine(row["sscd"], reference["sscd"]))
    audit = audit_of(reduce)
    assert {row["image_id"] for row in audit} == {row["image_id"] for row in rows}
    for row in audit:
        assert (row["collection"], row["copy_of_collection"]) == ("pool", "references/x")
        assert (row["copy_of"], row["decision"]) == (reference["image_id"], "reference_copy")
        assert (row["component_id"], row["component_size"]) == (rows[0]["image_id"], 3)
        verdict = next(verdicts[one["url"]] for one in rows if one["image_id"] == row["image_id"])
        assert row["similarity"] == verdict["similarity"]


def test_what_a_component_copies_most_closely_is_named_and_ties_go_to_the_smaller_id(
    image, at, unit, in_memory, reduce
):
    rows = [image(0, sscd=unit(1)), image(1, sscd=at(0.9, 1))]
    references = [image(n, sscd=at(c, 2)) for n, c in ((7, 0.8), (6, 0.8), (5, 0.7))]

    verdicts = reduce(stage(), in_memory({"pool": rows, "references/x": references}))["pool"]

    assert {verdicts[row["url"]]["duplicate_of"] for row in rows} == {references[1]["image_id"]}


def test_an_as_is_seed_rejects_its_copies_and_a_seed_for_retrieval_does_not(image, at, unit, in_memory, reduce):
    rows = [
        image(0, sscd=unit(1)),
        image(1, sscd=at(0.7, 1)),
        image(2, sscd=unit(0, 0, 1)),
        image(3, sscd=at(0.7, 3, 2)),
    ]
    seeds = {"seeds/a": [image(8, sscd=unit(1))], "seeds/b": [image(9, sscd=unit(0, 0, 1))]}

    found = reduce(stage(as_is=["a"], retrieval_only=["b"]), in_memory({"pool": rows} | seeds))

    assert reasons(found["pool"], rows) == ["seed_copy", "seed_copy", KEPT, "near_duplicate"]
    assert found["pool"][rows[0]["url"]]["duplicate_of"] == seeds["seeds/a"][0]["image_id"]
    nothing = dict.fromkeys(("reject_reason", "duplicate_of", "similarity", "component_id", "component_size"))
    assert [list(found[name].values()) for name in seeds] == [[nothing], [nothing]]
    assert [(row["decision"], row["copy_of_collection"]) for row in audit_of(reduce)] == [("seed_copy", "seeds/a")] * 2


def test_a_seed_is_copied_above_the_pools_threshold_not_the_references(image, at, unit, in_memory, reduce):
    rows = [image(0, sscd=unit(1))]

    found = reduce(stage(as_is=["a"]), in_memory({"pool": rows, "seeds/a": [image(8, sscd=at(0.55, 1))]}))

    assert reasons(found["pool"], rows) == [KEPT]


def test_a_seed_that_copies_a_reference_is_rejected_and_protects_nothing(image, at, unit, in_memory, reduce):
    # The pool image is 0.66 from the seed, 0.2 from the reference; the seed is 0.7 from the reference.
    seed, reference = image(8, sscd=unit(1)), image(9, sscd=at(0.7, 1))
    pool = [image(0, sscd=unit(0.66, -0.36, np.sqrt(1 - 0.66**2 - 0.36**2)))]
    inputs = {"pool": pool, "seeds/a": [seed]}

    with_reference = reduce(stage(as_is=["a"]), in_memory(inputs | {"references/x": [reference]}))
    audit = audit_of(reduce)
    without = reduce(stage(as_is=["a"]), in_memory(inputs))

    assert reasons(with_reference["seeds/a"], [seed]) == ["reference_copy"]
    assert reasons(with_reference["pool"], pool) == [KEPT]
    assert reasons(without["pool"], pool) == ["seed_copy"]
    (row,) = audit
    assert (row["image_id"], row["collection"], row["decision"]) == (seed["image_id"], "seeds/a", "reference_copy")
    assert (row["copy_of"], row["component_id"], row["component_size"]) == (reference["image_id"], None, None)


def test_what_copies_a_reference_and_a_seed_is_a_reference_copy_once_in_the_audit(image, at, unit, in_memory, reduce):
    pool = [image(0, sscd=unit(1))]
    seed, reference = image(8, sscd=at(0.75, 1)), image(9, sscd=at(0.6, 2))  # 0.45 between them, to the last digit less

    found = reduce(
        stage(as_is=["a"], reference_threshold=0.46),
        in_memory({"pool": pool, "seeds/a": [seed], "references/x": [reference]}),
    )

    assert reasons(found["seeds/a"], [seed]) == [KEPT]
    assert reasons(found["pool"], pool) == ["reference_copy"]
    assert [(row["decision"], row["copy_of"]) for row in audit_of(reduce)] == [
        ("reference_copy", reference["image_id"])
    ]


def test_rejected_images_seeds_and_references_take_no_part(image, unit, in_memory, reduce):
    pool = [image(0, sscd=unit(1)), image(1, sscd=unit(1), width=999, kept=False)]
    gone = {"seeds/a": [image(8, sscd=unit(1), kept=False)], "references/x": [image(9, sscd=unit(1), kept=False)]}

    verdicts = reduce(stage(as_is=["a"]), in_memory({"pool": pool} | gone))["pool"]

    assert verdicts[pool[0]["url"]]["component_size"] == 1
    assert reasons(verdicts, pool) == [KEPT, KEPT]  # the second one has its reason in an earlier verdict
    assert verdicts[pool[1]["url"]]["component_id"] is None


@pytest.mark.parametrize(("fraction", "stops"), [(0.49, True), (0.5, False)])
def test_too_many_dropped_stops_before_anything_is_yielded_and_leaves_the_audit(
    fraction, stops, image, unit, in_memory, reduce, tmp_path
):
    rows = [image(n, sscd=unit(*np.eye(8)[n])) for n in range(4)]
    references = [image(90 + n, sscd=unit(*np.eye(8)[n])) for n in range(2)]
    inputs = in_memory({"pool": rows, "seeds/a": [], "references/x": references})
    dedup = stage(max_dropped_fraction=fraction)

    if not stops:
        assert reasons(reduce(dedup, inputs)["pool"], rows).count("reference_copy") == 2
        return
    with pytest.raises(StageError, match="dedup: references and seeds would drop 2 of 4 pool images") as stopped:
        next(dedup(inputs, tmp_path))
    assert "dedup.max_dropped_fraction 49%" in str(stopped.value)
    assert pq.read_table(tmp_path / AUDIT_FILE).num_rows == 2


def test_seeds_that_would_empty_the_pool_stop_too(image, unit, in_memory, tmp_path):
    rows = [image(n, sscd=unit(1, 0.01 * n)) for n in range(6)]
    inputs = in_memory({"pool": rows, "seeds/a": [image(90, sscd=unit(1))]})

    with pytest.raises(StageError, match="references and seeds would drop 6 of 6 pool images"):
        next(stage(as_is=["a"], max_dropped_fraction=0.5)(inputs, tmp_path))


def test_a_kept_row_without_a_descriptor_stays_ungrouped(image, unit, in_memory, reduce):
    rows = [image(0), image(1), image(2, sscd=unit(1))]

    verdicts = reduce(stage(), in_memory({"pool": rows, "references/x": [image(9)]}))["pool"]

    assert reasons(verdicts, rows) == [KEPT] * 3
    assert [verdicts[row["url"]]["component_size"] for row in rows] == [None, None, 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_broken_descriptor_counts_as_none_and_is_logged(value, image, unit, in_memory, reduce, caplog):
    broken = np.full(8, value, np.float16)
    rows = [image(0, sscd=broken), image(1, sscd=broken), image(2, sscd=unit(1))]

    with caplog.at_level(logging.WARNING):
        found = reduce(stage(), in_memory({"pool": rows, "references/x": [image(9, sscd=broken)]}))

    assert reasons(found["pool"], rows) == [KEPT] * 3
    assert "sscd: 2 vectors are not finite or all zeros" in caplog.text
    assert "sscd: 1 vectors are not finite or all zeros" in caplog.text


def test_a_descriptor_that_is_not_normalised_is_an_error(image, unit, in_memory, tmp_path):
    inputs = in_memory({"pool": [image(0, sscd=unit(1) / 2)]})

    with pytest.raises(VectorError, match=r"norm 0\.5"):
        list(stage()(inputs, tmp_path))


def test_references_of_another_dimension_are_an_error(image, unit, in_memory, tmp_path):
    inputs = in_memory({"pool": [image(0, sscd=unit(1))], "references/x": [image(9, sscd=unit(*np.ones(16)))]})

    with pytest.raises(DimensionError):
        list(stage()(inputs, tmp_path))


@pytest.mark.parametrize("empty", ["pool", "seeds/a", "references/x", "all"])
def test_empty_collections_are_no_special_case(empty, image, unit, in_memory, reduce):
    collections = {
        "pool": [image(n, sscd=unit(*np.eye(8)[n])) for n in range(5)],
        "seeds/a": [image(8, sscd=unit(1))],
        "references/x": [image(9, sscd=unit(0, 1))],
    }
    collections = {name: [] if empty in (name, "all") else rows for name, rows in collections.items()}

    found = reduce(stage(as_is=["a"]), in_memory(collections, num_shards=2))

    expected = [None if empty == "seeds/a" else "seed_copy", None if empty == "references/x" else "reference_copy"]
    if collections["pool"]:
        assert reasons(found["pool"], collections["pool"]) == [*expected, None, None, None]
    assert len(audit_of(reduce)) == (sum(reason is not None for reason in expected) if collections["pool"] else 0)


def test_neither_seeds_nor_references_are_needed(image, unit, in_memory, reduce):
    rows = [image(n, sscd=unit(1)) for n in range(2)]

    assert reasons(reduce(stage(), in_memory({"pool": rows}))["pool"], rows) == [KEPT, "near_duplicate"]


def test_shards_without_kept_rows_have_their_tables(image, unit, in_memory, reduce):
    rows = [image(n, sscd=unit(1), kept=n > 5) for n in range(8)]

    found = reduce(stage(), in_memory({"pool": rows}, num_shards=4))["pool"]

    assert reasons(found, rows) == [None] * 7 + ["near_duplicate"]


def test_five_thousand_identical_images_are_one_component(image, unit, in_memory, reduce):
    rows = [image(n, sscd=unit(*np.ones(64))) for n in range(5000)]
    inputs = in_memory({"pool": rows}, num_shards=7, shuffled=1)

    verdicts = reduce(stage(), inputs)["pool"]

    assert [url for url, verdict in verdicts.items() if verdict["reject_reason"] is None] == [rows[0]["url"]]
    assert {verdict["component_size"] for verdict in verdicts.values()} == {5000}


def test_a_block_with_too_many_pairs_keeps_a_forest_that_has_the_same_components(world, in_memory, reduce):
    inputs = {name: in_memory(world, 5, 3, settings=DedupConfig(**FREE, max_edges_per_row=n)) for name, n in EDGES}

    found = {name: [batch.num_rows for batch in made.pairs("dedup_edges", "pool", "pool")]
             for name, made in inputs.items()}  # fmt: skip

    assert sum(found["forests"]) < sum(found["all"]) / 10
    for threshold in (0.3, 0.7, 0.9, 0.97):
        dedup = stage(as_is=["a"], retrieval_only=["b"], threshold=threshold)
        assert reduce(dedup, inputs["forests"]) == reduce(dedup, inputs["all"])


def test_only_neighbours_are_dropped_and_another_member_represents_the_rest(image, at, unit, in_memory, reduce):
    rows = [image(0, sscd=unit(1), width=300), image(1, sscd=at(0.8, 1)), image(2, sscd=at(0.8, 2), width=200)]
    reference = image(9, sscd=at(0.5, 3))
    inputs = in_memory({"pool": rows, "references/x": [reference]})

    whole = reduce(stage(), inputs)["pool"]
    matches = {row["image_id"]: row["match"] for row in audit_of(reduce)}
    verdicts = reduce(stage(decontaminate="neighbours"), inputs)["pool"]

    assert reasons(whole, rows) == ["reference_copy"] * 3
    assert matches == {row["image_id"]: "component" if row is not rows[0] else "direct" for row in rows}
    assert reasons(verdicts, rows) == ["reference_copy", "near_duplicate", KEPT]
    assert verdicts[rows[1]["url"]]["duplicate_of"] == rows[2]["image_id"]
    assert [verdicts[row["url"]]["component_size"] for row in rows] == [3, 3, 3]
    assert [row["image_id"] for row in audit_of(reduce)] == [rows[0]["image_id"]]


def test_the_audit_names_both_images_and_where_they_are(image, at, unit, in_memory, reduce):
    rows = [image(0, sscd=unit(1)), image(1, sscd=at(0.7, 1))]
    references = {
        "references/test": [image(8, sscd=at(0.9, 2), url="file:///test.parquet#3")],
        "references/train": [image(9, sscd=at(0.6, 3), url="file:///train.parquet#7")],
    }

    reduce(stage(), in_memory({"pool": rows} | references))

    first, second = audit_of(reduce)
    assert (first["url"], first["match"]) == (rows[0]["url"], "direct")
    assert (first["copy_of_collection"], first["copy_of_url"]) == ("references/test", "file:///test.parquet#3")
    assert (second["url"], second["match"]) == (rows[1]["url"], "direct")  # 0.63 from the first
    assert (second["copy_of"], second["component_size"]) == (references["references/test"][0]["image_id"], 2)


def test_a_chain_is_split_into_stars_around_representatives(image, unit, cosine, in_memory, reduce, sharding):
    angles = np.deg2rad([0, 40, 80, 120, 160])  # neighbours at 0.77, others at 0.17 and less
    rows = [image(n, sscd=unit(np.cos(a), np.sin(a)), width=100 - n) for n, a in enumerate(angles)]
    alone = [image(9, sscd=unit(0, 0, 1)), image(10, sscd=unit(0, 0, 1, 0.3))]
    inputs = in_memory({"pool": [*rows, *alone]}, **sharding)

    verdicts = reduce(stage(min_similarity_to_representative=0.7), inputs)["pool"]

    assert reasons(verdicts, rows) == [KEPT, "near_duplicate", KEPT, "near_duplicate", KEPT]
    assert [verdicts[row["url"]]["component_id"] for row in rows] == [
        rows[number]["image_id"] for number in (0, 0, 2, 2, 4)
    ]
    assert [verdicts[row["url"]]["component_size"] for row in rows] == [2, 2, 2, 2, 1]
    assert reasons(verdicts, alone) == [KEPT, "near_duplicate"]  # a component that is no chain stays as it is
    for verdict in verdicts.values():
        assert verdict["similarity"] is None or verdict["similarity"] >= 0.7


def test_members_of_stars_are_close_to_who_represents_them(world, in_memory, reduce, cosine, sharding):
    dedup = stage(threshold=0.8, min_similarity_to_representative=0.85)
    pool = {"pool": world["pool"]}

    verdicts = reduce(dedup, in_memory(pool))["pool"]

    assert reduce(dedup, in_memory(pool, **sharding))["pool"] == verdicts
    chained = reduce(stage(threshold=0.8), in_memory(pool))["pool"]
    copies = [verdict for verdict in verdicts.values() if verdict["reject_reason"] == "near_duplicate"]
    assert all(verdict["similarity"] >= np.float32(0.85) for verdict in copies)
    assert len(copies) < sum(verdict["reject_reason"] == "near_duplicate" for verdict in chained.values())


@pytest.mark.parametrize("floor", ["edge_floor", "reference_floor"])
def test_a_threshold_below_what_was_searched_is_refused(floor):
    threshold = {"edge_floor": "threshold", "reference_floor": "reference_threshold"}[floor]

    with pytest.raises(ValueError, match=f"{threshold} 0.3 is below {floor} 0.35"):
        DedupConfig(**{threshold: 0.3, floor: 0.35})


def fitted(world):
    vectors = np.stack([row["sscd"] for row in world["pool"] if row["sscd"] is not None])
    return InvertedPairs.fit(vectors, len(vectors), (0.85, 0.8), 0.99, 3, 1)


def test_an_approximate_search_gives_the_same_components_in_any_shards(world, in_memory, reduce, sharding):
    search = fitted(world)
    dedup = stage(as_is=["a"], retrieval_only=["b"], threshold=0.9, reference_threshold=0.85)
    floors = DedupConfig(threshold=0.9, edge_floor=0.85, reference_threshold=0.85, reference_floor=0.8)

    expected = reduce(dedup, in_memory(world, search=search, settings=floors))
    exact = reduce(dedup, in_memory(world))

    assert reduce(dedup, in_memory(world, **sharding, search=search, settings=floors)) == expected
    differ = sum(expected["pool"][url] != verdict for url, verdict in exact["pool"].items())
    assert differ < len(exact["pool"]) / 10


def test_five_thousand_identical_images_are_one_component_of_the_approximate_search(image, unit, in_memory, reduce):
    rows = [image(n, sscd=unit(*np.ones(64))) for n in range(5000)]
    search = InvertedPairs.fit(np.stack([row["sscd"] for row in rows]), 5000, (0.5, 0.4), 0.99, 0, 1)
    references = [image(9000 - n, sscd=unit(*np.ones(64))) for n in range(50)]
    inputs = in_memory({"pool": rows, "references/x": references}, 3, 1, search=search, settings=DedupConfig())

    verdicts = reduce(stage(), inputs)["pool"]

    assert {verdict["component_size"] for verdict in verdicts.values()} == {5000}
    assert {verdict["duplicate_of"] for verdict in verdicts.values()} == {references[-1]["image_id"]}
