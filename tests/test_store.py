"""A run's files: nothing exists before its marker, nothing committed is overwritten, and damage is said by name."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from curation.errors import CorruptError, DiskFullError, StoreError, UsageError
from curation.store import Marker, Run

TABLE = pa.table({"n": pa.array(range(100)), "text": [f"row {n}" for n in range(100)]})
CAUSE = {"fingerprint": "f"}


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """An empty run on a disk, and one where nothing can be renamed."""
    if request.param == "local":
        yield Run(tmp_path / "run")
        return
    run = Run(f"memory://store-{tmp_path.name}")
    yield run
    if run.fs.exists(run.root):
        run.fs.rm(run.root, recursive=True)


def files(run: Run) -> list[str]:
    return sorted(path.removeprefix(run.root).lstrip("/") for path in run.fs.find(run.root))


def test_a_table_comes_back_as_it_was_committed(run):
    marker = run.commit("pool", "step", 17, TABLE, CAUSE)

    assert run.read_table("pool", "step", 17).equals(TABLE)
    assert run.read_table("pool", "step", 17, ["text"]).column_names == ["text"]
    assert run.marker("pool", "step", 17) == marker == run.markers("pool", "step")[17]
    assert (marker.num_rows, marker.fingerprint) == (100, "f")


def test_data_is_not_visible_before_its_marker(run):
    with run.create(run.new_path("pool", "step", 0, "parquet")) as stream:
        stream.write(b"data")

    assert run.marker("pool", "step", 0) is None
    assert run.markers("pool", "step") == {}
    with pytest.raises(CorruptError, match="pool/step shard 00000000 is not finished"):
        run.read_table("pool", "step", 0)


def test_the_marker_is_written_after_the_data_that_it_names(run, monkeypatch):
    seen = []
    write = run.write_marker

    def watched(collection: str, step: str, shard: int, marker: Marker) -> None:
        seen.append(run.exists(marker.files["table"]) and run.marker(collection, step, shard) is None)
        write(collection, step, shard, marker)

    monkeypatch.setattr(run, "write_marker", watched)
    run.commit("pool", "step", 0, TABLE, CAUSE)

    assert seen == [True]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"fingerprint": "f", "dig', b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"nothing": 1}', b'"text"'],
    ids=lambda content: repr(content),
)
def test_a_marker_that_is_cut_or_garbage_counts_as_absent(run, content):
    run.commit("pool", "step", 0, TABLE, CAUSE)
    run.commit("pool", "step", 1, TABLE, CAUSE)
    run.fs.pipe_file(run.path("pool/step/00000000.json"), content)
    run.write_bytes("artefacts/fit.json", content)

    assert run.marker("pool", "step", 0) is None
    assert list(run.markers("pool", "step")) == [1]
    assert run.artefact_marker("fit") is None


def test_every_prefix_of_a_marker_counts_as_absent(run):
    run.commit("pool", "step", 0, TABLE, CAUSE)
    path = run.path("pool/step/00000000.json")
    whole = run.fs.cat_file(path)
    for size in range(len(whole)):
        run.fs.pipe_file(path, whole[:size])
        assert run.marker("pool", "step", 0) is None, whole[:size]


def test_files_that_are_no_markers_are_not_read_as_markers(run):
    run.commit("pool", "step", 3, TABLE, CAUSE)
    for name in ("overview.json", "00000004.json.0a1b2c.tmp", "0000000x.json", "00000005-0a1b2c.json"):
        run.fs.pipe_file(run.path(f"pool/step/{name}"), b"{}")

    assert list(run.markers("pool", "step")) == [3]


def test_an_attempt_never_overwrites_another(run):
    first = run.commit("pool", "step", 0, TABLE, CAUSE)
    before = run.read_bytes(first.files["table"])

    second = run.commit("pool", "step", 0, TABLE.slice(0, 7), CAUSE)

    assert first.files["table"] != second.files["table"]
    assert run.read_bytes(first.files["table"]) == before
    assert run.read_table("pool", "step", 0).num_rows == 7


def test_what_an_error_leaves_half_written_is_deleted(run):
    with pytest.raises(RuntimeError), run.create("pool/raw/00000000-a.tar") as stream:  # noqa: PT012
        stream.write(b"half")
        raise RuntimeError

    assert not run.exists("pool/raw/00000000-a.tar")


def test_garbage_collection_removes_what_no_marker_names_and_nothing_else(run, tmp_path):
    old = run.commit("pool", "step", 0, TABLE, CAUSE)
    raw = run.new_path("pool", "raw", 0, "tar")
    with run.create(raw) as stream:
        stream.write(b"fetched")
    kept = run.commit("pool", "step", 0, TABLE, {**CAUSE, "files": {"raw": raw}})
    killed = run.new_path("seeds/some", "raw", 4, "tar")
    with run.create(killed) as stream:
        stream.write(b"of a killed attempt")
    seeds = run.commit("seeds/some", "step", 0, TABLE, CAUSE)
    (tmp_path / "fit.json").write_text("{}")
    superseded = run.commit_artefacts("fit", {"fit.json": tmp_path / "fit.json"}, Marker("f", "d", 0, {}))
    fitted = run.commit_artefacts("fit", {"fit.json": tmp_path / "fit.json"}, Marker("f", "d", 0, {}))
    run.write_bytes("run.yaml", b"seed: 0\n")

    removed = run.collect_garbage(["pool", "seeds/some"])

    assert removed == 3
    gone = {old.files["table"], killed, superseded.files["fit.json"]}
    assert not gone & set(files(run))
    assert {kept.files["table"], raw, seeds.files["table"], fitted.files["fit.json"], "run.yaml"} <= set(files(run))
    assert run.collect_garbage(["pool", "seeds/some"]) == 0


def test_forgotten_shards_become_garbage(run):
    for shard in range(3):
        run.commit("pool", "step", shard, TABLE, CAUSE)

    run.forget_shards("pool", 1)

    assert list(run.markers("pool", "step")) == [0]
    assert run.collect_garbage(["pool"]) == 2


def test_a_table_whose_file_is_gone_is_corrupt_and_named(run):
    marker = run.commit("pool", "step", 0, TABLE, CAUSE)
    run.remove(marker.files["table"])

    with pytest.raises(CorruptError, match=marker.files["table"]):
        run.read_table("pool", "step", 0)


@pytest.mark.parametrize("size", [0, 3, 4, 100, -1, -8, -100])
def test_a_table_that_is_cut_is_corrupt_and_named(run, size):
    marker = run.commit("pool", "step", 0, TABLE, CAUSE)
    path = run.path(marker.files["table"])
    run.fs.pipe_file(path, run.fs.cat_file(path)[:size])

    with pytest.raises(CorruptError, match=marker.files["table"]):
        run.read_table("pool", "step", 0)


def test_a_table_with_any_byte_changed_is_the_same_or_said_to_be_corrupt(run):
    marker = run.commit("pool", "step", 0, TABLE, CAUSE)
    path = run.path(marker.files["table"])
    whole = run.fs.cat_file(path)
    found = 0
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0x5A
        run.fs.pipe_file(path, bytes(changed))
        try:
            assert run.read_table("pool", "step", 0).columns == TABLE.columns
        except CorruptError:
            found += 1
    assert found > 0.5 * len(whole) / 5


def test_a_table_with_other_rows_than_its_marker_says_is_corrupt(run):
    marker = run.commit("pool", "step", 0, TABLE, CAUSE)
    other = run.commit("pool", "other", 0, TABLE.slice(0, 99), CAUSE)
    run.fs.pipe_file(run.path(marker.files["table"]), run.read_bytes(other.files["table"]))

    with pytest.raises(CorruptError, match="has 99 rows, its marker says 100"):
        run.read_table("pool", "step", 0)


def test_an_artefact_that_is_gone_is_corrupt_and_named(run, tmp_path):
    (tmp_path / "centroids.npy").write_bytes(b"x")
    marker = run.commit_artefacts("fit", {"centroids.npy": tmp_path / "centroids.npy"}, Marker("f", "d", 0, {}))
    assert run.local_copy(marker.files["centroids.npy"], tmp_path).read_bytes() == b"x"
    run.remove(marker.files["centroids.npy"])

    with pytest.raises(CorruptError, match=marker.files["centroids.npy"]):
        run.local_copy(marker.files["centroids.npy"], tmp_path)
    with pytest.raises(CorruptError, match=marker.files["centroids.npy"]):
        run.publish(marker.files["centroids.npy"], "known.npy")


def test_a_published_file_is_replaced_whole(run):
    run.write_bytes("a", b"first")
    run.write_bytes("b", b"second")
    run.publish("a", "known")
    run.publish("b", "known")

    assert run.read_bytes("known") == b"second"
    assert files(run) == ["a", "b", "known"]


def test_removing_what_is_gone_is_no_error(run):
    run.write_bytes("x", b"")
    run.remove("x")
    run.remove("x")


def test_a_relative_run_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("here")
    monkeypatch.chdir("/")
    run.write_bytes("x", b"data")

    assert (tmp_path / "here" / "x").read_bytes() == b"data"
    assert Run(run.url).read_bytes("x") == b"data"


def test_a_url_of_an_unknown_kind_is_wrong_use():
    with pytest.raises(UsageError, match="nosuch://bucket/run"):
        Run("nosuch://bucket/run")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(StoreError, match="cannot be written"):
        Run(tmp_path / "run").write_bytes("x", b"")


# -- a disk that is full --------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_leaves_what_was_there(small_disk, fill):
    run = Run(small_disk / "run")
    before = run.commit("pool", "step", 0, TABLE, CAUSE)
    run.write_bytes("run.yaml", b"old")
    filler = fill(small_disk)
    there = files(run)
    incompressible = pa.table({"n": pa.array([os.urandom(64) for _ in range(3000)])})

    with pytest.raises(DiskFullError, match="no space left"):
        run.commit("pool", "step", 0, incompressible, CAUSE)
    with pytest.raises(DiskFullError, match="no space left"):
        run.write_bytes("run.yaml", bytes(20_000))
    with pytest.raises(DiskFullError, match="no space left"):
        run.write_marker("pool", "step", 0, Marker(**{**asdict(before), "fingerprint": "x" * 20_000}))
    with pytest.raises(DiskFullError, match="no space left"), run.create("pool/raw/00000000-a.tar") as stream:
        stream.write(os.urandom(200_000))
    with pytest.raises(DiskFullError, match="no space left"):
        run.publish(before.files["table"], "manifest.parquet")
    with pytest.raises(DiskFullError, match="no space left"), run.lease():
        pass

    assert files(run) == there, "half files are left"
    assert run.read_bytes("run.yaml") == b"old"
    assert run.marker("pool", "step", 0) == before
    assert run.read_table("pool", "step", 0).equals(TABLE)
    filler.unlink()
    assert run.commit("pool", "step", 0, incompressible, CAUSE).num_rows == 3000


def test_free_space_is_that_of_the_disk_also_before_the_run_exists(small_disk):
    assert 0 < Run(small_disk / "a" / "b").free_bytes() < 5_000_000
    assert Run("memory://nothing").free_bytes() is None


def test_markers_are_plain_json(run):
    run.commit("pool", "step", 0, TABLE, {**CAUSE, "inputs": {"settings": "x"}})

    fields = json.loads(run.read_bytes("pool/step/00000000.json"))

    assert fields["inputs"] == {"settings": "x"}
    assert set(fields) == set(Marker.__dataclass_fields__)
