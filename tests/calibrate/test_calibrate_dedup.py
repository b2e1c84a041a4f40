"""The whole command with a small real model, on images made here."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.calibrate.dedup import Request, calibrate_dedup
from curation.cli import main
from curation.config import RunConfig
from curation.edits import EDITS
from curation.errors import InputError
from curation.pipelines.context import Context
from curation.pipelines.lvd142m import build_plan
from curation.settings import parse
from curation.store import Run

torch = pytest.importorskip("torch")
NUM_IMAGES = 24


class Thumbnail(torch.nn.Module):
    """A tiny picture, centred and projected: a real model for which mild copies are close."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 512, bias=False)

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, (8, 8)).flatten(1)
        return torch.nn.functional.normalize(self.linear(x - x.mean(1, keepdim=True)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "thumbnail.torchscript.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Thumbnail().eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(network).save(str(path))
    return path


def jpegs():
    rng = np.random.default_rng(0)
    for _ in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        yield buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images that differ, one file twice, and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number, data in enumerate(jpegs()):
        (folder / f"{number:02d}.jpg").write_bytes(data)
    (folder / "again.jpg").write_bytes((folder / "00.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def settings(weights, **sscd):
    return {"sscd": {"weights": str(weights), "side_px": 64, **sscd}}


def calibrate(weights, output, on_images=lambda done, total: None, **request):
    config = parse(RunConfig, settings(weights), "test.yaml")
    context = Context(Run("memory://calibrate"), config)
    return calibrate_dedup(context, build_plan(config), Request(output, **request), on_images)


@pytest.fixture(scope="module")
def done(weights, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("calibration")
    return calibrate(weights, output, images=str(folder)).summary, output


def test_every_edit_and_strength_has_a_row_for_every_threshold(done):
    summary, output = done
    table = pq.read_table(output / "table.parquet").to_pylist()
    with (output / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table)

    wanted = {("all", None)} | {(edit.name, None) for edit in EDITS}
    wanted |= {(edit.name, float(strength)) for edit in EDITS for strength in edit.strengths}
    assert {(row["edit"], row["strength"]) for row in table} == wanted
    assert summary["images"] == NUM_IMAGES, "equal bytes count once, broken ones not at all"
    assert summary["copies"] == NUM_IMAGES * len(EDITS)
    for name, strength in wanted:
        rows = [row for row in table if (row["edit"], row["strength"]) == (name, strength)]
        recalls = [row["recall"] for row in rows]
        assert recalls == sorted(recalls, reverse=True), "a higher threshold finds no more"
        assert rows[0]["copies"] > 0


def test_mild_edits_are_found_and_strong_ones_less(done):
    recalls = done[0]["at_suggested"]

    assert recalls["jpeg"]["50"] == recalls["aspect"]["1.2"] == 1
    assert recalls["crop"]["0.9"] > recalls["crop"]["0.5"]


def test_the_suggestion_is_the_lowest_threshold_that_will_do(done):
    summary, output = done
    suggested = summary["suggested"]

    assert suggested["precision"] >= 0.99
    assert suggested["precision_interval"][0] <= suggested["precision"] <= suggested["precision_interval"][1]
    assert not summary["suggested_is_sure"], "24 images prove nothing"
    rows = pq.read_table(output / "table.parquet").to_pylist()
    for row in rows:
        if row["edit"] == "all" and row["threshold"] < suggested["threshold"]:
            scale = (summary["pool_size"] - 1) / (summary["images"] - 1)
            assert row["found"] / (row["found"] + scale * row["wrong"]) < 0.99


def test_the_plot_is_a_picture_with_lines_on_it(done):
    with Image.open(done[1] / "plot.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 16)) > len(EDITS)


def test_a_second_run_describes_nothing_again_and_says_the_same(done, weights, folder, monkeypatch):
    summary, output = done
    monkeypatch.setattr("curation.calibrate.dedup.describe", lambda *_: pytest.fail("described again"))

    assert calibrate(weights, output, images=str(folder)).summary == summary
    higher = calibrate(weights, output, images=str(folder), precision=0.9).summary
    assert higher["suggested"]["threshold"] <= summary["suggested"]["threshold"]


def test_an_interrupted_run_goes_on_and_ends_the_same(done, weights, folder, tmp_path):
    def stop(images, total):
        if images >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(weights, tmp_path, stop, images=str(folder))
    kept = len(list((tmp_path / "descriptors").glob("*.npz")))
    assert 0 < kept < 1 + len(EDITS)

    assert calibrate(weights, tmp_path, images=str(folder)).summary == done[0]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_may_come_in_a_tar_or_a_parquet_file(kind, weights, tmp_path):
    path = tmp_path / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number, data in enumerate(jpegs()):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        pq.write_table(pa.table({"image": [{"bytes": data, "path": None} for data in jpegs()]}), path)

    summary = calibrate(weights, tmp_path / "out", images=str(path), size=22).summary

    assert summary["images"] == 22
    assert summary["drawn_from"] == NUM_IMAGES


def test_the_pool_of_a_run_is_sampled_whatever_its_shards(weights, folder, tmp_path):
    found = []
    for rows in (100, 7):
        tree = {**settings(weights, score_norm="fit"), "shards": {"rows": rows}, "faces": {"scales": [1.0]}}
        tree |= {"pool": {"inputs": [{"kind": "folder", "path": str(folder)}]}}
        path = tmp_path / f"{rows}.yaml"
        path.write_text(json.dumps(tree))
        run = str(tmp_path / f"run{rows}")
        options = ["calibrate", "dedup", "--run", run, "--size", "21"]
        assert main([*options, "--config", str(path)]) == 1, "nothing has been crawled"
        assert main(["run", "--config", str(path), "--run", run, "--stage", "sscd", "--runner", "threads"]) == 0
        assert main(options) == 0
        output = tmp_path / f"run{rows}" / "calibration" / "dedup"
        found.append(pq.read_table(output / "table.parquet"))
        assert json.loads((output / "summary.json").read_text())["images"] == 21

    assert found[0].equals(found[1])
    assert set(found[0].column("score").to_pylist()) == {"cosine", "normalised"}


def test_whitening_that_was_not_fitted_is_an_error(weights, folder, tmp_path):
    config = parse(RunConfig, settings(weights, whitening="fit"), "test.yaml")
    context = Context(Run(tmp_path / "run"), config)

    with pytest.raises(InputError, match=r"not (fitted with these settings|been crawled)"):
        calibrate_dedup(context, build_plan(config), Request(tmp_path, str(folder)), lambda done, total: None)


def test_too_few_images_are_an_error(weights, folder, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("00.jpg", "01.jpg", "02.jpg", "broken.jpg"):
        (tmp_path / "few" / name).write_bytes((folder / name).read_bytes())

    with pytest.raises(InputError, match="3 images can be read, and at least 20 are needed"):
        calibrate(weights, tmp_path / "output", images=str(tmp_path / "few"), size=100)


@pytest.mark.parametrize(
    "arguments", [["dedup"], ["faces"], ["dedup", "--images", "x", "--precision", "1.5"], ["dedup", "--size", "0"]]
)
def test_wrong_use_exits_with_2(arguments, capsys):
    try:
        code = main(["calibrate", *arguments])
    except SystemExit as error:
        code = error.code

    assert code == 2
