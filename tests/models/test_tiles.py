import numpy as np
import pytest

from curation.models.tiles import Tile, tiles


@pytest.mark.parametrize(("width", "height"), [(1, 1), (100, 40), (1000, 997), (641, 300)])
def test_cores_cover_every_pixel_once(width, height):
    covered = np.zeros((height, width), int)

    for tile in tiles(width, height, side_px=96, context_px=16):
        left, top, right, bottom = tile.core
        covered[top:bottom, left:right] += 1

    assert (covered == 1).all()


def test_what_is_centred_in_a_core_is_seen_whole_and_no_tile_is_larger_than_asked():
    for tile in tiles(1000, 800, side_px=128, context_px=24):
        left, top, right, bottom = tile.core
        seen = tile.seen
        assert (seen[0], seen[1]) == (max(0, left - 24), max(0, top - 24))
        assert (seen[2], seen[3]) == (min(1000, right + 24), min(800, bottom + 24))
        assert max(seen[2] - seen[0], seen[3] - seen[1]) <= 128


def test_every_box_has_an_owner_and_far_ones_have_one_only():
    rng = np.random.default_rng(0)
    centres = rng.uniform((0, 0), (1000, 800), (500, 2))
    boxes = np.hstack([centres - 10, centres + 10])

    owners = np.sum([tile.owns(boxes) for tile in tiles(1000, 800, side_px=300, context_px=50)], axis=0)

    assert owners.min() == 1
    assert (owners == 1).mean() > 0.8
    assert owners.max() <= 4


def test_tiles_without_room_for_a_core_are_refused():
    with pytest.raises(ValueError, match="no room"):
        tiles(100, 100, side_px=64, context_px=32)


def test_a_tile_sees_boxes_that_reach_into_its_surroundings():
    tile = Tile((100, 100, 200, 200), (50, 50, 250, 250))
    boxes = np.array([[0, 0, 50, 50], [0, 0, 51, 51], [249, 100, 300, 120], [250, 100, 300, 120], [0, 0, 500, 500]])

    assert tile.sees(boxes).tolist() == [False, True, True, False, True]
