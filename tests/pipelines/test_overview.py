"""What an overview and a report say about a run, on a small one whose tables are written by hand."""

import base64
import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation import schema
from curation.config import RunConfig
from curation.errors import CorruptError
from curation.fingerprint import fingerprint
from curation.pipelines import tallies
from curation.pipelines.context import Context
from curation.pipelines.freshness import assess
from curation.pipelines.ingest import image_id
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.overview import overview, report_data, write_report
from curation.pipelines.plan import Plan
from curation.pipelines.tallies import HostTally
from curation.pipelines.thumbnails import THUMBNAIL_PX
from curation.pipelines.units import crawl_marker
from curation.pipelines.work import execute
from curation.report.overview import CollectionOverview, Overview, StepOverview
from curation.settings import parse
from curation.store import Marker, Run
from curation.tars import TarWriter

REAL = ("nsfw_verdict", "faces_verdict", "pca_hash_verdict", "cluster_baseline", "cluster_summary", "manifest_verdict")
HOSTILE = "https://a.example/<script>alert(1)</script>\"'><img src=x onerror=alert(2)>.jpg"
RAW_COLOUR = (250, 0, 250)


def jpeg(colour: tuple[int, int, int], side_px: int = 160) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px * 3 // 4), colour).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ident(name: str) -> str:
    return image_id(name.encode())


# name, url, why fetching failed, NSFW score, verdict of dedup: (reason, copy of, similarity, component, its size)
POOL = [
    [
        ("a", HOSTILE, None, 0.1, (None, None, None, "a", 4)),
        ("b", "https://a.example/b.jpg", None, 0.1, ("near_duplicate", "a", 0.9, "a", 4)),
        ("c", "https://b.example/c.jpg", None, 0.1, ("near_duplicate", "a", 0.7, "a", 4)),
        ("a", "https://b.example/z.jpg", None, 0.1, None),
        ("e", "https://bad.example/e.jpg", "http_404", None, None),
        ("f", "https://b.example/f.jpg", None, 0.9, None),
    ],
    [
        ("g", "https://b.example/g.jpg", None, 0.1, (None, None, None, "g", 1)),
        ("h", "https://b.example/h.jpg", None, 0.1, (None, None, None, "h", 2)),
        ("i", "https://b.example/i.jpg", None, 0.1, ("near_duplicate", "h", 0.8, "h", 2)),
        ("j", "https://b.example/j.jpg", None, 0.1, ("reference_copy", "r", 0.5, "j", 1)),
        ("k", "https://a.example/k.jpg", None, 0.3, ("near_duplicate", "a", 0.65, "a", 4)),
        ("l", "https://bad.example/l.jpg", "timeout", None, None),
    ],
]
SEEDS = [[("s1", "file:///s/1.jpg", None, 0.0, None), ("s2", "file:///s/2.jpg", None, 0.0, None)]]
REFERENCES = [[("r", "file:///r/1.jpg", None, 0.0, None)]]
ROWS: dict[str, list[list[Any]]] = {"pool": POOL, "seeds/s": SEEDS, "references/r": REFERENCES}


class Made:
    """A run whose tables are written step by step."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for name in ("nsfw", "faces", "sscd", "embed"):
            (folder / f"{name}.onnx").write_bytes(name.encode())
        (folder / "ids.txt").write_text(ident("h"))
        tree: dict[str, Any] = {
            "pool": {"inputs": [{"kind": "urls", "urls": ["https://a.example/"]}]},
            "seeds": {"s": {"inputs": [{"kind": "folder", "path": "/s"}], "k": 2}},
            "references": {"r": {"inputs": [{"kind": "folder", "path": "/r"}]}},
            "manifest": {"exclude": {"ids": [str(folder / "ids.txt")]}},
        }
        for name in ("nsfw", "faces", "sscd", "embed"):
            tree[name] = {"weights": str(folder / f"{name}.onnx")}
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values
        self.config = parse(RunConfig, tree, "test")
        self.run = Run(folder / "run")
        self.context = Context(self.run, self.config)
        self.plan: Plan = build_plan(self.config)

    def overview(self) -> Overview:
        return overview(self.context, self.plan)

    def through(self, last: str, shards: int = 2) -> "Made":
        """Finish the steps up to ``last``; of that one only the first shards."""
        for step in self.plan.steps:
            if step.name in REAL:
                for found in list(assess(self.context, self.plan, step)):
                    execute(self.context, self.plan, found.unit)
            elif step.kind == "crawl":
                self._crawl()
            else:
                self._write(step.name, shards if step.name == last else 2)
            if step.name == last:
                return self
        raise AssertionError(last)

    def _crawl(self) -> None:
        for found in list(assess(self.context, self.plan, self.plan.step("crawl"))):
            unit = found.unit
            digests = []
            for shard, rows in enumerate(ROWS[unit.collection]):
                table = pa.Table.from_pylist(
                    [{"url": url, "page_urls": [], "source_kind": "web"} for _, url, *_ in rows], schema.CRAWL.schema
                )
                marker = self.run.commit(unit.collection, "crawl", shard, table, {"fingerprint": unit.fingerprint})
                digests.append(marker.digest)
            digest = fingerprint({"shards": digests})
            made = Marker(unit.fingerprint, digest, sum(map(len, ROWS[unit.collection])), {}, unit.inputs)
            counts = {"num_shards": len(ROWS[unit.collection]), "seconds": 2.0, "skipped": {"bad_url": 3}}
            self.run.commit_artefacts(crawl_marker(unit.collection), {}, Marker(**{**asdict(made), **counts}))

    def _write(self, name: str, shards: int) -> None:
        step = self.plan.step(name)
        for found in list(assess(self.context, self.plan, step)):
            unit = found.unit
            fields: dict[str, Any] = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "covers": unit.covers}
            fields["seconds"] = 0.5
            if step.kind == "blocks":
                made = Marker(**fields, digest=name, num_rows=3, files={})
                self.run.write_marker(unit.collection, name, unit.shard, made)
                continue
            if step.kind != "reduce" and unit.shard is not None:
                if unit.shard < shards:
                    self._commit(name, unit.collection, unit.shard, fields)
                continue
            for collection in ("pool", "seeds/s") if step.writes is not None else ():
                if collection.partition("/")[0] in self.plan.writers[step.writes.name]:
                    for shard in range(len(ROWS[collection])):
                        self._commit(name, collection, shard, fields)
            self.run.commit_artefacts(name, {}, Marker(digest=name, num_rows=0, files={}, **fields))

    def _commit(self, name: str, collection: str, shard: int, fields: dict[str, Any]) -> None:
        rows = ROWS[collection][shard]
        files = {}
        if name in ("fetch", "faces"):
            role = "raw" if name == "fetch" else "images"
            files[role] = self.run.new_path(collection, role, shard, "tar")
            with self.run.create(files[role]) as stream, TarWriter(stream) as tar:
                values = [getattr(self, f"_{name}")(index, row, tar) for index, row in enumerate(rows)]
        else:
            values = [getattr(self, f"_{name}", lambda *_: {})(index, row) for index, row in enumerate(rows)]
        written = self.plan.step(name).writes
        assert written is not None
        table = pa.Table.from_pylist(values, written.schema)
        self.run.commit(collection, name, shard, table, {**fields, "files": files})

    def _fetch(self, index: int, row: Any, tar: TarWriter) -> dict[str, Any]:
        name, _, failed, *_ = row
        if failed is not None:
            return {"reject_reason": failed}
        offset = tar.add(ident(name), jpeg(RAW_COLOUR), "jpeg")
        return {"image_id": ident(name), "width": 160, "height": 120, "num_bytes": 9, "raw_offset": offset}

    def _nsfw(self, index: int, row: Any) -> dict[str, Any]:
        return {"nsfw_score": row[3]}

    def _pca_hash(self, index: int, row: Any) -> dict[str, Any]:
        return {"pca_hash": int(ident(row[0])[:15], 16)}

    def _faces(self, index: int, row: Any, tar: TarWriter) -> dict[str, Any]:
        name, _, failed, score, _ = row
        if failed is not None or score >= self.config.nsfw.max_score:
            return {}
        data = jpeg((10, 200, 20 * index))
        fields = {"stored_bytes": len(data), "stored_format": "jpeg", "stored_id": image_id(data)}
        return {"num_faces": 0, "tar_offset": tar.add(ident(name), data, "jpeg"), **fields}

    def _dedup(self, index: int, row: Any) -> dict[str, Any]:
        if row[4] is None:
            return {}
        reason, copy_of, similarity, component, size = row[4]
        copy_id = None if copy_of is None else ident(copy_of)
        found = {"reject_reason": reason, "duplicate_of": copy_id, "similarity": similarity}
        return {**found, "component_id": ident(component), "component_size": size}

    def _cluster(self, index: int, row: Any) -> dict[str, Any]:
        if row[4] is None or row[4][0] is not None:
            return {} if not row[1].startswith("file:") else {"cluster_id": 1, "cluster_similarity": 0.5}
        return {"cluster_id": 1, "cluster_similarity": 0.4 + index / 10}

    def _retrieve(self, index: int, row: Any) -> dict[str, Any]:
        if row[0] in "ah" and row[4] is not None:
            return {"seeds": ["s"], "nominal_count": 2, "seed_image_id": ident("s1"), "seed_similarity": 0.5}
        return {"reject_reason": "not_retrieved"} if row[0] == "g" else {}


def step_of(found: Overview, name: str) -> StepOverview:
    return next(step for stage in found.stages for step in stage.steps if step.name == name)


def pool_of(found: Overview) -> CollectionOverview:
    return next(collection for collection in found.collections if collection.name == "pool")


def pictures(page: str) -> list[Image.Image]:
    data = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "made"
    Made(folder).through("manifest_verdict")
    return folder


@pytest.fixture
def finished(finished_folder: Path, tmp_path: Path) -> Made:
    """A finished run of one's own; settings that name files keep naming those of the original."""
    made = Made(finished_folder)
    shutil.copytree(finished_folder / "run", tmp_path / "run")
    made.run = Run(tmp_path / "run")
    made.context = Context(made.run, made.config)
    return made


def test_a_run_with_nothing_has_everything_left_and_a_page(tmp_path: Path) -> None:
    made = Made(tmp_path / "made")

    found = made.overview()

    assert {step.state for stage in found.stages for step in stage.steps} == {"left"}
    assert step_of(found, "sscd").left == 3
    assert found.manifest is None
    assert not any(collection.crawled for collection in found.collections)
    assert not (tmp_path / "made" / "run").exists()
    assert "not finished" in Path(write_report(made.context, made.plan)).read_text()
    assert "pool: not crawled yet" in found.lines()


@pytest.mark.parametrize("last", [step.name for step in build_plan(parse(RunConfig, {}, "x")).steps])
def test_any_point_of_a_run_has_an_overview_and_a_page(tmp_path: Path, last: str) -> None:
    made = Made(tmp_path / "made").through(last, shards=1)

    found = made.overview()

    assert json.loads(json.dumps(found.as_dict()))["stages"]
    assert found.lines()
    assert write_report(made.context, made.plan).endswith("/report.html")


def test_a_run_in_an_object_store_looks_the_same(finished: Made, tmp_path: Path) -> None:
    stored = Made(finished.folder)
    stored.run = Run("memory://overview/run")
    stored.context = Context(stored.run, stored.config)
    stored.through("manifest_verdict")

    there, here = stored.overview(), finished.overview()

    assert (there.collections, there.manifest) == (here.collections, here.manifest)
    assert write_report(stored.context, stored.plan) == "memory://overview/run/report.html"
    assert len(pictures(stored.run.read_bytes("report.html").decode())) == 7


def test_an_overview_writes_nothing(finished: Made, tmp_path: Path) -> None:
    before = tree_of(tmp_path)

    finished.overview()
    report_data(finished.context, finished.plan)

    assert tree_of(tmp_path) == before


def test_a_finished_run_is_done_and_its_funnel_is_the_manifests(finished: Made) -> None:
    found = finished.overview()

    assert {step.state for stage in found.stages for step in stage.steps} == {"done"}
    assert found.manifest is not None
    assert found.manifest.current
    marker = finished.run.artefact_marker("manifest_verdict")
    assert marker is not None
    summary = json.loads(finished.run.read_bytes(marker.files["manifest.json"]))
    assert (found.manifest.digest, found.manifest.num_images) == (summary["digest"], 3)
    assert [summary["consent"][name] for name in ("robots", "page", "headers", "tdm")] == [True] * 4
    for collection in found.collections[:2]:
        rows = [(entry.stage, entry.num_in, entry.num_out, entry.rejected) for entry in collection.funnel]
        assert rows == [(e["stage"], e["in"], e["out"], e["rejected"]) for e in summary["funnel"][collection.name]]


def test_the_funnel_reconciles_at_every_stage(finished: Made) -> None:
    for collection in finished.overview().collections:
        left = collection.num_rows
        for entry in collection.funnel:
            assert entry.num_in == left
            assert sum(entry.rejected.values()) == entry.num_in - entry.num_out
            left = entry.num_out
        rejected = sum(sum(entry.rejected.values()) for entry in collection.funnel)
        assert left + rejected == collection.num_rows


def test_verdicts_that_are_not_finished_are_left_out_of_the_funnel(tmp_path: Path) -> None:
    made = Made(tmp_path / "made").through("fetch", shards=1)

    pool = pool_of(made.overview())

    assert [entry.stage for entry in pool.funnel] == ["crawl"]
    assert pool.fetch is not None
    assert (pool.fetch.num_rows, pool.fetch.num_kept, pool.fetch.rejected) == (6, 5, {"http_404": 1})


def test_units_left_are_counted(tmp_path: Path) -> None:
    step = step_of(Made(tmp_path / "made").through("nsfw", shards=1).overview(), "nsfw")

    assert (step.done, step.left, step.state) == (2, 1, "started")  # the pool's first shard, and the seeds


def test_a_moved_threshold_is_stale_in_its_verdict_and_named(finished: Made) -> None:
    moved = Made(finished.folder, nsfw={"weights": str(finished.folder / "nsfw.onnx"), "max_score": 0.2})
    moved.run, moved.context = finished.run, Context(finished.run, moved.config)

    found = moved.overview()

    assert step_of(found, "nsfw").state == "done"
    step = step_of(found, "nsfw_verdict")
    assert (step.done, step.stale, step.changed) == (0, 3, ("settings",))
    assert any("nsfw_verdict: 3 units made with other settings" in line for line in found.lines())


def test_a_protected_step_is_kept_unless_its_tables_are_of_other_images(finished: Made) -> None:
    moved = Made(finished.folder, fetch={"max_redirects": 1})

    fetch = step_of(overview(Context(finished.run, moved.config), moved.plan), "fetch")
    table = finished.run.read_table("pool", "fetch", 0)
    fields = {"fingerprint": "f", "files": {}}
    finished.run.commit("pool", "fetch", 0, table.set_column(1, "width", pa.array([1] * 6, pa.int32())), fields)
    faces = step_of(finished.overview(), "faces")

    assert (fetch.stale, fetch.changed, fetch.kept) == (4, ("settings",), True)
    assert (faces.stale, faces.changed, faces.kept) == (1, ("table fetch",), False)


def test_a_new_collection_leaves_its_units_and_makes_reduces_stale(finished: Made) -> None:
    seeds = {
        "s": {"inputs": [{"kind": "folder", "path": "/s"}], "k": 2},
        "t": {"inputs": [{"kind": "folder", "path": "/t"}]},
    }
    more = Made(finished.folder, seeds=seeds)
    more.run, more.context = finished.run, Context(finished.run, more.config)

    found = more.overview()

    assert (step_of(found, "nsfw").done, step_of(found, "nsfw").left) == (3, 1)
    assert step_of(found, "dedup").changed == ("collection seeds/t",)
    assert found.manifest is not None
    assert not found.manifest.current


def test_a_list_of_domains_of_which_some_lines_are_left_out_is_told_of(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CURATION_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "hosts.txt"
    path.write_text("a.example\n" * 20 + "http://b.example/\n")
    config = parse(RunConfig, {"fetch": {"policy": {"blocked_domains": [str(path)]}}}, "test")

    found = overview(Context(Run(tmp_path / "run"), config), build_plan(config))

    assert f"  fetch: fetch.policy: {path}: 1 of 21 entries name no domain and are left out, the first in line 21" in (
        found.lines()
    )


def test_missing_weights_are_a_problem_of_their_steps_only(finished: Made) -> None:
    gone = Made(finished.folder, sscd={"weights": "/nowhere/sscd.onnx"})
    gone.run, gone.context = finished.run, Context(finished.run, gone.config)

    found = gone.overview()

    step = step_of(found, "sscd")
    assert (step.state, step.done) == ("unknown", 4)
    assert "/nowhere/sscd.onnx" in step.problem
    assert step_of(found, "nsfw").state == "done"


def test_work_of_a_reduce_is_counted_once_and_rates_are_of_its_rows(finished: Made) -> None:
    found = finished.overview()

    assert step_of(found, "nsfw").seconds == pytest.approx(1.5)
    assert step_of(found, "nsfw").rows_per_s == pytest.approx(14 / 1.5)
    assert step_of(found, "dedup").seconds == pytest.approx(0.5)
    assert step_of(found, "index").rows_per_s is None


def test_hosts_are_counted_with_their_failures(finished: Made) -> None:
    pool = pool_of(finished.overview())

    assert pool.fetch is not None
    assert [(host.host, host.num_rows, host.num_failed) for host in pool.fetch.hosts] == [
        ("b.example", 7, 0),
        ("a.example", 3, 0),
        ("bad.example", 2, 2),
    ]
    assert pool.skipped == {"bad_url": 3}
    assert pool.image_bytes > 0


def test_status_and_report_say_what_became_of_links_and_which_hosts_failed_why(finished: Made) -> None:
    lines = finished.overview().lines()
    page = Path(write_report(finished.context, finished.plan)).read_text()

    start = lines.index("  fetched: 12 links")
    assert [line.split() for line in lines[start + 1 : start + 6]] == [
        ["image", "10", "83.3", "%"],
        ["http_404", "1", "8.3", "%"],
        ["timeout", "1", "8.3", "%"],
        ["failures", "by", "host:"],
        ["bad.example", "2", "of", "2", "http_404", "1,", "timeout", "1"],
    ]
    assert "<h2>Fetched</h2>" in page
    assert "http_404 1, timeout 1" in page
    (pool, *_) = finished.overview().as_dict()["collections"]
    assert pool["fetch"]["failing"][0]["rejected"] == {"http_404": 1, "timeout": 1}


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:secret@a.example:8080/x@y", "a.example"),
        ("http://[::1]:80/x", "[::1]"),
        ("file:///folder/x.jpg", ""),
        ("https://a.example?q=http://b.example/", "a.example"),
        ("no url", ""),
    ],
)
def test_a_host_is_what_stands_between_user_and_port(url: str, host: str) -> None:
    hosts = HostTally()

    hosts.add(pa.chunked_array([[url]]), pa.chunked_array([["dns"]]))

    assert [(found.host, found.num_failed) for found in hosts.top(1)] == [(host, 1)]


def test_more_hosts_than_fit_keep_the_largest_and_say_so() -> None:
    hosts = HostTally(max_hosts=4)

    for start in range(0, 40, 4):
        urls = [f"https://{index}.example/" for index in range(start, start + 4)] + ["https://big.example/"] * 2
        hosts.add(pa.chunked_array([urls]), pa.chunked_array([pa.nulls(6, pa.string())]))

    assert not hosts.exact
    assert hosts.top(1)[0].host == "big.example"
    assert hosts.top(1)[0].num_rows == 20


def test_a_table_that_a_writer_replaces_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "_PAUSE_S", 0)
    reads = []

    def read() -> int:
        reads.append(0)
        if len(reads) < 3:
            raise CorruptError("gone")
        return 7

    assert tallies.steadily(read) == 7


def test_seed_sets_have_nominal_and_different_counts(finished: Made) -> None:
    rows = report_data(finished.context, finished.plan).seeds

    assert [(row.kind, row.num_images, row.nominal, row.unique, row.final) for row in rows] == [
        ("as is", 2, None, None, 2),
        ("sample, k = 2", 2, 4, 2, 1),  # the other one is on a takedown list
    ]


def test_components_are_counted_and_the_largest_come_first(finished: Made) -> None:
    found = report_data(finished.context, finished.plan).components

    assert found is not None
    assert found.num_singles == 2
    assert [(b.smallest, b.largest, b.num_components, b.num_images) for b in found.bins] == [(2, 2, 1, 2), (3, 4, 1, 4)]
    assert [component.num_images for component in found.largest] == [4, 2]
    members = found.largest[0].members
    assert [member.image_id for member in members] == [ident(name) for name in "akcb"]  # then the least like it
    assert [member.similarity for member in members[1:]] == pytest.approx([0.65, 0.7, 0.9])


def test_taken_down_images_are_not_shown(finished: Made) -> None:
    data = report_data(finished.context, finished.plan)

    assert data.components is not None
    representative, copy = data.components.largest[1].members
    assert (representative.reason, representative.url, representative.thumbnail) == ("excluded_id", "", None)
    assert copy.thumbnail is not None


def test_thumbnails_are_small_and_made_from_blurred_images_only(finished: Made) -> None:
    page = Path(write_report(finished.context, finished.plan)).read_text()

    shown = pictures(page)
    assert len(shown) == 7  # 5 of components, 2 of clusters
    for picture in shown:
        assert max(picture.size) <= THUMBNAIL_PX
        red, green, _ = np.asarray(picture.convert("RGB")).mean(axis=(0, 1))
        assert red < 60 < 150 < green  # never the colour of the raw tar


def test_an_image_without_blurred_bytes_has_no_picture(finished: Made) -> None:
    for shard in (0, 1):
        (Path(finished.run.root) / "pool" / "faces" / f"{shard:08d}.json").unlink()

    page = Path(write_report(finished.context, finished.plan)).read_text()

    assert not pictures(page)
    assert page.count("no picture") == 9  # 6 of components, 3 of clusters


def test_blurred_bytes_that_are_not_what_the_table_says_are_not_shown(finished: Made) -> None:
    for tar in (Path(finished.run.root) / "pool" / "images").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(jpeg((10, 200, 0))[100:140], b"x" * 40))

    data = report_data(finished.context, finished.plan)

    assert data.components is not None
    assert data.components.largest[0].members[0].thumbnail is None


def test_an_image_at_a_threshold_that_has_just_moved_is_not_shown(finished: Made) -> None:
    moved = Made(finished.folder, nsfw={"weights": str(finished.folder / "nsfw.onnx"), "max_score": 0.25})

    data = report_data(Context(finished.run, moved.config), moved.plan)

    assert data.components is not None
    shown = {member.image_id: member.thumbnail is not None for member in data.components.largest[0].members}
    assert shown == {ident("a"): True, ident("b"): True, ident("c"): True, ident("k"): False}


def test_a_hostile_address_is_only_text(finished: Made) -> None:
    page = Path(write_report(finished.context, finished.plan)).read_text()

    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:image/jpeg;base64,)""", page)


def test_the_report_shows_clusters_of_what_may_be_shown(finished_folder: Path) -> None:
    found = report_data(Made(finished_folder).context, Made(finished_folder).plan).clusters

    assert found is not None
    assert (found.num_clusters, found.num_empty, len(found.drawn)) == (2, 1, 0)
    (cluster,) = found.largest
    assert (cluster.cluster_id, cluster.num_images, cluster.seeds) == (1, 3, (("s", 2),))
    assert [member.image_id for member in cluster.nearest] == [ident("h"), ident("a"), ident("g")]
    assert [member.similarity for member in cluster.nearest] == pytest.approx([0.5, 0.4, 0.4])
    hidden, *shown = cluster.nearest
    assert (hidden.reason, hidden.thumbnail, hidden.url) == ("excluded_id", None, "")
    assert all(member.thumbnail is not None for member in shown)
    assert cluster.others == ()


def test_status_says_how_new_images_lie_in_the_clusters(finished_folder: Path) -> None:
    found = Made(finished_folder).overview()

    assert found.drift is not None
    assert (found.drift.num_compared, found.drift.num_new_images) == (3, 0)
    assert "clusters  none of 3 images is newer than the centroids" in found.lines()
    json.dumps(found.as_dict())
