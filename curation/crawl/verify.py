"""Bytes are images when they decode."""

import hashlib

from curation import images
from curation.config import ImagesConfig
from curation.crashes import watch
from curation.errors import ImageError
from curation.images import ImageInfo

# JPEGs are decoded at 1/8 of their size: every coded byte is still read, so damage shows, in a fraction of the time.
_VERIFY_SIDE_PX = 1


def verify(data: bytes, limits: ImagesConfig) -> ImageInfo:
    """Decode an image and return what it is.

    Raises:
        ImageError: With one of ``schema.IMAGE_REASONS``.
    """
    if not data:
        raise ImageError("not_an_image", "no bytes")
    with watch().at_work(hashlib.sha256(data).hexdigest()[:32], data, limits):
        info = images.inspect(data, limits)
        images.decode(data, limits, _VERIFY_SIDE_PX)
    return info
