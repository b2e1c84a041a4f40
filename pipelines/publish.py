"""Give a finished manifest the names that people know: ``manifest.parquet`` and ``manifest.json`` of the run."""

import json
from typing import Any

from curation.errors import CorruptError
from curation.pipelines.context import Context
from curation.stages.manifest import MANIFEST_FILE, SUMMARY_FILE, ManifestStage

_PUBLISHED = "published.json"  # which artefact lies under the known names; written last


def publish(context: Context) -> dict[str, Any] | None:
    """Copy the newest manifest to its known names unless it is there; return its summary, or None if there is none."""
    run = context.run
    marker = run.artefact_marker(ManifestStage.name)
    if marker is None:
        return None
    source = marker.files[MANIFEST_FILE]
    if not run.exists(_PUBLISHED) or run.read_bytes(_PUBLISHED).decode() != source or not run.exists(MANIFEST_FILE):
        run.remove(_PUBLISHED)
        run.publish(source, MANIFEST_FILE)
        run.publish(marker.files[SUMMARY_FILE], SUMMARY_FILE)
        run.write_bytes(_PUBLISHED, source.encode())
    try:
        summary: dict[str, Any] = json.loads(run.read_bytes(marker.files[SUMMARY_FILE]))
    except (FileNotFoundError, ValueError) as error:
        raise CorruptError(
            f"{run.url}: {marker.files[SUMMARY_FILE]} is missing or broken; `--redo manifest` makes it again"
        ) from error
    return summary
