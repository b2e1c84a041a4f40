"""The encoded images of a shard: where they lie now, and the fetched ones that go once they are blurred."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from curation import schema
from curation.errors import CorruptError, StageError
from curation.pipelines.context import Context
from curation.pipelines.ingest import image_id, links_of
from curation.pipelines.plan import Step
from curation.store import Marker


def encoded(
    context: Context, step: Step, collection: str, shard: int, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[int, bytes]]:
    """Yield the rows' encoded bytes as a step wants them, from where they lie now.

    A step that reads the table of faces gets the blurred images; others get those that were fetched while there are
    any, else the blurred ones; references of local sets come from the source itself.

    Raises:
        CorruptError: If the bytes are not those that were stored.
        StageError: If the source has changed.
    """
    store = context.run
    images = store.read_table(collection, "fetch", shard, ["image_id", "num_bytes", "raw_offset", "raw_id"])
    blurred = store.marker(collection, "faces", shard)
    fetched = store.marker(collection, "fetch", shard)
    in_place: list[int] = []
    path = fetched.files.get("raw", "") if fetched is not None else ""
    is_blurred = blurred is not None and fetched is not None and blurred.inputs.get("table fetch") == fetched.digest
    if blurred is not None and is_blurred and (not path or schema.FACES in step.reads):
        table = store.read_table(collection, "faces", shard, ["tar_offset", "stored_bytes", "stored_id"])
        path, offsets, sizes, names = blurred.files["images"], table.column(0), table.column(1), table.column(2)
    else:
        offsets, sizes, names = (images.column(name) for name in ("raw_offset", "num_bytes", "raw_id"))
        if collection.startswith("references/"):
            in_place = [int(row) for row in rows if not offsets[row].is_valid]
    if path and len(in_place) < len(rows):
        skip = set(in_place)
        with store.open(path) as stream:
            for row in rows.tolist():
                if row not in skip and offsets[row].is_valid:
                    stream.seek(offsets[row].as_py())
                    data = stream.read(sizes[row].as_py())
                    if image_id(data) != names[row].as_py():
                        raise CorruptError(
                            f"{store.url}: {path} does not hold image {images.column('image_id')[row]} where its table "
                            "says; `--redo fetch` gets the images again"
                        )
                    yield row, data
    if in_place:
        from curation.crawl.fetcher import fetch as fetch_links  # an HTTP client takes a while to import

        links = links_of(context, collection, shard)
        ids = images.column("image_id")
        for found in fetch_links([links[row] for row in in_place], context.config, context.should_stop):
            row = in_place[found.index]
            if found.data is None or image_id(found.data) != ids[row].as_py():
                raise StageError(
                    "sscd",
                    shard,
                    f"{links[row].url} has changed or gone since it was fetched; `--redo fetch` reads it again",
                )
            yield row, found.data


def is_last_to_read_raw(step: Step, collection: str) -> bool:
    """Whether nothing needs a shard's fetched bytes once it has been through this step."""
    return step.name == ("sscd" if collection.startswith("references/") else "faces")


def has_raw(context: Context, collection: str, shard: int) -> bool:
    """Whether a shard's fetched bytes are still there."""
    marker = context.run.marker(collection, "fetch", shard)
    return marker is not None and "raw" in marker.files


def forget_raw(context: Context, collection: str, shard: int) -> None:
    """Delete a shard's raw tar, if there is one."""
    marker = context.run.marker(collection, "fetch", shard)
    if marker is not None and "raw" in marker.files:
        files = {role: path for role, path in marker.files.items() if role != "raw"}
        context.run.write_marker(collection, "fetch", shard, Marker(**{**asdict(marker), "files": files}))
        context.run.remove(marker.files["raw"])
