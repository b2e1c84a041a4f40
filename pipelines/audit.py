"""Look again at what a run stores: are faces still found, and are there bytes that should be gone?"""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from curation.errors import ImageError
from curation.models.faces import FaceDetector
from curation.pipelines.context import Context
from curation.stages.faces import audit_faces


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        num_images: Stored images of the pool and the seeds that had a face.
        num_hidden: Hidden faces with a shorter side of at least ``min_side_px``.
        num_found_again: Of these, how many the detector finds in the stored image.
        num_detections: All that the detector finds in those images, false alarms included.
        num_unsafe: Members of tars that no row stores: not blurred, or rejected by NSFW or decoding.
    """

    num_images: int
    num_hidden: int
    num_found_again: int
    num_detections: int
    num_unsafe: int


def audit(
    context: Context,
    weights: str | None = None,
    min_side_px: float = 20.0,
    on_image: Callable[[], None] = lambda: None,
) -> Audit:
    """Search every stored image that had a face again.

    Args:
        context: Of the run.
        weights: Another detector than the run's: a name of ``curate models list``, or a path.
        min_side_px: Smaller faces are not counted.
        on_image: Called after each image.

    Raises:
        CorruptError: A tar is missing although its marker names it.
    """
    faces = context.config.faces
    loaded = context.weights(weights or faces.weights)
    detector = FaceDetector(loaded, faces.min_score, faces.scales, faces.max_side_px, tiled=faces.tiles)
    images = hidden = again = detections = 0
    for collection in ("pool", *context.collections("seeds")):
        for shard, marker in context.run.markers(collection, "faces").items():
            columns = ["num_faces", "face_boxes", "tar_offset", "stored_bytes"]
            rows = context.run.read_table(collection, "faces", shard, columns).to_pylist()
            with context.run.open(marker.files["images"]) as stream:
                for row in rows:
                    if not row["num_faces"]:
                        continue
                    stream.seek(row["tar_offset"])
                    data = stream.read(row["stored_bytes"])
                    try:
                        found = audit_faces(
                            detector, data, np.array(row["face_boxes"], np.float32), context.config.images, min_side_px
                        )
                    except ImageError:
                        continue  # nobody can see a face in what does not decode
                    images += 1
                    hidden += found.num_hidden
                    again += found.num_found_again
                    detections += len(found.found)
                    on_image()
    return Audit(images, hidden, again, detections, _num_unsafe(context))


def _num_unsafe(context: Context) -> int:
    """Count members of the run's tars that no row stores after blurring, or whose image NSFW rejects now."""
    unsafe = 0
    for collection in ("pool", *context.collections("seeds")):
        for shard, marker in context.run.markers(collection, "faces").items():
            stored = context.run.read_table(collection, "faces", shard, ["tar_offset"]).column(0).is_valid()
            ids = context.run.read_table(collection, "fetch", shard, ["image_id"]).column(0).to_pylist()
            reasons = context.run.read_table(collection, "nsfw_verdict", shard).column(0).to_pylist()
            rows = zip(ids, stored.to_pylist(), reasons, strict=True)
            safe = {image_id for image_id, is_stored, reason in rows if is_stored and reason is None}
            with context.run.open(marker.files["images"]) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                unsafe += sum(member.name.partition(".")[0] not in safe for member in tar)
        unsafe += sum("raw" in marker.files for marker in context.run.markers(collection, "fetch").values())
    return unsafe
