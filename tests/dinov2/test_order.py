from collections import Counter

import pytest

from curation.dinov2.config import DataConfig
from curation.dinov2.order import MIXTURE_BLOCK, ChunkOrder, Lane, Order, quotas
from curation.errors import TrainError


def order(sizes, weights=None, seed=0, **data):
    return Order(sizes, weights or [1.0] * len(sizes), DataConfig(**{"batch_size": 8, **data}), seed)


def test_one_manifest_is_seen_whole_in_every_epoch():
    places = [order([37]).at(position) for position in range(74)]

    for epoch in (places[:37], places[37:]):
        assert sorted(place.row for place in epoch) == list(range(37))
    assert places[:37] != places[37:]


def test_a_mixture_has_exact_shares_and_spreads_them():
    mixed = order([50, 5000, 300], [0.1, 0.6, 0.3])
    places = [mixed.at(position) for position in range(2 * MIXTURE_BLOCK)]

    assert Counter(place.manifest for place in places) == {0: 2000, 1: 12_000, 2: 6000}
    assert 0.05 < sum(place.manifest == 0 for place in places[:1000]) / 1000 < 0.15
    rows = [Counter(place.row for place in places if place.manifest == number) for number in range(3)]
    assert set(rows[0].values()) == {40}  # 2,000 samples of 50 images: each as often as any other
    assert set(rows[2].values()) == {20}
    assert len(rows[1]) == 5000
    assert max(rows[1].values()) <= 3


def test_a_manifest_with_a_tiny_share_still_gets_it():
    mixed = order([10**9, 6000], [2.0, 1.2e-3])  # 6 samples in 10,000
    assert Counter(mixed.at(position).manifest for position in range(10_000)) == {0: 9994, 1: 6}

    rarer = order([10**9, 6000], [2.0, 1.2e-6])  # 6 samples in ten millions
    assert {rarer.at(position).manifest for position in range(1000)} <= {0, 1}


def test_quotas_are_exact_and_refuse_what_gets_nothing():
    assert quotas([1, 1, 1], 10_000) in ([3334, 3333, 3333], [3333, 3334, 3333], [3333, 3333, 3334])
    assert quotas([0.7, 0.3], 10) == [7, 3]
    with pytest.raises(TrainError, match="weight 1e-09 of manifest 2 is less than 1 sample in 10000"):
        quotas([1.0, 1e-9], 10_000)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("size", [9, 64, 130])
def test_streaming_shows_every_image_in_every_epoch(size, lanes):
    data = DataConfig(batch_size=8, reading="streaming", chunk_images=8, window_chunks=3, lanes=lanes)
    chunks = ChunkOrder.of(size, data, 5)
    length = chunks.slots * chunks.num_chunks // lanes
    for epoch in (0, 1):
        seen = Counter(
            chunks.at(Lane(lane, epoch * length + position)) for lane in range(lanes) for position in range(length)
        )
        assert set(seen) == set(range(size))
        assert seen.total() - size <= chunks.num_chunks  # at most one image of each chunk is shown twice


def test_streaming_needs_few_chunks_at_a_time():
    stream = order([4096], reading="streaming", chunk_images=64, window_chunks=4, lanes=2)
    for lane in range(2):
        positions = [step * 8 + lane * 4 + place for step in range(64) for place in range(4)]
        chunks = [stream.chunk(stream.at(position)) for position in positions]
        assert len(set(chunks)) == 4  # a window of 256 images
        assert len(set(chunks[:16])) > 1
        assert all(stream.at(position).row in chunk for position, chunk in zip(positions, chunks, strict=True))


def test_a_manifest_too_small_for_its_lanes_is_refused():
    with pytest.raises(TrainError, match=r"3 images cannot fill data\.lanes 4"):
        order([3], reading="streaming", lanes=4)
