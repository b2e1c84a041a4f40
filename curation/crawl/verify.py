"""Bytes are images when they decode."""

import hashlib
from dataclasses import dataclass

from curation import images
from curation.blocklist import Blocklists
from curation.config.fetch import ResizeConfig
from curation.config.images import ImagesConfig
from curation.crashes import watch
from curation.crawl.links import Fetched
from curation.errors import BlocklistedError, ImageError
from curation.frames import has_more
from curation.images import ImageInfo


@dataclass(frozen=True, slots=True)
class Verified:
    """An image that decodes.

    Attributes:
        data: What is to be stored: the bytes as they came, or resized.
        info: What ``data`` is.
        image_id: First 128 bits of the sha256 of the bytes as they came, in hex.
        stored_id: The same of ``data``.
    """

    data: bytes
    info: ImageInfo
    image_id: str
    stored_id: str


def digest_id(data: bytes) -> str:
    """Return the first 128 bits of the sha256 of the bytes, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def refused(index: int, error: ImageError) -> Fetched:
    """Return the result of a link whose image is refused."""
    if isinstance(error, BlocklistedError):
        return Fetched(index, None, None, error.reason, sha256=error.sha256, list_name=error.list_name)
    return Fetched(index, None, None, error.reason, detail=error.detail)


def verify(
    data: bytes, limits: ImagesConfig, blocked: Blocklists | None = None, resize: ResizeConfig | None = None
) -> Verified:
    """Decode an image and return what it is; one that is on a list is not even looked at.

    Args:
        data: As they came.
        limits: What is refused.
        blocked: Lists.
        resize: Make the image smaller, and encode it anew; None: keep the bytes.

    Raises:
        BlocklistedError: It is on a list of ``blocked``.
        ImageError: With one of ``schema.IMAGE_REASONS``.
    """
    if not data:
        raise ImageError("not_an_image", "no bytes")
    if blocked is not None:
        blocked.check(data)
    image_id = digest_id(data)
    if has_more(data, limits.max_frames):
        raise ImageError("too_many_frames", f"more than images.max_frames, {limits.max_frames}")
    with watch().at_work(image_id, data, limits):
        if resize is None:
            return Verified(data, images.inspect_pixels(data, limits), image_id, image_id)
        smaller, info = resized(data, limits, resize)
        return Verified(smaller, info, image_id, digest_id(smaller))


def resized(data: bytes, limits: ImagesConfig, resize: ResizeConfig) -> tuple[bytes, ImageInfo]:
    """Return an image made smaller and encoded anew, upright and in sRGB, and what it is then.

    An image that is small enough is encoded anew as well, so that all that is stored is of one kind, without metadata.

    Raises:
        ImageError: With one of ``schema.IMAGE_REASONS``.
    """

    def size(width: int, height: int) -> tuple[int, int]:
        if resize.mode == "none":
            return width, height
        side_px = min(width, height) if resize.mode == "shorter" else max(width, height)
        scale = min(1.0, resize.side_px / side_px)
        return max(1, round(width * scale)), max(1, round(height * scale))

    # The last halving is left to a filter that is better than that of a decoder at a smaller scale.
    min_side_px = 2 * resize.side_px if resize.mode == "shorter" else None
    return images.encode_anew(data, limits, size, resize.format, resize.quality, min_side_px)
