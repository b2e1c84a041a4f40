from collections import Counter

import numpy as np
import pytest

from curation.config import RunConfig
from curation.config.inputs import InputConfig, SeedConfig
from curation.config.selection import ClusterConfig, IndexConfig, RetrieveConfig
from curation.indexes.hierarchy import Tree
from curation.indexes.keys import hex_from_keys, keys_from_hex
from curation.indexes.sampling import HashSample, hash_keys
from curation.stages.cluster import TREE_FILE
from curation.stages.hits import Hits
from curation.stages.index import IndexFit, IndexStage
from curation.stages.retrieve import ClusterSample, RetrieveStage

FLAT = IndexConfig(kind="flat")
# Every list is scanned and nearly every image of these small pools is a candidate, so that the answer is the exact one.
IVF_PQ = IndexConfig(kind="ivf_pq", num_lists=6, code_bytes=4, probes=6, depth=240)


def stage(seed=0, collisions="keep_nominal", balanced_images=None, index=FLAT, **seeds):
    inputs = (InputConfig(kind="folder", path="unused"),)
    sets = {name: SeedConfig(inputs=inputs, **settings) for name, settings in seeds.items()}
    settings = RetrieveConfig(collisions=collisions, balanced_images=balanced_images)
    cluster = ClusterConfig(levels=() if balanced_images is None else (2,))
    return RetrieveStage(RunConfig(seed=seed, seeds=sets, cluster=cluster, index=index, retrieve=settings))


@pytest.fixture
def retrieved(in_memory, reduce, tmp_path):
    """``retrieved(stage, collections)``: what retrieve says of each pool URL, with the pool's real index."""

    def run(made, collections, num_shards=1, shuffled=None, index=FLAT):
        inputs = in_memory(collections, num_shards, shuffled)
        folder = tmp_path / f"index-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for number, step in enumerate((IndexFit(index, 0), IndexStage(index, 0))):
            (folder / str(number)).mkdir()
            for _ in step(inputs, folder / str(number)):
                raise AssertionError
            inputs.made[("index_fit", "index")[number]] = folder / str(number)
        inputs.was_read.clear()
        centroids = np.eye(6, 8, dtype=np.float32)
        tree = Tree((centroids, centroids[:2]), (np.array([0, 0, 0, 0, 0, 1], np.int32),))
        tree.save(tmp_path / TREE_FILE)
        inputs.made["cluster_fit"] = tmp_path
        return reduce(made, inputs)["pool"]

    return run


def line(image, unit, number, degrees, **columns):
    angle = np.deg2rad(degrees)
    return image(number, embedding=unit(np.cos(angle), np.sin(angle)), **columns)


@pytest.fixture(scope="session")
def world(image):
    """300 pool images in 6 clusters, three seed sets; some rows rejected or without an embedding."""
    random = np.random.default_rng(8)

    def rows(first, count):
        made = []
        for number in range(first, first + count):
            vector = 2 * np.eye(8)[random.integers(6)] + random.normal(size=8)
            cluster = int(np.argmax(vector[:6]))
            vector = (vector / np.linalg.norm(vector)).astype(np.float16)
            missing = random.random() < 0.05
            made.append(
                image(
                    number,
                    embedding=None if missing else vector,
                    cluster_id=None if missing else cluster,
                    kept=bool(random.random() < 0.9),
                )
            )
        return made

    return {"pool": rows(0, 300), "seeds/a": rows(400, 20), "seeds/b": rows(500, 20), "seeds/c": rows(600, 30)}


@pytest.mark.parametrize("collisions", ["keep_nominal", "next_neighbour"])
def test_an_inverted_index_that_scans_everything_retrieves_what_an_exact_one_does(
    collisions, world, retrieved, sharding
):
    made = stage(collisions=collisions, index=IVF_PQ, a={"k": 4}, b={"k": 3})

    assert retrieved(made, world, **sharding, index=IVF_PQ) == retrieved(made, world)


@pytest.mark.parametrize("collisions", ["keep_nominal", "next_neighbour"])
def test_what_an_inverted_index_retrieves_does_not_depend_on_shards_or_order(collisions, world, retrieved, sharding):
    few = IndexConfig(kind="ivf_pq", num_lists=12, code_bytes=1, probes=2, depth=6)
    made = stage(collisions=collisions, index=few, a={"k": 4}, b={"k": 3})

    expected = retrieved(made, world, index=few)

    assert expected != retrieved(made, world)
    assert retrieved(made, world, **sharding, index=few) == expected


def test_recall_holds_for_seeds_that_lie_elsewhere_than_the_pool(image, retrieved):
    random = np.random.default_rng(5)

    def rows(first, values):
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return [image(first + row, embedding=value.astype(np.float16)) for row, value in enumerate(values)]

    centres = random.normal(size=(40, 24))
    pool = rows(0, centres[random.integers(40, size=1500)] + 0.5 * random.normal(size=(1500, 24)))
    world = {"pool": pool, "seeds/a": rows(2000, random.normal(size=(200, 24)))}
    config = IndexConfig(kind="ivf_pq", recall=0.95)
    made = stage(index=config, a={"k": 4})

    exact, found = (retrieved(made, world, index=index) for index in (FLAT, config))

    counts = [[row["nominal_count"] or 0 for row in verdicts.values()] for verdicts in (exact, found)]
    assert sum(counts[0]) == sum(counts[1]) == 800
    assert np.minimum(*counts).sum() >= 0.95 * 800  # 0.83 where it is measured on images of the pool alone


@pytest.mark.parametrize("collisions", ["keep_nominal", "next_neighbour"])
def test_what_is_retrieved_does_not_depend_on_shards_or_order(collisions, world, retrieved, sharding):
    made = stage(
        collisions=collisions,
        a={"retrieve": "sample", "k": 4},
        b={"retrieve": "sample", "k": 3},
        c={"retrieve": "cluster", "images_per_cluster": 10, "max_images": 25, "min_seed_images": 4},
    )

    expected = retrieved(made, world)

    assert retrieved(made, world, **sharding) == expected
    assert {len(row["seeds"]) for row in expected.values() if row["seeds"]} >= {1, 2}


def test_the_k_nearest_are_those_of_plain_loops_and_counts_are_nominal(world, retrieved, cosine):
    found = retrieved(stage(a={"k": 4}, b={"k": 7}), world)

    hits = Counter()
    best = {}
    sets = {}
    pool = [row for row in world["pool"] if row["kept"] and row["embedding"] is not None]
    for name, k in (("a", 4), ("b", 7)):
        for seed in world[f"seeds/{name}"]:
            if seed["kept"] and seed["embedding"] is not None:
                near = sorted(
                    (-cosine(seed["embedding"], row["embedding"]), row["image_id"], row["url"]) for row in pool
                )
                for similarity, _, url in near[:k]:
                    hits[url] += 1
                    best[url] = min(best.get(url, (1.0, "")), (similarity, seed["image_id"]))
                    sets[url] = sorted({*sets.get(url, []), name})
    for row in world["pool"]:
        verdict = found[row["url"]]
        if row["url"] in hits:
            similarity, seed_id = best[row["url"]]
            assert verdict == {
                "reject_reason": None,
                "seeds": sets[row["url"]],
                "seed_image_id": seed_id,
                "seed_similarity": np.float32(-similarity),
                "nominal_count": hits[row["url"]],
                "balanced": None,
            }
        else:
            assert verdict["reject_reason"] == ("not_retrieved" if row["kept"] else None)
            assert verdict["seeds"] is verdict["nominal_count"] is verdict["seed_image_id"] is None
    assert max(hits.values()) > 1


def test_ties_go_to_the_smaller_image_id(image, unit, retrieved):
    pool = [image(n, embedding=unit(0, 1)) for n in range(6)]

    found = retrieved(stage(a={"k": 2}), {"pool": pool, "seeds/a": [image(9, embedding=unit(1))]}, shuffled=4)

    assert [row["url"] for row in pool if found[row["url"]]["seeds"]] == [row["url"] for row in pool[:2]]


def test_two_seeds_that_are_equally_near_name_the_smaller_id(image, unit, retrieved):
    seeds = [image(9, embedding=unit(1)), image(8, embedding=unit(1))]

    (verdict,) = retrieved(stage(a={"k": 1}), {"pool": [image(0, embedding=unit(1, 1))], "seeds/a": seeds}).values()

    assert (verdict["seed_image_id"], verdict["nominal_count"]) == (seeds[1]["image_id"], 2)


def test_next_neighbour_takes_nothing_twice_and_goes_further_away(image, unit, retrieved):
    pool = [line(image, unit, n, n) for n in range(40)]
    seeds = [line(image, unit, 90 + n, 0) for n in range(12)]  # they all want the same

    found = retrieved(stage(collisions="next_neighbour", a={"k": 3}), {"pool": pool, "seeds/a": seeds})

    taken = [found[row["url"]] for row in pool]
    assert [verdict["nominal_count"] for verdict in taken] == [1] * 36 + [None] * 4
    # The seed with the smallest id takes first.
    assert [verdict["seed_image_id"] for verdict in taken[:36]] == [seeds[n // 3]["image_id"] for n in range(36)]


def test_next_neighbour_is_each_seed_in_turn_among_what_is_free(image, retrieved, cosine):
    random = np.random.default_rng(6)

    def rows(first, count):
        vectors = 3 * np.eye(8)[random.integers(3, size=count)] + random.normal(size=(count, 8))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        return [image(first + number, embedding=vector) for number, vector in enumerate(vectors)]

    pool, seeds = rows(0, 700), rows(1000, 300)

    found = retrieved(stage(collisions="next_neighbour", a={"k": 2}), {"pool": pool, "seeds/a": seeds}, shuffled=1)

    free = {row["url"]: row for row in pool}
    for seed in seeds:
        near = sorted((-cosine(seed["embedding"], row["embedding"]), row["image_id"], url) for url, row in free.items())
        for _, _, url in near[:2]:
            assert found[url]["seed_image_id"] == seed["image_id"]
            del free[url]
    assert {found[url]["reject_reason"] for url in free} == {"not_retrieved"}


def test_next_neighbour_ends_when_the_pool_does_and_each_set_starts_anew(image, unit, retrieved):
    pool = [line(image, unit, n, n) for n in range(5)]
    seeds = [line(image, unit, 90 + n, 0) for n in range(4)]

    found = retrieved(
        stage(collisions="next_neighbour", a={"k": 2}, b={"k": 1}),
        {"pool": pool, "seeds/a": seeds, "seeds/b": seeds[:1]},
    )

    assert [found[row["url"]]["nominal_count"] for row in pool] == [2, 1, 1, 1, 1]
    assert found[pool[4]["url"]]["seed_image_id"] == seeds[2]["image_id"]  # only one was left for it


@pytest.mark.parametrize("collisions", ["keep_nominal", "next_neighbour"])
def test_a_pool_smaller_than_k_is_retrieved_whole(collisions, image, unit, retrieved):
    pool = [line(image, unit, n, 10 * n) for n in range(3)]

    found = retrieved(stage(collisions=collisions, a={"k": 32}), {"pool": pool, "seeds/a": [line(image, unit, 90, 0)]})

    assert [found[row["url"]]["nominal_count"] for row in pool] == [1, 1, 1]


def test_rejected_images_are_not_retrieved_and_rejected_seeds_retrieve_nothing(image, unit, retrieved):
    pool = [line(image, unit, 0, 0, kept=False), line(image, unit, 1, 30), line(image, unit, 2, 80)]
    seeds = [line(image, unit, 90, 0), line(image, unit, 91, 90, kept=False)]

    found = retrieved(stage(a={"k": 1}), {"pool": pool, "seeds/a": seeds})

    assert set(found[pool[0]["url"]].values()) == {None}
    assert found[pool[1]["url"]]["seeds"] == ["a"]
    assert found[pool[2]["url"]]["reject_reason"] == "not_retrieved"


def test_a_kept_image_without_an_embedding_is_not_retrieved(image, unit, retrieved):
    found = retrieved(stage(a={}), {"pool": [image(0)], "seeds/a": [image(9, embedding=unit(1))]})

    assert [verdict["reject_reason"] for verdict in found.values()] == ["not_retrieved"]


def test_without_seed_sets_every_image_is_kept(image, unit, retrieved):
    found = retrieved(stage(), {"pool": [image(0), image(1, embedding=unit(1)), image(2, kept=False)]})

    assert [set(verdict.values()) for verdict in found.values()] == [{None}] * 3


def test_seed_sets_that_retrieve_nothing_leave_nothing_of_the_pool(image, unit, retrieved):
    found = retrieved(
        stage(a={"retrieve": "none"}), {"pool": [image(0, embedding=unit(1))], "seeds/a": [image(9, embedding=unit(1))]}
    )

    assert [verdict["reject_reason"] for verdict in found.values()] == ["not_retrieved"]


@pytest.mark.parametrize("empty", ["pool", "seeds/a"])
@pytest.mark.parametrize("retrieve", ["sample", "cluster"])
def test_empty_collections_are_no_special_case(empty, retrieve, image, unit, retrieved):
    collections = {"pool": [image(0, embedding=unit(1))], "seeds/a": [image(9, embedding=unit(1))]} | {empty: []}

    found = retrieved(stage(a={"retrieve": retrieve}), collections, num_shards=2)

    assert [verdict["reject_reason"] for verdict in found.values()] == ["not_retrieved"] * len(collections["pool"])


def test_a_cluster_needs_more_seed_images_than_the_minimum(image, retrieved):
    pool = [image(n, cluster_id=n % 3) for n in range(30)]
    seeds = [
        *(image(40 + n, cluster_id=0) for n in range(3)),  # exactly the minimum
        *(image(50 + n, cluster_id=1) for n in range(4)),  # one more
        *(image(60 + n, cluster_id=2, kept=n < 3) for n in range(5)),  # but two are rejected
        image(70),
    ]

    found = retrieved(stage(a={"retrieve": "cluster", "min_seed_images": 3}), {"pool": pool, "seeds/a": seeds})

    for row in pool:
        verdict = found[row["url"]]
        assert verdict["reject_reason"] == (None if row["cluster_id"] == 1 else "not_retrieved")
        if row["cluster_id"] == 1:
            assert (verdict["seeds"], verdict["nominal_count"]) == (["a"], 1)
            assert verdict["seed_image_id"] is verdict["seed_similarity"] is None


def test_clusters_and_samples_may_hit_the_same_image(image, unit, retrieved):
    pool = [image(0, cluster_id=0, embedding=unit(1))]
    seed = image(9, cluster_id=0, embedding=unit(1))

    (verdict,) = retrieved(
        stage(b={"k": 1}, a={"retrieve": "cluster", "min_seed_images": 0}),
        {"pool": pool, "seeds/a": [seed], "seeds/b": [seed]},
    ).values()

    assert (verdict["seeds"], verdict["nominal_count"]) == (["a", "b"], 2)
    assert (verdict["seed_image_id"], verdict["seed_similarity"]) == (seed["image_id"], pytest.approx(1, abs=1e-3))


def test_the_smallest_hashes_of_each_cluster_are_taken_then_the_smallest_of_all(image, retrieved, sharding):
    pool = [image(n, cluster_id=n % 4, kept=n % 11 != 0) for n in range(200)]
    seeds = [image(300 + n, cluster_id=n % 3) for n in range(12)]  # four in each of three clusters
    made = stage(7, a={"retrieve": "cluster", "images_per_cluster": 10, "max_images": 22})

    found = retrieved(made, {"pool": pool, "seeds/a": seeds}, **sharding)

    def hashed(row):
        return hash_keys(keys_from_hex([row["image_id"]]), 7)[0]

    kept = sorted((row for row in pool if row["kept"]), key=hashed)
    each = [row for cluster in range(3) for row in [row for row in kept if row["cluster_id"] == cluster][:10]]
    expected = {row["url"] for row in sorted(each, key=hashed)[:22]}
    assert {url for url, verdict in found.items() if verdict["seeds"]} == expected


@pytest.mark.parametrize(("per_cluster", "total"), [(5, 10_000), (400, 1000), (3, 100), (1, 1)])
def test_a_cluster_sample_that_forgets_early_is_that_of_all_rows(per_cluster, total):
    random = np.random.default_rng(2)
    keys = random.integers(0, 2**63, (250_000, 2)).astype(np.uint64)
    clusters = (random.random(len(keys)) ** 3 * 300).astype(np.int64)  # uneven sizes
    sample, every = ClusterSample(4, per_cluster, total), {}

    for part in np.array_split(random.permutation(len(keys)), 9):
        sample.add(clusters[part], keys[part])
        assert sample._num_pending <= max(1 << 16, total)
    for cluster in range(300):
        every[cluster] = HashSample(4, per_cluster)
        every[cluster].add(keys[clusters == cluster], keys[clusters == cluster])
    expected = HashSample(4, total)
    for one in every.values():
        expected.add(one.result().keys, one.result().rows)

    np.testing.assert_array_equal(sample.result(), expected.result().keys)


def test_hits_of_no_set_find_nothing():
    found = Hits([]).grouped()

    assert len(found) == 0
    assert found.find(np.zeros((2, 2), np.uint64)).tolist() == [-1, -1]
    columns = found.columns(np.array([-1, -1]))
    assert [column.to_pylist() for column in columns.values()] == [[None, None]] * 4


def test_hits_find_keys_with_zero_bytes_at_the_end():
    keys = np.array([[1, 0], [1, 256], [0, 0]], np.uint64)
    hits = Hits(["a"])
    hits.add(0, keys[:2])
    found = hits.grouped()

    assert found.find(keys).tolist() == [0, 1, -1]
    assert hex_from_keys(keys[:1]) == ["00000000000000010000000000000000"]


def test_balanced_selection_shares_the_budget_out_from_the_top_level_down(world, retrieved, sharding):
    pool = {"pool": world["pool"]}
    kept = Counter(row["cluster_id"] for row in world["pool"] if row["kept"] and row["cluster_id"] is not None)

    found = retrieved(stage(balanced_images=60), pool)

    cluster = {row["url"]: row["cluster_id"] for row in world["pool"]}
    chosen = Counter(cluster[url] for url, verdict in found.items() if verdict["balanced"])
    assert chosen[5] == min(30, kept[5])  # half of the top level by itself
    assert [chosen[number] for number in range(5)] == [6] * 5
    assert {verdict["reject_reason"] for verdict in found.values() if verdict["balanced"] is False} == {"not_retrieved"}
    assert {verdict["reject_reason"] for verdict in found.values() if verdict["balanced"]} == {None}
    assert retrieved(stage(balanced_images=60), pool, **sharding) == found
    assert retrieved(stage(seed=1, balanced_images=60), pool) != found


def test_balanced_selection_comes_besides_what_seed_sets_retrieve(world, retrieved):
    collections = {"pool": world["pool"], "seeds/a": world["seeds/a"]}

    alone = retrieved(stage(a={"k": 3}), collections)
    both = retrieved(stage(a={"k": 3}, balanced_images=50), collections)

    assert sum(bool(verdict["balanced"]) for verdict in both.values()) == 50
    for url, verdict in both.items():
        assert verdict["seeds"] == alone[url]["seeds"]
        if verdict["balanced"] is not None:
            assert (verdict["reject_reason"] is None) == bool(verdict["balanced"] or verdict["seeds"])


def test_a_budget_above_the_pool_selects_every_image_that_has_a_cluster(world, retrieved):
    found = retrieved(stage(balanced_images=10_000), {"pool": world["pool"]})

    for row in world["pool"]:
        wanted = (row["cluster_id"] is not None) if row["kept"] else None
        assert found[row["url"]]["balanced"] is wanted
