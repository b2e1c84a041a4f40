"""What seed sets retrieved, in arrays: a pool image may be hit many times, by several sets.

Memory: 38 bytes a hit while they are added, about 220 a hit while they are grouped (measured), then about 60 a
retrieved image.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.indexes.keys import NO_KEY, Keys, hex_from_keys
from curation.indexes.lookup import as_bytes
from curation.indexes.vectors import Rows, Similarities


class Hits:
    """Hits as they come.

    Args:
        names: Of the seed sets, sorted; a hit names its set by its place here.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._keys: list[Keys] = [np.empty((0, 2), np.uint64)]
        self._sets: list[npt.NDArray[np.int16]] = [np.empty(0, np.int16)]
        self._similarities: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)]
        self._seed_keys: list[Keys] = [np.empty((0, 2), np.uint64)]

    def add(
        self,
        number: int,
        keys_N2: Keys,
        similarities_N: Similarities | None = None,
        seed_keys_N2: Keys | None = None,
    ) -> None:
        """Add hits.

        Args:
            number: Of the seed set.
            keys_N2: The pool images.
            similarities_N: With the seed images that hit them; None: a cluster hit them.
            seed_keys_N2: The seed images.
        """
        num_hits = len(keys_N2)
        self._keys.append(np.array(keys_N2))
        self._sets.append(np.full(num_hits, number, np.int16))
        by_seed = similarities_N is not None and seed_keys_N2 is not None
        self._similarities.append(
            np.array(similarities_N, np.float32) if by_seed else np.full(num_hits, -np.inf, np.float32)
        )
        self._seed_keys.append(np.array(seed_keys_N2) if by_seed else np.full((num_hits, 2), NO_KEY))

    def grouped(self) -> "Retrieved":
        """Return the hits by pool image."""
        keys, seeds = np.concatenate(self._keys), np.concatenate(self._seed_keys)
        sets, similarities = np.concatenate(self._sets), np.concatenate(self._similarities)
        # Best hit of each image first: the largest similarity, then the smallest seed image id.
        order = np.lexsort((seeds[:, 1], seeds[:, 0], -similarities, keys[:, 1], keys[:, 0]))
        keys = keys[order]
        new = np.ones(len(keys), bool)
        new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        first = np.flatnonzero(new)
        image = np.cumsum(new) - 1
        pairs: Rows = np.unique(image * len(self.names) + sets[order].astype(np.int64))
        return Retrieved(
            self.names,
            keys[first],
            np.diff(first, append=len(keys)),
            similarities[order[first]],
            seeds[order[first]],
            pairs,
        )


class Retrieved:
    """Each retrieved pool image once, by key.

    Args:
        names: Of the seed sets, sorted.
        keys_M2: Sorted.
        counts_M: Hits of each image.
        similarities_M: Of its best hit; -inf where only clusters hit it.
        seed_keys_M2: Of the seed image of that hit.
        pairs: image * len(names) + number of a seed set that hit it, sorted, each once.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        keys_M2: Keys,
        counts_M: Rows,
        similarities_M: npt.NDArray[np.float32],
        seed_keys_M2: Keys,
        pairs: Rows,
    ) -> None:
        self._known = as_bytes(keys_M2)
        self._counts = counts_M.astype(np.int32)
        self._similarities = similarities_M
        self._seed_keys = seed_keys_M2
        width = max(1, len(names))
        starts = np.searchsorted(pairs // width, np.arange(len(keys_M2) + 1))
        self._starts, self._sets = starts, (pairs % width).astype(np.int16)
        self._names = pa.array(names, pa.string())

    def __len__(self) -> int:
        return len(self._known)

    def find(self, keys_N2: Keys) -> Rows:
        """Return the number of each image among those retrieved, or -1, (N,)."""
        if not len(self._known):
            return np.full(len(keys_N2), -1)
        wanted = as_bytes(keys_N2)
        place = np.minimum(np.searchsorted(self._known, wanted), len(self._known) - 1)
        return np.where(self._known[place] == wanted, place, -1)

    def columns(self, images: Rows) -> dict[str, pa.Array]:
        """Return ``seeds``, ``seed_image_id``, ``seed_similarity`` and ``nominal_count``; null for image -1."""
        hit = images >= 0
        mine = images[hit]
        by_cluster = np.isneginf(self._similarities[mine])
        lengths = self._starts[mine + 1] - self._starts[mine]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        # Entry e of the lists of all hits is entry e - starts[i] of image i's own.
        sets = np.arange(starts[-1]) + np.repeat(self._starts[mine] - starts[:-1], lengths)
        names = self._names.take(pa.array(self._sets[sets]))
        found = {
            schema.SEEDS.name: pa.ListArray.from_arrays(pa.array(starts, pa.int32()), names),
            schema.SEED_IMAGE_ID.name: pa.array(hex_from_keys(self._seed_keys[mine]), pa.string(), mask=by_cluster),
            schema.SEED_SIMILARITY.name: pa.array(self._similarities[mine], mask=by_cluster),
            schema.NOMINAL_COUNT.name: pa.array(self._counts[mine]),
        }
        place = pa.array(np.cumsum(hit) - 1, mask=~hit)
        return {name: column.take(place) for name, column in found.items()}
