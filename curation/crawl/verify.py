"""Bytes are images when they decode."""

import hashlib

from curation import images
from curation.blocklist import Blocklists
from curation.config import ImagesConfig
from curation.crashes import watch
from curation.crawl.links import Fetched
from curation.errors import BlocklistedError, ImageError
from curation.images import ImageInfo

# JPEGs are decoded at 1/8 of their size: every coded byte is still read, so damage shows, in a fraction of the time.
_VERIFY_SIDE_PX = 1


def refused(index: int, error: ImageError) -> Fetched:
    """Return the result of a link whose image is refused."""
    if isinstance(error, BlocklistedError):
        return Fetched(index, None, None, error.reason, sha256=error.sha256, list_name=error.list_name)
    return Fetched(index, None, None, error.reason, detail=error.detail)


def verify(data: bytes, limits: ImagesConfig, blocked: Blocklists | None = None) -> ImageInfo:
    """Decode an image and return what it is; one that is on a list is not even looked at.

    Raises:
        BlocklistedError: It is on a list of ``blocked``.
        ImageError: With one of ``schema.IMAGE_REASONS``.
    """
    if not data:
        raise ImageError("not_an_image", "no bytes")
    if blocked is not None:
        blocked.check(data)
    with watch().at_work(hashlib.sha256(data).hexdigest()[:32], data, limits):
        info = images.inspect(data, limits)
        images.decode(data, limits, _VERIFY_SIDE_PX)
    return info
