"""The images of a manifest: ranged reads of one image, or of many that lie side by side."""

import hashlib
import posixpath
import re
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import PurePosixPath
from pickle import PicklingError
from typing import NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import ImageError, TrainError

DIGEST_KEY = b"curation.digest"
_COLUMNS = ("tar", "tar_offset", "stored_bytes")
_ROWS_AT_A_TIME = 65_536
_MAX_GAP_BYTES = 1 << 18  # read and thrown away rather than asked for anew
_MAX_READ_BYTES = 1 << 26
_MAX_TAR_BYTES = 1 << 42  # seeking further than a file can be long is an error of the system, not of an image


class Stored(NamedTuple):
    """Where the encoded bytes of an image lie: a tar, by its full path, and a range of it."""

    tar: str
    offset: int
    length: int


class TarFiles:
    """The tars beside a manifest; can be sent to another process, with what its file system was opened with.

    Args:
        manifest: Path or fsspec URL; it is not read here.
    """

    def __init__(self, manifest: str) -> None:
        self._manifest = manifest
        self.fs, self.manifest_path = fsspec.core.url_to_fs(manifest)

    def are_of_this_process(self) -> bool:
        """Return whether other processes cannot read them: they lie in memory, or a script has a way of its own."""
        if "memory" in np.atleast_1d(self.fs.protocol) or type(self.fs).__module__ == "__main__":
            return True
        try:
            ForkingPickler.dumps(self)
        except (AttributeError, TypeError, ValueError, PicklingError):  # it holds what cannot be sent
            return True
        return False

    def read(self, image: Stored) -> bytes:
        """Return the encoded bytes of one image.

        Raises:
            ImageError: If its tar ends before the image does.
            TrainError: If its tar cannot be read.
        """
        data = self.between(image.tar, image.offset, image.offset + image.length)
        if len(data) != image.length:
            raise _truncated(data, image.offset)
        return data

    def between(self, tar: str, start: int, end: int) -> bytes:
        """Return a range of a tar; less where the tar ends before.

        Raises:
            TrainError: If it cannot be read.
        """
        try:
            data: bytes = self.fs.cat_file(tar, start=start, end=end)
        except FileNotFoundError as error:
            raise TrainError(missing(self._manifest, tar)) from error
        except OSError as error:
            raise TrainError(f"{tar}: cannot be read: {error}; training goes on with --resume") from error
        return data


def missing(manifest: str, tar: str) -> str:
    """Say that a tar is not there."""
    return f"{manifest}: {tar} is not there; put it back beside the manifest or run `curate run` again"


class ManifestImages:
    """The images of a manifest.

    Twenty bytes a row stay in memory (offset, length, number of the tar), and eight more where rows are not in the
    order of their tars, so a hundred million rows take 2 GB; image ids are read again when a message needs one.

    Args:
        manifest: Path or fsspec URL of the Parquet file; tars are found relative to its folder.
        max_image_bytes: Stored images above this are refused.

    Attributes:
        files: The tars.

    Raises:
        TrainError: If the manifest cannot be read, is empty, or names a tar that is not there.
    """

    def __init__(self, manifest: str, max_image_bytes: int) -> None:
        self.manifest = manifest
        self._max_image_bytes = max_image_bytes
        try:
            self.files = TarFiles(manifest)
            self._fs, self._path = self.files.fs, self.files.manifest_path
            self._load()
        except FileNotFoundError as error:
            raise TrainError(f"{manifest}: there is no such manifest; `curate run` writes one") from error
        except (OSError, ValueError, ImportError, pa.ArrowException) as error:
            raise TrainError(f"{manifest}: cannot be read as a Parquet manifest: {error}") from error
        if not len(self):
            raise TrainError(f"{manifest}: has no rows; nothing was curated, so see the funnel of its report")
        self._check_tars()

    def __len__(self) -> int:
        return len(self._offset)

    def _load(self) -> None:
        with self._fs.open(self._path, "rb") as file:
            parquet = pq.ParquetFile(file)
            missing = {"image_id", *_COLUMNS} - set(parquet.schema_arrow.names)
            if missing:
                raise TrainError(f"{self.manifest}: is not a manifest: it lacks {', '.join(sorted(missing))}")
            self._check_types(parquet.schema_arrow)
            digest = (parquet.schema_arrow.metadata or {}).get(DIGEST_KEY)
            hasher = hashlib.sha256()
            rows = parquet.metadata.num_rows
            self._offset = np.zeros(rows, dtype=np.int64)
            self._length = np.zeros(rows, dtype=np.int64)
            self._tar = np.zeros(rows, dtype=np.int32)
            names: dict[str, int] = {}
            columns = _COLUMNS if digest else (*_COLUMNS, "image_id")
            first = 0
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=list(columns)):
                self._add(batch, first, names)
                first += batch.num_rows
                if not digest:
                    hasher.update("".join(f"{i}\n" for i in batch.column("image_id").to_pylist()).encode())
        self._tars = [self._tar_path(name) for name in names]
        self._by_place = self._order_of_places()
        self.digest = digest.decode("ascii") if digest else hasher.hexdigest()

    def _check_types(self, stored: pa.Schema) -> None:
        for name in ("tar_offset", "stored_bytes"):
            if not pa.types.is_integer(stored.field(name).type):
                raise TrainError(f"{self.manifest}: is not a manifest: {name} is {stored.field(name).type}, not int64")
        kind = stored.field("tar").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise TrainError(f"{self.manifest}: is not a manifest: tar is {kind}, not string")

    def _add(self, batch: pa.RecordBatch, first: int, names: dict[str, int]) -> None:
        rows = slice(first, first + batch.num_rows)
        if any(batch.column(name).null_count for name in _COLUMNS):
            raise TrainError(f"{self.manifest}: rows {first} to {rows.stop - 1} hold images without stored bytes")
        self._offset[rows] = batch.column("tar_offset").to_numpy()
        self._length[rows] = batch.column("stored_bytes").to_numpy()
        encoded = batch.column("tar").dictionary_encode()
        codes = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
        self._tar[rows] = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]

    def _order_of_places(self) -> npt.NDArray[np.int64] | None:
        """Return rows in the order in which they lie in the tars; None where that is the order of the rows."""
        later = (self._tar[1:] > self._tar[:-1]) | (
            (self._tar[1:] == self._tar[:-1]) & (self._offset[1:] >= self._offset[:-1])
        )
        return None if later.all() else np.lexsort((self._offset, self._tar))

    def _tar_path(self, name: str) -> str:
        if PurePosixPath(name).is_absolute() or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\\" in name:
            raise TrainError(f"{self.manifest}: tar {name!r} must be a path relative to the manifest's folder")
        return posixpath.normpath(posixpath.join(posixpath.dirname(self._path), name))

    def _check_tars(self) -> None:
        # On object stores each check is a request, and a missing tar shows at its first read just as clearly.
        if "file" not in np.atleast_1d(self._fs.protocol):
            return
        lost = [tar for tar in self._tars if not self._fs.exists(tar)]
        if lost:
            raise TrainError(missing(self.manifest, f"{len(lost)} of {len(self._tars)} tars, such as {lost[0]},"))

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one image.

        Raises:
            ImageError: If its tar ends before the image does, or its range makes no sense.
            TrainError: If its tar cannot be read.
        """
        return self.files.read(self.stored(index))

    def stored(self, index: int) -> Stored:
        """Return where one image lies, for another process to read it.

        Raises:
            ImageError: If its range makes no sense.
        """
        offset, length = self._range(index)
        return Stored(self._tars[self._tar[index]], offset, length)

    def read_run(self, places: range) -> list[bytes | ImageError]:
        """Return the encoded bytes of images that lie side by side, in few long reads, or what is wrong with them.

        Args:
            places: Places in the order in which images lie in the tars, as ``row_at`` counts them.

        Raises:
            TrainError: If a tar cannot be read.
        """
        found: dict[int, bytes | ImageError] = {}
        stored = []
        for place in places:
            row = self.row_at(place)
            try:
                offset, length = self._range(row)
                stored.append(_Neighbour(place, int(self._tar[row]), offset, offset + length))
            except ImageError as error:
                found[place] = error
        for run in _runs(stored):
            start = run[0].start
            data = memoryview(self.files.between(self._tars[run[0].tar], start, max(image.end for image in run)))
            for image in run:
                part = bytes(data[image.start - start : image.end - start])
                found[image.place] = part if len(part) == image.end - image.start else _truncated(part, image.start)
        return [found[place] for place in places]

    def row_at(self, place: int) -> int:
        """Return which row is at a place in the order of tars and offsets."""
        return place if self._by_place is None else int(self._by_place[place])

    def _range(self, index: int) -> tuple[int, int]:
        """Return offset and length of one image."""
        offset, length = int(self._offset[index]), int(self._length[index])
        is_a_place = 0 <= offset <= _MAX_TAR_BYTES and length > 0
        if not is_a_place or length > self._max_image_bytes:
            raise ImageError("too_large" if is_a_place else "truncated", f"{length} bytes at {offset}")
        return offset, length

    def describe(self, index: int) -> str:
        """Return the image id and place of one image, for messages."""
        place = f"{self._tars[self._tar[index]]} at byte {self._offset[index]}"
        with self._fs.open(self._path, "rb") as file:
            parquet = pq.ParquetFile(file)
            first = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if index < first + rows:
                    ids = parquet.read_row_group(group, columns=["image_id"]).column("image_id")
                    return f"{ids[index - first].as_py()} ({place})"
                first += rows
        return place


class _Neighbour(NamedTuple):
    """Where an image lies."""

    place: int
    tar: int
    start: int
    end: int


def _runs(images: list[_Neighbour]) -> Iterator[list[_Neighbour]]:
    """Cut images, in the order in which they lie, into what one read gets."""
    run: list[_Neighbour] = []
    for image in images:
        if run:
            is_near = image.tar == run[-1].tar and image.start - run[-1].end <= _MAX_GAP_BYTES
            if not is_near or image.end - run[0].start > _MAX_READ_BYTES:
                yield run
                run = []
        run.append(image)
    if run:
        yield run


def _truncated(data: bytes, offset: int) -> ImageError:
    return ImageError("truncated", f"the tar ends {len(data)} bytes after byte {offset}")
