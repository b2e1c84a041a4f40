"""A run that gets new images assigns them to the centroids that it has, and says how they lie there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.config import RunConfig
from curation.pipelines.context import Context
from curation.pipelines.driver import Request
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.overview import MAP_FILE, overview, report_data, write_report
from curation.settings import parse
from curation.store import Run

data = pytest.importorskip("skimage.data")


@pytest.fixture
def camera(tmp_path):
    """A folder of crops of a photo that the pool does not have, grey."""
    folder = tmp_path / "camera"
    folder.mkdir()
    for index, (top, left) in enumerate(np.ndindex(4, 4)):
        crop = data.camera()[100 * top : 100 * top + 96, 100 * left : 100 * left + 96]
        Image.fromarray(crop).convert("RGB").save(folder / f"{index}.jpg", quality=95)
    return folder


@pytest.mark.slow
def test_new_images_go_to_the_centroids_that_are_there_and_their_drift_is_said(tmp_path, bring, tree, camera):
    run, settings = tmp_path / "run", tree(rows=20)
    bring(run, settings, Request("cluster"))
    fit = Run(run).artefact_marker("cluster_fit").digest
    before = overview(*opened(run, settings))
    settings["pool"]["inputs"] += [{"kind": "folder", "path": str(camera)}]

    bring(run, settings, Request("cluster", redo=frozenset({"crawl"})))
    after = overview(*opened(run, settings))

    assert Run(run).artefact_marker("cluster_fit").digest == fit
    assert before.drift.num_new_images == 0
    assert after.drift.num_new_images == after.drift.num_compared - before.drift.num_compared
    assert 8 <= after.drift.num_new_images <= 16
    assert after.drift.mean_similarity < after.drift.fitted_mean_similarity - 0.1
    assert after.drift.share_change > after.drift.share_change_by_chance
    assert any("are newer than the centroids: mean similarity" in line for line in after.lines())
    assert json.dumps(after.as_dict())

    bring(run, settings, Request("cluster", refit=True))

    assert overview(*opened(run, settings)).drift.num_new_images == 0


def opened(run, settings):
    config = parse(RunConfig, settings, "test.yaml")
    return Context(Run(run), config), build_plan(config)


def test_a_finished_run_has_pages_of_clusters_and_a_map(copied, tree):
    context, plan = opened(copied, tree())

    found = report_data(context, plan)
    page = Path(write_report(context, plan)).read_text(encoding="utf-8")

    assert found.clusters.num_clusters == 4
    sizes = [cluster.num_images for cluster in found.clusters.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == sum(entry.num_images for entry in found.clusters.bins)
    for cluster in found.clusters.largest:
        nearest = [member.similarity for member in cluster.nearest]
        assert nearest == sorted(nearest, reverse=True)
        assert len({member.image_id for member in (*cluster.nearest, *cluster.others)}) == min(12, cluster.num_images)
    assert sum(number for cluster in found.clusters.largest for _, number in cluster.seeds) == 6
    assert [name for name, _, _ in found.embedding_map.collections] == ["pool", "seeds/some"]
    with Image.open(copied / MAP_FILE) as picture:
        assert picture.size == (960, 640)
    assert "data:image/png;base64," in page
