"""The images that copies are planted of: a seeded sample of a run's pool, or of a folder, tar or Parquet file.

Their bytes lie on scratch disk; memory holds about 150 bytes an image.
"""

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from curation.config import RunConfig
from curation.config.inputs import InputConfig, PoolConfig
from curation.crawl import fetch, read_inputs
from curation.errors import ImageError, InputError
from curation.images import decode
from curation.indexes.keys import hex_from_keys, keys_from_hex
from curation.indexes.sampling import HashSample
from curation.pipelines.context import Context
from curation.pipelines.ingest import image_id
from curation.pipelines.plan import Plan
from curation.pipelines.units import shard_markers
from curation.pipelines.work import Inputs
from curation.stages.image_sample import sample_keys, sampled_images

_BATCH = 1024  # links that are sampled at a time


@dataclass
class Sample:
    """Images that decode, in an order of content.

    Attributes:
        ids: Image ids; what each is of is the caller's pool or set.
        population: Images that the sample was drawn from.
    """

    population: int
    ids: list[str] = field(default_factory=list)
    _slices: list[tuple[int, int]] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _file: BinaryIO = field(default_factory=tempfile.TemporaryFile, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def data(self, index: int) -> bytes:
        """Return the encoded bytes of an image; called from several threads."""
        start, size = self._slices[index]
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)

    def close(self) -> None:
        """Give the scratch disk back."""
        self._file.close()

    def _fill(self, found: Iterator[tuple[int, str, bytes]], config: RunConfig) -> "Sample":
        """Take images as they come and put them in the order of their places; equal bytes and broken ones are left."""
        places: dict[str, tuple[int, int, int]] = {}
        for place, identity, data in found:
            try:
                decode(data, config.images)
            except ImageError:
                continue
            places[identity] = min(place, places.get(identity, (place, 0, 0))[0]), self._file.tell(), len(data)
            self._file.write(data)
        for identity, (_, start, size) in sorted(places.items(), key=lambda item: item[1][0]):
            self.ids.append(identity)
            self._slices.append((start, size))
        return self


def of_run(context: Context, plan: Plan, size: int, seed: int) -> Sample:
    """Return a sample of the pool as ``dedup`` will see it: kept so far, faces blurred.

    Raises:
        InputError: The run has not come so far.
    """
    for shard in shard_markers(context, "pool"):
        if context.run.marker("pool", "faces_verdict", shard) is None:
            raise InputError(f"{context.run.url}: faces is not finished; run `curate run --stage faces` first")
    inputs = Inputs(context, plan, plan.step("sscd"))
    population = sum(int(view.kept.sum()) for view in inputs.shards("pool"))
    keys_N2 = sample_keys(inputs, seed, size)
    ids = hex_from_keys(keys_N2)
    found = ((place, ids[place], data) for place, data in sampled_images(inputs, keys_N2))
    return Sample(population)._fill(found, context.config)


def of_images(path: str, config: RunConfig, size: int, seed: int) -> Sample:
    """Return a sample of an image set, drawn by the hash of (seed, URL) so that only the sample is read.

    Args:
        path: A folder, image, tar, Parquet file, or a glob of these.
        config: Limits.
        size: At most so many; fewer where some cannot be read.
        seed: Of the sample.

    Raises:
        InputError: There is nothing at that path.
    """
    suffix = Path(path).suffix.lower()
    kinds = {".tar": "webdataset", ".parquet": "parquet", ".pq": "parquet"}
    source = InputConfig.model_validate({"kind": kinds.get(suffix, "folder"), "path": path})
    config = config.model_copy(update={"pool": PoolConfig(inputs=(source,))})
    sample, population = HashSample(seed, size), 0
    pending: list[bytes] = []

    def offer() -> None:
        keys_N2 = keys_from_hex([hashlib.sha256(url).hexdigest()[:32] for url in pending])
        sample.add(keys_N2, np.arange(population - len(pending), population))
        pending.clear()

    for link in read_inputs([source], config, lambda reason: None):
        population += 1
        pending.append(f"{link.url}\0{link.source_offset}".encode())
        if len(pending) == _BATCH:
            offer()
    offer()
    order = {int(number): place for place, number in enumerate(sample.result().rows)}
    listed = read_inputs([source], config, lambda reason: None)
    links = [(order[number], link) for number, link in enumerate(listed) if number in order]
    fetched = fetch([link for _, link in links], config)
    found = ((links[one.index][0], image_id(one.data), one.data) for one in fetched if one.data is not None)
    return Sample(population)._fill(found, config)
