"""WebDataset tars with known offsets.

Layout of one member, as POSIX ustar has it: a 512-byte header, the bytes, zeros up to the next multiple of 512; two
zero blocks end the archive. A member is named ``<image id>.<extension>`` and has no time and no owner, so the same
images in the same order make the same file. The offset of the bytes is known when a member is written, and tables keep
it: readers seek and read, and never parse the archive.
"""

import io
import tarfile
from types import TracebackType
from typing import IO, Self

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif", "gif": "gif", "bmp": "bmp", "tiff": "tiff"}


class TarWriter:
    """Append images to a tar that is written once from front to back.

    An image id that comes again is not stored again: both rows share one offset.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._offsets: dict[str, int] = {}

    def add(self, image_id: str, data: bytes, image_format: str) -> int:
        """Store an image and return the offset of its first byte in the file."""
        if image_id not in self._offsets:
            info = tarfile.TarInfo(f"{image_id}.{EXTENSIONS[image_format]}")
            info.size = len(data)
            self._offsets[image_id] = self._tar.offset + tarfile.BLOCKSIZE
            self._tar.addfile(info, io.BytesIO(data))
        return self._offsets[image_id]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._tar.close()
        finally:
            self._stream.close()
