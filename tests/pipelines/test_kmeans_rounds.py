"""Fits in rounds: over a run that holds nothing but the tables that the fit reads."""

import errno
import logging
import os
import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation import schema
from curation.config import RunConfig
from curation.config.selection import ClusterConfig
from curation.errors import DiskFullError, StageError, StoreError, VectorError
from curation.indexes import assignment, kmeans
from curation.indexes.hierarchy import Tree
from curation.indexes.keys import hex_from_keys
from curation.pipelines import kmeans_rounds
from curation.pipelines.context import Context
from curation.pipelines.local_runner import LocalRunner
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.process_runner import ProcessRunner
from curation.pipelines.units import Unit, cores_of_each
from curation.stages.cluster import CENTROIDS_FILE, HISTORY_FILE, TREE_FILE
from curation.store import Marker, Run

ROWS, DIM = 600, 16
CONFIG = ClusterConfig(num_clusters=12, iterations=5, sample_size=None, levels=(4,), resampling_rounds=1)
VERDICTS = (schema.PCA_HASH_VERDICT, schema.NSFW_VERDICT, schema.FACES_VERDICT, schema.DEDUP)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, DIM))[rng.integers(0, 20, ROWS)] + 0.5 * rng.standard_normal((ROWS, DIM))
    vectors = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    return vectors, rng.integers(0, 2**64, (ROWS, 2), dtype=np.uint64)


def planted(url, vectors, keys, shard_rows):
    """Return a run whose pool has these embeddings; every tenth image is rejected."""
    run = Run(url)
    said = {"fingerprint": "f", "inputs": {}, "covers": "", "seconds": 0.0}
    starts = range(0, len(keys), shard_rows)
    for shard, start in enumerate(starts):
        rows = slice(start, start + shard_rows)
        count = len(keys[rows])
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].reshape(-1)), vectors.shape[1])
        columns = {"image_id": pa.array(hex_from_keys(keys[rows])), "embedding": flat}
        reject = pa.array(np.where(keys[rows, 1] % 10 == 0, "nsfw", ""), mask=keys[rows, 1] % 10 != 0)
        tables = {"crawl": schema.CRAWL, "fetch": schema.FETCH, "embed": schema.embed(vectors.shape[1])}
        for name, table in tables.items():
            made = [columns.get(field.name, pa.nulls(count, field.type)) for field in table.schema]
            run.commit("pool", name, shard, pa.table(made, schema=table.schema), said)
        for verdict in VERDICTS:
            made = [
                reject if (field.name, verdict) == ("reject_reason", schema.DEDUP) else pa.nulls(count, field.type)
                for field in verdict.schema
            ]
            run.commit("pool", verdict.name, shard, pa.table(made, schema=verdict.schema), said)
    run.commit_artefacts("crawl.pool", {}, Marker("f", "d", len(keys), {}, num_shards=len(starts)))
    return run


def fitted(run, runner, config=CONFIG, should_stop=lambda: False):
    """Fit; return the bytes of the artefacts."""
    context = Context(run, RunConfig(seed=7, cluster=config), should_stop)
    plan = build_plan(context.config)
    step = plan.step("cluster_fit")
    done = list(kmeans_rounds.run(runner, context, plan, step, [Unit(step.name, "", None, {"settings": "s"})]))
    assert should_stop() or len(done) == 1
    marker = run.artefact_marker("cluster_fit")
    return {name: run.read_bytes(marker.files[name]) for name in (CENTROIDS_FILE, HISTORY_FILE, TREE_FILE)}


@pytest.fixture(scope="module")
def expected(points, tmp_path_factory):
    """What one process makes of one shard."""
    return fitted(planted(tmp_path_factory.mktemp("whole"), *points, ROWS), LocalRunner())


@pytest.mark.parametrize(("shard_rows", "workers"), [(50, 1), (60, 2), (7, 3), (299, 2)])
def test_centroids_are_the_same_bits_for_any_shards_and_workers(shard_rows, workers, points, expected, tmp_path):
    run = planted(tmp_path, *points, shard_rows)

    assert fitted(run, LocalRunner(workers)) == expected
    assert not run.exists("work/cluster_fit")


@pytest.mark.parametrize("sample_size", [1, 100, 500])
def test_a_sample_is_the_same_in_rounds_as_in_one_process(sample_size, points, tmp_path):
    config = CONFIG.model_copy(update={"sample_size": sample_size, "num_clusters": 8})
    whole = fitted(planted(tmp_path / "whole", *points, ROWS), LocalRunner(), config)

    assert fitted(planted(tmp_path / "parts", *points, 150), LocalRunner(2), config) == whole


def test_parts_have_at_least_four_points_a_cluster_and_cover_every_shard_once():
    config = ClusterConfig(num_clusters=100, sample_size=None)
    groups = kmeans_rounds.split(dict.fromkeys(range(10), 150), config)

    assert groups == [(0, 1, 2), (3, 4, 5), (6, 7, 8, 9)]
    assert kmeans_rounds.split(dict.fromkeys(range(10), 15), config) == [tuple(range(10))]
    assert kmeans_rounds.split({}, config) == []
    sampled = ClusterConfig(num_clusters=100, sample_size=750)
    assert [len(group) for group in kmeans_rounds.split(dict.fromkeys(range(10), 150), sampled)] == [10]


@pytest.mark.parametrize(
    ("workers", "units", "cores"), [(4, 1, 4), (4, 2, 2), (4, 3, 1), (64, 1, 8), (1, 9, 1), (3, 0, 3)]
)
def test_units_share_the_cores_that_workers_would_have(workers, units, cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    assert cores_of_each(workers, [Unit("cluster_fit", "", None, {})] * units) == cores


@pytest.mark.parametrize(("shard_rows", "threads"), [(ROWS, 3), (50, 1)], ids=["alone", "in parts"])
def test_a_fit_alone_has_the_cores_of_all_workers(shard_rows, threads, points, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    seen = set()

    @contextmanager
    def watched(num_threads=None, workers=assignment.workers):
        seen.add(num_threads)
        with workers(num_threads) as found:
            yield found

    monkeypatch.setattr(kmeans, "workers", watched)

    assert fitted(planted(tmp_path, *points, shard_rows), LocalRunner(3)) == expected
    assert threads in seen
    assert (3 in seen) == (threads == 3)


class Interrupted(LocalRunner):
    """Fails after a number of units."""

    def __init__(self, error, units):
        super().__init__()
        self.error, self.left = error, units

    def run(self, context, plan, step, units):
        for done in super().run(context, plan, step, units):
            self.left -= 1
            if self.left < 0:
                raise self.error
            yield done


@pytest.mark.parametrize("units", [0, 5, 12, 14, 35, 59])
def test_a_fit_that_was_killed_goes_on_from_its_last_round_to_the_same_bits(units, points, expected, tmp_path):
    run = planted(tmp_path, *points, 50)  # 12 parts
    with pytest.raises(StageError, match="killed"):
        fitted(run, Interrupted(StageError("cluster", None, "killed"), units))
    rounds = units // 12

    counting = Interrupted(AssertionError("more rounds than were left"), 12 * (6 - rounds))
    assert fitted(run, counting) == expected


def test_a_full_disk_in_an_iteration_is_said_and_leaves_the_last_state(points, expected, tmp_path, monkeypatch):
    run = planted(tmp_path, *points, 50)
    written = []

    def full(self, path, save=kmeans.PartialSums.save):
        written.append(path)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path)

    monkeypatch.setattr(kmeans.PartialSums, "save", full)
    with pytest.raises(DiskFullError, match="no space left"):
        fitted(run, LocalRunner(2))
    monkeypatch.undo()

    assert list(tmp_path.glob("work/cluster_fit/*/state-3.npz"))
    assert fitted(run, Interrupted(AssertionError, 3 * 12)) == expected


@pytest.mark.parametrize("what", [kmeans.Centroids, kmeans.PartialSums, Tree])
def test_a_full_folder_of_temporary_files_is_named(points, expected, tmp_path, monkeypatch, what):
    run = planted(tmp_path / "run", *points, 50)
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    monkeypatch.setattr(what, "save", lambda self, path, save=what.save: save(self, Path("/dev/full")))
    with pytest.raises(DiskFullError, match=r"small \(TMPDIR\): no space left"):
        fitted(run, LocalRunner())
    monkeypatch.undo()

    assert fitted(run, LocalRunner()) == expected


def test_no_folder_for_temporary_files_is_said(points, tmp_path, monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(StoreError, match="set TMPDIR"):
        fitted(planted(tmp_path, *points, 50), LocalRunner())


def test_iterations_are_logged_by_the_process_that_does_them(points, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    runner = ProcessRunner(1)

    assert fitted(planted(tmp_path, *points, ROWS), runner) == expected

    runner.close()
    assert "curation.indexes.kmeans: k-means iteration 1: {'objective': 0." in capfd.readouterr().err


def test_a_worker_that_is_killed_in_an_iteration_costs_its_part_alone(points, expected, tmp_path):
    run = planted(tmp_path, *points, 50)
    runner = ProcessRunner(2)
    killed = []

    def kill():
        while not list(tmp_path.glob("work/cluster_fit/*/sums-*")):
            if done.wait(0.005):
                return
        process = runner._workers[0].process
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)

    done = threading.Event()
    watcher = threading.Thread(target=kill)
    watcher.start()
    try:
        assert fitted(run, runner) == expected
    finally:
        done.set()
        watcher.join()
        runner.close()
    assert killed


def test_a_state_cut_short_is_passed_over(points, expected, tmp_path):
    run = planted(tmp_path, *points, 50)
    with pytest.raises(StageError):
        fitted(run, Interrupted(StageError("cluster", None, "killed"), 30))
    (state,) = tmp_path.glob("work/cluster_fit/*/state-*.npz")
    state.write_bytes(state.read_bytes()[:-20])

    assert fitted(run, LocalRunner()) == expected


def test_other_images_do_not_go_on_with_the_files_of_a_fit(points, tmp_path):
    run = planted(tmp_path / "run", *points, 50)
    with pytest.raises(StageError):
        fitted(run, Interrupted(StageError("cluster", None, "killed"), 30))
    turned = points[0][:, ::-1].copy()
    wanted = fitted(planted(tmp_path / "other", turned, points[1], 50), LocalRunner())

    assert fitted(planted(tmp_path / "run", turned, points[1], 50), LocalRunner()) == wanted


def test_vectors_with_nan_count_as_missing_and_unnormalised_ones_are_an_error(points, expected, tmp_path):
    vectors, keys = points
    broken = np.concatenate([vectors, np.full((1, DIM), np.nan, np.float16)])
    more = np.concatenate([keys, np.ones((1, 2), np.uint64)])
    assert fitted(planted(tmp_path / "nan", broken, more, 50), LocalRunner()) == expected

    broken[-1] = 3.0
    with pytest.raises(VectorError, match="norm"):
        fitted(planted(tmp_path / "long", broken, more, 50), LocalRunner())


def test_one_and_two_ray_workers_give_the_same_bits(points, expected, tmp_path, ray_runner):
    from curation.config import ResourceConfig

    for workers in (1, 2):
        run = planted(tmp_path / str(workers), *points, 60)
        config = RunConfig(seed=7, cluster=CONFIG, resources={"cluster": ResourceConfig(workers=workers)})
        context, plan = Context(run, config), build_plan(config)
        step = plan.step("cluster_fit")
        list(kmeans_rounds.run(ray_runner, context, plan, step, [Unit(step.name, "", None, {"settings": "s"})]))
        marker = run.artefact_marker("cluster_fit")
        assert {name: run.read_bytes(marker.files[name]) for name in expected} == expected
