"""Which image stands at which place of a run: pure functions of seed and position, so a run goes on from any step.

Nothing is shuffled in memory and nothing is counted, whatever the number of images. Manifests are mixed by exact
quotas. Two orders exist within a manifest: a permutation of all images for reading them one by one, and one that a
reader of whole tars can follow, with chunks of neighbours in random order and a window of chunks mixed.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from curation.dinov2.config import DataConfig
from curation.dinov2.randomness import Purpose, key, permuted, sample_index
from curation.errors import TrainError

MIXTURE_BLOCK = 10_000  # samples after which every manifest has had its exact share; more where one has less than one
_LARGEST_BLOCK = 10**12


class Place(NamedTuple):
    """An image: the number of its manifest, and its row or, where tars are read in sequence, its place in the tars."""

    manifest: int
    row: int


class Lane(NamedTuple):
    """A place in one of the parallel sequences that a batch is made of."""

    number: int
    position: int


class Order:
    """The images of a run.

    Args:
        sizes: Images of each manifest.
        weights: Shares of the manifests in the samples; they need not sum to 1.
        data: Batch size and way of reading.
        seed: Seed of the run.

    Raises:
        TrainError: If a weight is too small or lanes cannot be filled.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], data: DataConfig, seed: int) -> None:
        self._sizes = sizes
        self._seed = seed
        self._batch_size = data.batch_size
        self._lanes = data.lanes if data.reading == "streaming" else 1
        self._block = MIXTURE_BLOCK
        while min(weights) * self._block < sum(weights) and self._block < _LARGEST_BLOCK:
            self._block *= 10
        self._starts = list(accumulate(quotas(weights, self._block), initial=0))
        self._chunks: list[ChunkOrder] | None = None
        if data.reading == "streaming":
            self._chunks = [ChunkOrder.of(size, data, seed + number) for number, size in enumerate(sizes)]

    def at(self, position: int) -> Place:
        """Return the image at a global position."""
        lane = self._lane(position)
        manifest, lane = self._mixed(lane) if len(self._sizes) > 1 else (0, lane)
        if self._chunks is None:
            return Place(manifest, sample_index(lane.position, self._sizes[manifest], self._seed + manifest))
        return Place(manifest, self._chunks[manifest].at(lane))

    def chunk(self, place: Place) -> range:
        """Return the places in the tars that are read together with one."""
        if self._chunks is None:
            raise TrainError("images are read one by one")
        return self._chunks[place.manifest].chunk_of(place.row)

    def readahead(self) -> int:
        """Return how many positions ahead the reader of tars has to be."""
        if self._chunks is None:
            return 0
        return self._lanes * max(order.window_slots for order in self._chunks)

    def _lane(self, position: int) -> Lane:
        step, place = divmod(position, self._batch_size)
        width = self._batch_size // self._lanes
        number, rest = divmod(place, width)
        return Lane(number, step * width + rest)

    def _mixed(self, lane: Lane) -> tuple[int, Lane]:
        block, within = divmod(lane.position, self._block)
        slot = permuted(within, self._block, key(self._seed, Purpose.MIXTURE, lane.number, block))
        manifest = bisect(self._starts, slot) - 1
        first, end = self._starts[manifest], self._starts[manifest + 1]
        return manifest, Lane(lane.number, block * (end - first) + slot - first)


@dataclass(frozen=True)
class ChunkOrder:
    """An order in which images that lie side by side are needed at about the same time.

    The places of a manifest are cut into chunks of nearly equal size, so that each counts as ``slots`` images: a chunk
    that has one less shows one of them twice. An epoch of a lane is a random part of all chunks in random order;
    ``window_chunks`` of them at a time are mixed image by image, as in a shuffle buffer of that size. Lanes share no
    chunk within an epoch, and together have all.

    Attributes:
        size: Images.
        num_chunks: A multiple of ``lanes``.
        window_chunks: Chunks that are mixed.
        lanes: Sequences that are read side by side.
        seed: Seed of this manifest.
    """

    size: int
    num_chunks: int
    window_chunks: int
    lanes: int
    seed: int

    @classmethod
    def of(cls, size: int, data: DataConfig, seed: int) -> "ChunkOrder":
        """Return the order of a manifest of so many images."""
        if size < data.lanes:
            raise TrainError(f"a manifest of {size} images cannot fill data.lanes {data.lanes}; lower it")
        chunks = data.lanes * max(1, size // (data.chunk_images * data.lanes))
        return cls(size, chunks, data.window_chunks, data.lanes, seed)

    @property
    def slots(self) -> int:
        """Images that a chunk counts as."""
        return -(-self.size // self.num_chunks)

    @property
    def window_slots(self) -> int:
        """Images of a window of a lane."""
        return self.slots * min(self.window_chunks, self.num_chunks // self.lanes)

    def at(self, lane: Lane) -> int:
        """Return the place in the tars of the image at a place of a lane."""
        chunks, slots = self.num_chunks // self.lanes, self.slots
        epoch, within = divmod(lane.position, chunks * slots)
        window, inside = divmod(within, self.window_slots)
        first = window * min(self.window_chunks, chunks)
        in_window = min(self.window_chunks, chunks - first) * slots
        mixed = permuted(inside, in_window, key(self.seed, Purpose.WINDOW, epoch, lane.number, window))
        number, slot = divmod(mixed, slots)
        turn = (first + number) * self.lanes + lane.number
        places = self._places(permuted(turn, self.num_chunks, key(self.seed, Purpose.CHUNKS, epoch)))
        return places[slot % len(places)]

    def chunk_of(self, place: int) -> range:
        """Return the places of the chunk that one belongs to."""
        return self._places(((place + 1) * self.num_chunks - 1) // self.size)

    def _places(self, chunk: int) -> range:
        return range(chunk * self.size // self.num_chunks, (chunk + 1) * self.size // self.num_chunks)


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers proportional to weights that sum to ``total``, by largest remainders.

    Raises:
        TrainError: If a share is too small to get any.
    """
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: whole[number] - exact[number])
    for number in by_remainder[: total - sum(whole)]:
        whole[number] += 1
    if not all(whole):
        least = whole.index(0)
        raise TrainError(f"weight {weights[least]} of manifest {least + 1} is less than 1 sample in {total}; raise it")
    return whole
