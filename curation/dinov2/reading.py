"""How the encoded bytes of the images of a run are read: one by one, or chunk by chunk ahead of need."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Protocol

from curation.dinov2.manifests import ManifestImages, Stored
from curation.dinov2.order import Order, Place
from curation.errors import ImageError


class Reader(Protocol):
    """Reads images; used by several threads at once."""

    def source(self, place: Place) -> bytes | tuple[int, Stored]:
        """Return the encoded bytes of an image, or where whoever decodes it has to read them.

        Raises:
            ImageError: The image cannot be used.
            TrainError: Its tar cannot be read.
        """

    def describe(self, place: Place) -> str:
        """Return the image id and place of an image, for messages."""


class RangedReader:
    """One ranged read an image, in any order, by whoever decodes it."""

    def __init__(self, manifests: Sequence[ManifestImages]) -> None:
        self._manifests = manifests
        self._read_here = [manifest.files.are_of_this_process() for manifest in manifests]

    def source(self, place: Place) -> bytes | tuple[int, Stored]:
        """Return where an image lies: the number of its manifest, and the place in a tar."""
        manifest = self._manifests[place.manifest]
        if self._read_here[place.manifest]:
            return manifest.read(place.row)
        return place.manifest, manifest.stored(place.row)

    def describe(self, place: Place) -> str:
        """Return the image id and place of an image, for messages."""
        return self._manifests[place.manifest].describe(place.row)


class ChunkReader:
    """Long reads of neighbouring images, which are kept until newer chunks push them out.

    What is kept changes no result: a chunk that is needed again is read again.

    Args:
        manifests: The manifests of the run.
        order: Says what is read together.
        num_kept: Chunks in memory.
    """

    def __init__(self, manifests: Sequence[ManifestImages], order: Order, num_kept: int) -> None:
        self._manifests = manifests
        self._order = order
        self._num_kept = num_kept
        self._chunks: OrderedDict[tuple[int, range], Future[list[bytes | ImageError]]] = OrderedDict()
        self._lock = Lock()

    def source(self, place: Place) -> bytes:
        """Return the encoded bytes of an image; whoever comes first reads its chunk for all who decode, others wait."""
        places = self._order.chunk(place)
        wanted = (place.manifest, places)
        with self._lock:
            chunk = self._chunks.get(wanted)
            is_first = chunk is None
            if chunk is None:
                chunk = self._chunks[wanted] = Future()
            self._chunks.move_to_end(wanted)
            while len(self._chunks) > self._num_kept:
                self._chunks.popitem(last=False)
        if is_first:
            self._fill(chunk, wanted)
        found = chunk.result()[place.row - places.start]
        if isinstance(found, ImageError):
            raise found
        return found

    def describe(self, place: Place) -> str:
        """Return the image id and place of an image, for messages."""
        manifest = self._manifests[place.manifest]
        return manifest.describe(manifest.row_at(place.row))

    def _fill(self, chunk: "Future[list[bytes | ImageError]]", wanted: tuple[int, range]) -> None:
        manifest, places = wanted
        try:
            chunk.set_result(self._manifests[manifest].read_run(places))
        except BaseException as error:
            chunk.set_exception(error)  # for those who wait; the next one to come reads anew
            with self._lock:
                self._chunks.pop(wanted, None)
            raise
