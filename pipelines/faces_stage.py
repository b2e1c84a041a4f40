"""The stage that hides faces, for the step that stores images and for the one that describes references."""

from typing import TYPE_CHECKING

from curation.pipelines.context import Context

if TYPE_CHECKING:
    from curation.stages.faces import FacesStage


def faces_stage(context: Context) -> "FacesStage":
    """Load the detector of the settings."""
    from curation.models.faces import FaceDetector
    from curation.stages.faces import FacesStage

    config = context.config.faces
    detector = FaceDetector(
        context.weights(config.weights),
        config.min_score,
        config.scales,
        config.max_side_px,
        device=context.device("faces"),
        tiled=config.tiles,
    )
    return FacesStage(detector, config, context.config.images)
