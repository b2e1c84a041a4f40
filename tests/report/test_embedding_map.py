"""The map shows what principal components say, and the same rows give the same picture."""

import io

import numpy as np
from PIL import Image

from curation.report.embedding_map import HEIGHT_PX, WIDTH_PX, embedding_map, principal_plane


def groups(seed=0):
    """Two groups far apart along one axis of 16, spread a little along another."""
    rng = np.random.default_rng(seed)
    noise = 0.02 * rng.standard_normal((300, 16))
    noise[:, 3] += 0.2 * rng.standard_normal(300)
    noise[:, 7] += np.repeat([0.0, 2.0], [200, 100])
    return {"pool": noise[:200].astype(np.float16), "seeds/s": noise[200:].astype(np.float16)}


def test_the_axes_are_those_of_the_largest_variance():
    rows = np.concatenate(list(groups().values())).astype(np.float64)

    points, explained = principal_plane(rows)

    _, singular, axes = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs((rows - rows.mean(axis=0)) @ axes[:2].T), atol=1e-9)
    assert np.isclose(explained, (singular[:2] ** 2).sum() / (singular**2).sum())
    assert np.corrcoef(points[:, 0], rows[:, 7])[0, 1] > 0.99  # with its sign


def test_each_collection_has_its_colour_where_its_points_are():
    made = embedding_map(groups())

    assert [entry[:2] for entry in made.collections] == [("pool", 200), ("seeds/s", 100)]
    picture = np.asarray(Image.open(io.BytesIO(made.png)).convert("RGB"), dtype=int)
    assert picture.shape == (HEIGHT_PX, WIDTH_PX, 3)
    for (_, _, colour), right in zip(made.collections, (False, True), strict=True):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        columns = np.nonzero(np.abs(picture - wanted).max(axis=2) < 8)[1]
        assert len(columns) > 100
        assert ((columns > WIDTH_PX / 2) == right).all()


def test_equal_rows_give_an_equal_picture_and_one_point_gives_none():
    assert embedding_map(groups()).png == embedding_map(groups()).png
    assert embedding_map({"pool": groups()["pool"][:1]}) is None
    assert embedding_map({}) is None
    assert embedding_map({"pool": np.ones((5, 4), np.float16)}).explained == 0
