"""A sample of the pool's images that depends on their ids and a seed alone, and their bytes.

Memory: about 150 bytes an image of the sample, besides one shard's ids; nothing that grows with the pool.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from curation import schema
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.lookup import as_bytes, find
from curation.indexes.sampling import HashSample
from curation.indexes.vectors import Rows
from curation.stage import ReduceInputs, ShardView


def sample_keys(inputs: ReduceInputs, seed: int, size: int) -> Keys:
    """Return the keys of the sample (n, 2), the smallest hashes of (seed, image id) first; equal bytes count once."""
    sample = HashSample(seed, size, distinct=True)
    for view in inputs.shards("pool"):
        keys_N2, _ = _keys(view)
        sample.add(keys_N2, keys_N2)
    return sample.result().keys


def sampled_images(inputs: ReduceInputs, wanted_N2: Keys) -> Iterator[tuple[int, bytes]]:
    """Yield ``(place in wanted_N2, encoded bytes)`` once for each image that is there, shard by shard."""
    tried = np.zeros(len(wanted_N2), bool)
    for view in inputs.shards("pool"):
        keys_N2, rows = _keys(view)
        index_N = find(wanted_N2, keys_N2)
        wanted = {
            row: index
            for row, index in zip(rows.tolist(), index_N.tolist(), strict=True)
            if index >= 0 and not tried[index]
        }
        tried[list(wanted.values())] = True
        for row, data in view.images(np.array(sorted(wanted), np.int64)):
            yield wanted[row], data


def _keys(view: ShardView) -> tuple[Keys, Rows]:
    """Return the keys of a shard's kept images and their rows."""
    ids = view.read(schema.FETCH, ["image_id"]).column(0)
    rows = np.flatnonzero(view.kept & ids.is_valid().to_numpy())
    keys_N2 = keys_from_hex(ids.take(pa.array(rows)).to_pylist())
    first = np.sort(np.unique(as_bytes(keys_N2), return_index=True)[1])
    return keys_N2[first], rows[first]
