"""The search for near-duplicates as tasks: numbered, resumed, extended, and the same whoever runs them."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation import schema, settings
from curation.config import RunConfig
from curation.errors import StageError
from curation.fingerprint import fingerprint
from curation.pipelines import blocks
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, bring_up
from curation.pipelines.freshness import assess
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.overview import overview
from curation.pipelines.process_runner import ProcessRunner
from curation.pipelines.units import Done, crawl_marker
from curation.settings import parse
from curation.store import Marker, Run

ROWS = 40  # of a shard
DIM = 64


class Made:
    """A run whose descriptors are written by hand: everything before ``dedup`` is finished."""

    def __init__(self, url: str | Path, num_shards: int = 6, **dedup: Any) -> None:
        inputs = {"inputs": [{"kind": "folder", "path": "/images"}]}
        tree = {
            "pool": inputs,
            "seeds": {"s": inputs},
            "references": {"r": inputs, "empty": inputs},
            "dedup": {"max_dropped_fraction": 1.0, "block_rows": 2 * ROWS, **dedup},
        }
        self.config = parse(RunConfig, tree, "test")
        self.run = Run(url)
        self.plan = build_plan(self.config)
        self.shards = {"pool": num_shards, "seeds/s": 1, "references/r": 2, "references/empty": 0}
        self._write()

    def bring(self, runner: Any = None, **request: Any) -> list[Any]:
        events: list[Any] = []
        bring_up(self.context, self.plan, Request("dedup", **request), runner or LocalRunner(2), events.append)
        return events

    @property
    def context(self) -> Context:
        return Context(self.run, self.config)

    def _write(self) -> None:
        for step in self.plan.steps:
            if step.stage == "dedup":
                return
            for found in list(assess(self.context, self.plan, step)):
                if found.state == "done":
                    continue
                unit = found.unit
                fields = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "covers": unit.covers}
                if step.kind == "crawl":
                    self._crawl(unit.collection, fields)
                elif step.kind == "reduce":
                    for collection in ("pool", "seeds/s") if step.writes else ():
                        for shard in range(self.shards[collection]):
                            self._commit(step.name, collection, shard, fields)
                    self.run.commit_artefacts(step.name, {}, Marker(digest=step.name, num_rows=0, files={}, **fields))
                else:
                    self._commit(step.name, unit.collection, unit.shard, fields)

    def _crawl(self, collection: str, fields: dict[str, Any]) -> None:
        num_shards = self.shards[collection]
        made = [self._commit("crawl", collection, shard, fields) for shard in range(num_shards)]
        digest = fingerprint({"shards": [marker.digest for marker in made]})
        marker = Marker(**fields, digest=digest, num_rows=num_shards * ROWS, files={}, num_shards=num_shards)
        self.run.commit_artefacts(crawl_marker(collection), {}, marker)

    def grow(self, num_shards: int) -> None:
        """Add shards of new images to the pool."""
        self.shards["pool"] = num_shards
        marker = self.run.artefact_marker(crawl_marker("pool"))
        self._crawl("pool", {name: asdict(marker)[name] for name in ("fingerprint", "inputs", "covers")})
        self._write()

    def _commit(self, name: str, collection: str, shard: int, fields: dict[str, Any]) -> Marker:
        number = {"pool": 0, "seeds/s": 1, "references/r": 2}[collection] * 1000 + shard
        random = np.random.default_rng(number)
        ids = [f"{number:08x}{row:08x}".ljust(32, "0") for row in range(ROWS)]
        columns: dict[str, Any] = {}
        if name == "crawl":
            columns = {"url": [f"file:///{collection}/{image_id}" for image_id in ids]}
        elif name == "fetch":
            sizes = random.integers(10, 14, ROWS)
            columns = {"image_id": ids, "width": sizes, "height": sizes, "num_bytes": sizes}
            columns["reject_reason"] = ["http_404" if row % 9 == 4 else None for row in range(ROWS)]
            if (collection, shard) == ("pool", 3):  # no row of it is kept
                columns["reject_reason"] = ["http_404"] * ROWS
        elif name == "sscd":
            shown = {"pool": range(60), "seeds/s": range(8), "references/r": range(50, 60)}[collection]
            columns = {"sscd": _descriptors(random, shown)}
        if name == "faces":
            tar = f"{collection}/images/{shard:08d}-0.tar"
            self.run.write_bytes(tar, b"")
            fields = {**fields, "files": {"images": tar}}
        step = self.plan.step(name)
        assert step.writes is not None
        arrays = [
            columns[field.name]
            if field.name == "sscd"
            else pa.array(columns.get(field.name, [None] * ROWS), field.type)
            for field in step.writes.schema
        ]
        types = [array.type for array in arrays]
        table = pa.table(arrays, pa.schema(list(zip(step.writes.schema.names, types, strict=True))))
        return self.run.commit(collection, name, shard, table, fields)


def _descriptors(random: np.random.Generator, shown: range) -> pa.Array:
    """Images of some of 60 subjects; a broken one and one that is all zeros."""
    subjects = np.random.default_rng(99).normal(size=(60, DIM))
    vectors = subjects[random.choice(shown, ROWS)] + 0.5 * random.normal(size=(ROWS, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7], vectors[8] = np.nan, 0
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, DIM, mask=pa.array([row % 9 == 4 for row in range(ROWS)]))


def verdicts(made: Made) -> list[dict[str, Any]]:
    tables = [
        made.run.read_table(collection, "dedup", shard)
        for collection in ("pool", "seeds/s")
        for shard in range(made.shards[collection])
    ]
    return pa.concat_tables(tables).to_pylist()


def blocks_done(events: list[Any]) -> dict[str, set[int | None]]:
    found: dict[str, set[int | None]] = {}
    for event in events:
        if isinstance(event, Done) and event.unit.step == "dedup_edges":
            found.setdefault(event.unit.collection, set()).add(event.unit.shard)
    return found


def block_digests(made: Made) -> dict[tuple[str, int], str]:
    step = made.plan.step("dedup_edges")
    return {
        (folder, number): marker.digest
        for folder in blocks.places(made.context, step)
        for number, marker in made.run.markers(folder, step.name).items()
    }


BACKENDS = {"exact": {"backend": "exact"}, "inverted": {"backend": "inverted", "recall": 0.9}}
both = pytest.mark.parametrize("backend", list(BACKENDS))


@pytest.fixture(scope="module", params=list(BACKENDS))
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, list[Any]]:
    """A finished run, and its verdicts."""
    made = Made(tmp_path_factory.mktemp("made") / "run", **BACKENDS[request.param])
    made.bring()
    return made, verdicts(made)


def again(expected: tuple[Made, list[Any]], url: str | Path, **changes: Any) -> Made:
    config = expected[0].config.dedup
    kept = {"backend": config.backend, "recall": config.recall}
    return Made(url, **{**kept, **changes})


def test_there_is_something_to_find(expected):
    found = {verdict["reject_reason"] for verdict in expected[1]}

    assert found == {None, "near_duplicate", "seed_copy", "reference_copy"}


@pytest.mark.parametrize("num_right", [None, 9])
def test_numbers_of_blocks_stay_when_there_are_more_groups(num_right):
    few = list(blocks.numbers(5, num_right and 4))
    many = list(blocks.numbers(12, num_right))

    assert len({number for number, _, _ in many}) == len(many)
    assert set(few) <= set(many)
    assert {(i, j) for _, i, j in few} == {
        (i, j) for i in range(5) for j in range((num_right and 4) or 5) if num_right or i <= j
    }


def test_groups_are_full_and_a_shard_that_is_too_large_is_alone(tmp_path):
    made = Made(tmp_path / "run", num_shards=5, block_rows=ROWS - 1)
    two = Made(tmp_path / "run", num_shards=5, block_rows=3 * ROWS - 1)

    assert [(span.first, span.stop) for span, _ in blocks.groups(made.context, "pool")] == [
        (shard, shard + 1) for shard in range(5)
    ]
    assert [(span.first, span.stop) for span, _ in blocks.groups(two.context, "pool")] == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.parametrize("block_rows", [ROWS, 5 * ROWS, 10**6])
def test_blocks_of_any_size_give_the_same_verdicts(expected, tmp_path, block_rows):
    made = again(expected, tmp_path / "run", block_rows=block_rows)
    give_fit(expected[0], made)

    made.bring()

    assert verdicts(made) == expected[1]


def test_processes_give_the_same_verdicts(expected, tmp_path):
    made = again(expected, tmp_path / "run")
    runner = ProcessRunner(2)
    try:
        made.bring(runner)
    finally:
        runner.close()

    assert verdicts(made) == expected[1]
    assert block_digests(made) == block_digests(expected[0])


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_verdicts(expected, tmp_path, ray_runner):
    made = again(expected, tmp_path / "run")

    made.bring(ray_runner)

    assert verdicts(made) == expected[1]
    assert block_digests(made) == block_digests(expected[0])


def test_another_threshold_searches_nothing_again(expected, tmp_path):
    made = again(expected, "memory://blocks-threshold" + expected[0].config.dedup.backend)
    made.bring()
    moved = again(expected, made.run.url, threshold=0.8, reference_threshold=0.5)

    events = moved.bring()

    assert {event.unit.step for event in events if isinstance(event, Done)} == {"dedup"}
    fresh = again(expected, tmp_path / "fresh", threshold=0.8, reference_threshold=0.5)
    fresh.bring()
    assert verdicts(moved) == verdicts(fresh) != expected[1]


def test_a_lower_floor_searches_what_it_concerns_again(tmp_path):
    Made(tmp_path / "run", backend="exact").bring()

    events = Made(tmp_path / "run", backend="exact", reference_floor=0.3).bring()

    assert blocks_done(events).keys() == {
        "edges/pool+references.r", "edges/seeds.s+references.r",
    }  # fmt: skip


def test_a_new_shard_makes_its_blocks_and_equals_a_run_from_scratch(expected, tmp_path):
    made = again(expected, tmp_path / "run", num_shards=5)  # two full groups, and one with a shard
    made.bring()
    made.grow(6)

    events = made.bring()

    assert blocks_done(events)["edges/pool+pool"] == {3, 4, 5}  # those of the third group
    assert blocks_done(events)["edges/pool+references.r"] == {6}
    assert "edges/seeds.s+references.r" not in blocks_done(events)
    scratch = again(expected, tmp_path / "scratch")
    give_fit(made, scratch)
    scratch.bring()
    assert verdicts(made) == verdicts(scratch)


def give_fit(donor: Made, made: Made) -> None:
    """Let a run search with what another one fitted."""
    (found,) = assess(made.context, made.plan, made.plan.step("dedup_fit"))
    fitted = donor.run.artefact_marker("dedup_fit")
    files = {name: Path(donor.run.path(path)) for name, path in fitted.files.items()}
    causes = {"fingerprint": found.unit.fingerprint, "inputs": found.unit.inputs}
    made.run.commit_artefacts("dedup_fit", files, Marker(**{**asdict(fitted), "files": {}, "sizes": {}, **causes}))


def test_fewer_shards_leave_no_blocks_behind(tmp_path):
    made = Made(tmp_path / "run", backend="exact")
    made.bring()
    made.shards["pool"] = 2
    marker = made.run.artefact_marker(crawl_marker("pool"))
    made._crawl("pool", {name: asdict(marker)[name] for name in ("fingerprint", "inputs", "covers")})
    made._write()

    made.bring()

    assert {number for folder, number in block_digests(made) if folder == "edges/pool+pool"} == {0}
    files = list((tmp_path / "run" / "edges").rglob("*.parquet"))
    assert len(files) == len(block_digests(made))
    small = Made(tmp_path / "small", num_shards=2, backend="exact")
    small.bring()
    assert verdicts(made) == verdicts(small)


def test_a_block_that_is_lost_is_made_again_and_nothing_else(tmp_path):
    made = Made(tmp_path / "run", backend="exact")
    made.bring()
    before = verdicts(made)
    next((tmp_path / "run" / "edges" / "pool+pool" / "dedup_edges").glob("00000002-*.parquet")).unlink()

    events = made.bring()

    assert blocks_done(events) == {"edges/pool+pool": {2}}
    assert verdicts(made) == before


def test_stopping_between_blocks_keeps_those_that_are_finished(expected, tmp_path):
    made = again(expected, tmp_path / "run")
    context = made.context
    done: list[Any] = []

    def stop_soon(event: Any) -> None:
        if isinstance(event, Done) and event.unit.step == "dedup_edges":
            done.append(event)

    context.should_stop = lambda: len(done) >= 4
    with pytest.raises(KeyboardInterrupt):
        bring_up(context, made.plan, Request("dedup"), LocalRunner(1), stop_soon)

    rest = blocks_done(made.bring())

    assert sum(map(len, rest.values())) == len(block_digests(made)) - len(block_digests_of(done))
    assert verdicts(made) == expected[1]


def block_digests_of(done: list[Any]) -> set[tuple[str, int]]:
    return {(event.unit.collection, event.unit.shard) for event in done}


_KILLED = """
import sys
from curation import settings
from curation.config import RunConfig
from curation.pipelines import blocks, work
from curation.pipelines.context import Context
from curation.pipelines.driver import Request, bring_up
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.store import Run
import os, signal

config = settings.load(RunConfig, sys.argv[2])
write, left = Run.write_marker, [int(sys.argv[3])]

def dying(self, collection, step, shard, marker):
    if step == "dedup_edges":
        left[0] -= 1
        if left[0] < 0:  # its file is written, its marker is not
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, collection, step, shard, marker)

Run.write_marker = dying
bring_up(Context(Run(sys.argv[1]), config), build_plan(config), Request("dedup"), LocalRunner(1))
"""


@pytest.mark.parametrize("num_finished", [0, 5])
def test_kill_9_in_the_middle_of_a_block_costs_that_block(expected, tmp_path, num_finished):
    made = again(expected, tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(settings.dump(made.config))
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "run"), str(config), str(num_finished)]

    killed = subprocess.run(command, env=os.environ, capture_output=True)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = block_digests(made)
    assert len(finished) == num_finished
    made.bring()
    assert block_digests(made).items() >= finished.items()
    assert verdicts(made) == expected[1]
    assert len(list((tmp_path / "run" / "edges").rglob("*.parquet"))) == len(block_digests(made))


def test_the_overview_counts_blocks(expected):
    made = expected[0]

    found = {step.name: step for stage in overview(made.context, made.plan).stages for step in stage.steps}

    assert found["dedup_edges"].done == len(block_digests(made)) == 6 + 3 + 3 + 1
    assert found["dedup_edges"].state == "done"
    assert found["dedup_edges"].num_rows > 0


def test_a_bad_threshold_stops_and_keeps_edges_and_audit(tmp_path):
    made = Made(tmp_path / "run", backend="exact", max_dropped_fraction=0.01)
    with pytest.raises(StageError, match=r"stopped/dedup/audit\.parquet"):
        made.bring()

    events = Made(tmp_path / "run", backend="exact").bring()

    assert (tmp_path / "run" / "stopped" / "dedup" / "audit.parquet").exists()
    assert {event.unit.step for event in events if isinstance(event, Done)} == {"dedup"}


def test_redo_searches_again_and_finds_the_same(tmp_path):
    made = Made(tmp_path / "run", backend="exact")
    made.bring()
    before, found = block_digests(made), verdicts(made)

    events = made.bring(redo=frozenset({"dedup"}))

    assert sum(map(len, blocks_done(events).values())) == len(before)
    assert (block_digests(made), verdicts(made)) == (before, found)


def test_a_verdict_that_keeps_the_same_rows_searches_nothing_again(tmp_path):
    made = Made(tmp_path / "run", backend="exact")
    made.bring()
    marker = made.run.marker("pool", "nsfw_verdict", 0)
    reasons = ["nsfw" if row % 9 == 4 else None for row in range(ROWS)]  # rows that were rejected before
    fields = {name: asdict(marker)[name] for name in ("fingerprint", "inputs", "covers")}
    made.run.commit("pool", "nsfw_verdict", 0, pa.table([pa.array(reasons)], schema.NSFW_VERDICT.schema), fields)
    made._write()  # what lies between that verdict and dedup, with the same content

    events = made.bring()

    assert "dedup_codes" in {event.unit.step for event in events if isinstance(event, Done)}
    assert not blocks_done(events)


def test_a_run_that_an_earlier_version_made_gets_what_it_lacks(expected, tmp_path):
    """That version had one reduce, without blocks and the steps before them."""
    made = again(expected, tmp_path / "run")
    made.bring()
    for shard in range(made.shards["pool"]):
        marker = made.run.marker("pool", "dedup", shard)
        made.run.write_marker("pool", "dedup", shard, replace(marker, inputs={"version": "1"}, fingerprint="old"))
    marker = made.run.artefact_marker("dedup")
    made.run.commit_artefacts("dedup", {}, replace(marker, inputs={"version": "1"}, fingerprint="old", sizes={}))
    shutil.rmtree(tmp_path / "run" / "edges")
    for folder in tmp_path.glob("run/**/dedup_codes"):
        shutil.rmtree(folder)
    made.run.forget("", "dedup_fit", None)
    assert overview(made.context, made.plan).lines()

    made.bring()

    assert verdicts(made) == expected[1]
