import numpy as np
import pytest

from curation.dinov2.config import LossesConfig
from curation.dinov2.masks import batch_masks, block_mask, mask_counts
from curation.dinov2.randomness import Purpose, generator


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (8, 8), (14, 14), (16, 37)])
def test_a_mask_has_exactly_the_patches_asked_for(grid):
    patches = grid[0] * grid[1]
    for count in sorted({1, 2, 3, patches // 4, patches // 2, patches - 1}):
        for seed in range(5):
            assert block_mask(np.random.default_rng(seed), grid, count).sum() == count


def test_every_batch_masks_the_same_number_of_patches_in_half_of_the_crops():
    batches = [batch_masks(0, step, 6, (14, 14), LossesConfig()) for step in range(10)]

    assert {int(masks.sum()) for masks in batches} == {sum(mask_counts(12, 196, 0.5, (0.1, 0.5)))}
    assert {int(masks.any(axis=1).sum()) for masks in batches} == {6}
    assert len({masks.tobytes() for masks in batches}) == 10


def test_counts_are_spread_over_the_range():
    counts = mask_counts(12, 196, 0.5, (0.1, 0.5))

    assert counts == tuple(sorted(counts))
    assert 0.1 * 196 <= counts[0] < counts[-1] <= 0.5 * 196
    assert np.mean(counts) / 196 == pytest.approx(0.3, abs=0.01)


def test_every_crop_is_masked_equally_often():
    share = np.mean([batch_masks(0, step, 4, (4, 4), LossesConfig()).any(axis=1) for step in range(600)], axis=0)

    assert np.abs(share - 0.5).max() < 0.08


def test_blocks_are_blocks():
    mask = block_mask(generator(0, Purpose.MASK_BLOCKS, 5), (14, 14), 60)
    neighbours = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()

    assert neighbours > 60  # 60 scattered patches would have about 33


def test_reference_masks_hold_at_most_what_was_asked_for_and_often_less():
    config = LossesConfig(mask_count="reference")
    batches = np.stack([batch_masks(0, step, 8, (14, 14), config) for step in range(200)])
    shares = batches.mean(axis=2)[batches.any(axis=2)]

    assert {int(masks.any(axis=1).sum()) for masks in batches} == {8}
    assert shares.max() <= 0.5
    assert shares.mean() == pytest.approx(0.297, abs=0.01)  # the published code's own mean over 20,000 masks


def test_without_a_share_nothing_is_masked():
    assert not batch_masks(0, 3, 4, (4, 4), LossesConfig(masked_share=0, ibot_weight=0)).any()
