import json
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from curation import schema
from curation.config import RunConfig
from curation.config.inputs import InputConfig, SeedConfig
from curation.config.selection import ExcludeConfig, ManifestConfig
from curation.errors import InputError
from curation.fingerprint import rows_digest
from curation.stages.manifest import DIGEST_KEY, MANIFEST_FILE, SUMMARY_FILE, SUMMARY_KEY, Excluded, ManifestStage

_COMMON = (
    ("fetch", schema.FETCH),
    ("pca_hash", schema.PCA_HASH_VERDICT),
    ("nsfw", schema.NSFW_VERDICT),
    ("faces", schema.FACES_VERDICT),
    ("dedup", schema.DEDUP),
)
VERDICTS = {"pool": (*_COMMON, ("retrieve", schema.RETRIEVE)), "seeds": _COMMON}


def stage(as_is=(), others=(), **exclude):
    inputs = (InputConfig(kind="folder", path="unused"),)
    seeds = {name: SeedConfig(inputs=inputs, as_is=name in as_is) for name in (*as_is, *others)}
    config = RunConfig(seeds=seeds, manifest=ManifestConfig(exclude=ExcludeConfig(**exclude)))
    return ManifestStage(config, VERDICTS, {"version": "1.2.3", "digest": "overwritten"})


@pytest.fixture(scope="session")
def full(image):
    """``full(number, **columns)``: a kept row with something in every column; a reason makes it rejected."""

    def make(number, **columns):
        row = image(number)
        row |= {
            "page_urls": [f"http://page.example/{number}"],
            "extra": f'{{"alt":"number {number}"}}',
            "urls": [row["url"]],
            "format": "jpeg",
            "pca_hash": 2**64 - 1 - number,
            "nsfw_score": 0.125,
            "num_faces": number % 3,
            "tar_offset": 512 * number,
            "stored_bytes": 900,
            "stored_format": "jpeg",
            "stored_id": f"{number:032x}",
            "component_id": row["image_id"],
            "component_size": 1,
            "cluster_id": number % 4,
            "cluster_similarity": 0.75,
            "cluster_ancestors": [number % 2, 0],
            "seeds": ["a"],
            "seed_image_id": "0" * 32,
            "seed_similarity": 0.5,
            "nominal_count": 2,
            "balanced": True,
        }
        row |= columns
        return row | {"kept": not any(key.endswith(".reject_reason") for key in columns)}

    return make


@pytest.fixture(scope="session")
def world(full):
    """A pool and two seed sets with rows that every stage rejects."""
    reasons = [(table.name, f"{stage}_reason") for stage, table in VERDICTS["pool"]]

    def rows(first, count, verdicts):
        return [
            full(n, **({f"{verdicts[n % 9][0]}.reject_reason": verdicts[n % 9][1]} if n % 9 < len(verdicts) else {}))
            for n in range(first, first + count)
        ]

    return {"pool": rows(0, 100, reasons), "seeds/a": rows(200, 30, reasons[:5]), "seeds/b": rows(300, 30, reasons[:5])}


def manifest_of(reduce):
    return pq.read_table(reduce.scratch / MANIFEST_FILE)


def summary_of(reduce):
    return json.loads((reduce.scratch / SUMMARY_FILE).read_text())


def test_the_digest_and_the_rows_do_not_depend_on_shards_or_order(world, in_memory, reduce, sharding):
    verdicts = reduce(stage(as_is=["a"], others=["b"]), in_memory(world))
    rows = sorted(manifest_of(reduce).drop_columns(["tar"]).to_pylist(), key=lambda row: row["url"])
    summary = summary_of(reduce)

    assert reduce(stage(as_is=["a"], others=["b"]), in_memory(world, **sharding)) == verdicts
    again = sorted(manifest_of(reduce).drop_columns(["tar"]).to_pylist(), key=lambda row: row["url"])
    assert again == rows
    assert summary_of(reduce) == summary


def test_the_digest_is_that_of_the_rows_in_the_file(world, in_memory, reduce):
    reduce(stage(as_is=["a"]), in_memory({name: world[name] for name in ("pool", "seeds/a")}, 3))

    table = manifest_of(reduce)
    assert table.schema.equals(schema.MANIFEST, check_metadata=False)
    assert summary_of(reduce)["digest"] == f"{rows_digest(table):064x}"
    assert summary_of(reduce)["num_images"] == table.num_rows > 0


def test_the_files_metadata_and_the_summary_say_the_same(world, in_memory, reduce):
    reduce(stage(as_is=["a"], others=["b"]), in_memory(world))

    metadata = pq.read_metadata(reduce.scratch / MANIFEST_FILE).metadata
    summary = summary_of(reduce)
    assert json.loads(metadata[SUMMARY_KEY]) == summary
    assert metadata[DIGEST_KEY].decode() == summary["digest"] != "overwritten"
    assert set(summary) == {"digest", "num_images", "funnel", "version"}


def test_kept_rows_of_the_pool_and_of_as_is_seeds_are_in_the_manifest_and_no_others(world, in_memory, reduce):
    reduce(stage(as_is=["a"], others=["b"]), in_memory(world, num_shards=2))

    found = {(row["collection"], row["url"]) for row in manifest_of(reduce).to_pylist()}
    assert found == {(name, row["url"]) for name in ("pool", "seeds/a") for row in world[name] if row["kept"]}


def test_every_count_of_the_funnel_adds_up(world, in_memory, reduce):
    reduce(stage(as_is=["a"], others=["b"]), in_memory(world, num_shards=3))

    funnels = summary_of(reduce)["funnel"]
    for name, rows in world.items():
        funnel = funnels[name]
        assert [entry["stage"] for entry in funnel] == [
            "crawl", *(stage for stage, _ in VERDICTS[name.partition("/")[0]]), "manifest",
        ]  # fmt: skip
        assert funnel[0]["in"] == len(rows)
        for before, after in pairwise(funnel):
            assert before["out"] == after["in"]
        for entry in funnel:
            assert entry["in"] == entry["out"] + sum(entry["rejected"].values())
            expected = {f"{entry['stage']}_reason"} if entry["stage"] not in ("crawl", "manifest") else set()
            assert set(entry["rejected"]) == expected
        assert funnel[-1]["out"] == sum(row["kept"] for row in rows)
    assert funnels["pool"][-1]["out"] + funnels["seeds/a"][-1]["out"] == summary_of(reduce)["num_images"]


def test_every_column_is_carried_over_and_seeds_have_nulls_where_they_have_no_table(full, in_memory, reduce):
    pool, seed = full(1), full(2)

    reduce(stage(as_is=["a"]), in_memory({"pool": [pool], "seeds/a": [seed]}))

    rows = {row["collection"]: row for row in manifest_of(reduce).to_pylist()}
    assert rows["pool"] == {name: pool.get(name) for name in schema.MANIFEST.names} | {
        "collection": "pool",
        "tar": "pool/0.tar",
    }
    missing = {"pca_hash", "seeds", "seed_image_id", "seed_similarity", "nominal_count", "balanced"}
    assert {name for name, value in rows["seeds/a"].items() if value is None} == missing
    assert rows["seeds/a"]["tar"] == "seeds/a/0.tar"


def test_an_image_of_two_seed_sets_and_the_pool_is_in_the_manifest_once(full, in_memory, reduce, sharding):
    shared = {"image_id": "ab" * 16}
    pool = [full(n) for n in range(5)] + [full(9, **shared)]
    a, b = [full(n) for n in range(100, 105)] + [full(10, **shared)], [full(11, **shared), full(12)]

    found = reduce(stage(as_is=["a", "b"]), in_memory({"pool": pool, "seeds/b": b, "seeds/a": a}, **sharding))

    rows = [row for row in manifest_of(reduce).to_pylist() if row["image_id"] == shared["image_id"]]
    assert [(row["collection"], row["url"]) for row in rows] == [("seeds/a", a[-1]["url"])]
    assert found["seeds/b"][b[0]["url"]]["reject_reason"] == "exact_duplicate"
    assert found["pool"][pool[-1]["url"]]["reject_reason"] == "exact_duplicate"
    assert summary_of(reduce)["funnel"]["pool"][-1] == {
        "stage": "manifest", "in": 6, "out": 5, "rejected": {"exact_duplicate": 1},
    }  # fmt: skip


def test_a_seed_that_is_not_in_the_manifest_keeps_nothing_out(full, in_memory, reduce):
    shared = {"image_id": "ab" * 16}
    collections = {
        "pool": [full(1, **shared)],
        "seeds/a": [full(2, **shared)],  # for retrieval only
        "seeds/b": [full(3, **shared, **{"dedup.reject_reason": "reference_copy"})],
    }

    found = reduce(stage(as_is=["b"], others=["a"]), in_memory(collections))

    assert [row["collection"] for row in manifest_of(reduce).to_pylist()] == ["pool"]
    assert found["seeds/a"][collections["seeds/a"][0]["url"]]["reject_reason"] is None


@pytest.fixture
def lists(tmp_path):
    """``lists(text)``: the path of a list, as settings take it."""

    def write(text, encoding="utf-8"):
        path = tmp_path / f"list-{len(list(tmp_path.glob('list-*')))}.txt"
        path.write_text(text, encoding=encoding)
        return (str(path),)

    return write


def test_an_image_is_left_out_by_any_of_its_urls(full, lists, in_memory, reduce):
    rows = [full(1, urls=["http://a/", "http://b/"]), full(2), full(3, **{"nsfw.reject_reason": "nsfw"})]
    listed = lists(f"# taken down\n\n  http://b/  \n{rows[2]['url']}\nhttp://nobody/\n")

    found = reduce(stage(urls=listed), in_memory({"pool": rows}))["pool"]

    assert [found[row["url"]]["reject_reason"] for row in rows] == ["excluded_url", None, None]
    assert [row["url"] for row in manifest_of(reduce).to_pylist()] == [rows[1]["url"]]


def test_a_domain_stands_for_its_subdomains_and_not_for_names_that_end_like_it(full, lists, in_memory, reduce):
    urls = {
        "http://example.com/a": "excluded_domain",
        "https://user@cdn.img.example.com:8080/a": "excluded_domain",
        "http://EXAMPLE.com./a": "excluded_domain",
        "http://notexample.com/a": None,
        "http://example.com.org/a": None,
        "http://example.org/example.com": None,
        "http://xn--mnchen-3ya.de/a": "excluded_domain",
        "http://a.wild.org/": "excluded_domain",
        "file:///example.com/a.jpg": None,
        "http://[broken/": None,
    }
    rows = [full(n, url=url, urls=[url]) for n, url in enumerate(urls)]

    found = reduce(stage(domains=lists("Example.COM\nmünchen.de\n*.wild.org\n")), in_memory({"pool": rows}))["pool"]

    assert {url: verdict["reject_reason"] for url, verdict in found.items()} == urls


def test_an_image_is_left_out_by_its_id_in_any_case_also_as_a_seed(full, lists, in_memory, reduce):
    row, seed = full(0xAB), full(0xCD)
    listed = lists(f"{row['image_id'].upper()}\n{seed['image_id']}\n", encoding="utf-8-sig")

    found = reduce(stage(as_is=["a"], ids=listed), in_memory({"pool": [row], "seeds/a": [seed]}))

    assert found["pool"][row["url"]]["reject_reason"] == found["seeds/a"][seed["url"]]["reject_reason"] == "excluded_id"
    assert manifest_of(reduce).num_rows == 0


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("ids", "abc"),
        ("ids", "g" * 32),
        ("urls", "example.com/a"),
        ("domains", "http://a.b"),
        ("domains", "*."),
        ("domains", "a..\u2603\u200d."),
    ],
)
def test_a_line_that_cannot_match_anything_is_an_error(kind, line, lists):
    paths = lists(f"# fine\n{line}\n")

    with pytest.raises(InputError, match=r"manifest\.exclude: .*list-0\.txt: .* is not an? "):
        Excluded(ExcludeConfig(**{kind: paths}))


def test_a_list_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")

    for name in ("missing", "binary"):
        with pytest.raises(InputError, match=f"manifest.exclude: .*{name} cannot be read"):
            Excluded(ExcludeConfig(urls=(str(tmp_path / name),)))


def test_nothing_kept_is_an_empty_manifest(full, in_memory, reduce):
    reduce(stage(as_is=["a"]), in_memory({"pool": [full(1, **{"fetch.reject_reason": "dns"})], "seeds/a": []}, 3))

    assert manifest_of(reduce).num_rows == 0
    assert manifest_of(reduce).schema.equals(schema.MANIFEST, check_metadata=False)
    assert summary_of(reduce)["digest"] == "0" * 64


def test_many_small_shards_do_not_make_small_row_groups(full, in_memory, reduce):
    reduce(stage(), in_memory({"pool": [full(n) for n in range(60)]}, num_shards=30))

    assert pq.ParquetFile(reduce.scratch / MANIFEST_FILE).num_row_groups == 1
